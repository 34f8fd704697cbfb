"""Published benchmarks answered by a policy: choices, open answers, judges, tables."""
