"""`python -m rlaif_fast.plan CONFIG`: memory and time of a step by part, before a run; predicted, not measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rlaif_fast.cli import flag_is_true, given_values, parse_config, run_command, tell
from rlaif_fast.errors import UsageError
from rlaif_fast.plan.options import GPUS, PlanConfig
from rlaif_fast.trainer.cached_model import defaults_of
from rlaif_fast.trainer.unread import tell_unread

PHASES = ("rollout", "update")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 if a step fits, else 3."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words[:1] = ["--config", words[0]]
    return run_command(lambda: _run(words), debug=flag_is_true(words, "debug"), flag="--debug true")


def _run(words: Sequence[str]) -> int:
    texts: dict[str, Any] = {"prog": "rlaif_fast.plan [CONFIG]", "description": __doc__ or ""}
    given = [word for word in words if not word.startswith("--print-config")]
    model = given_values(PlanConfig, given, **texts).get("model", PlanConfig.model)
    under = defaults_of(model, tell)
    config = parse_config(PlanConfig, words, **texts, under=under)
    by_flag = given_values(PlanConfig, given, **texts, flags_alone=True)
    for line in tell_unread(
        config, by_flag, given_values(PlanConfig, given, **texts).keys() - by_flag.keys()
    ):
        tell(line)
    if config.gpus == 1 and "gpus_a_machine" in by_flag:
        raise UsageError("gpus_a_machine: not read where gpus is 1; leave it out")
    from rlaif_fast.plan.plan import GIB, make_fit, make_plan
    from rlaif_fast.trainer.preflight import MODEL_ORACLES
    from rlaif_fast.trainer.scoring import oracles_named

    plan = make_plan(config)
    gpu = GPUS[config.gpu]
    print(
        f"{config.model}, {config.gpus} x {config.gpu}, sharding {config.sharding}: {plan.prompt_tokens:,} tokens a "
        f"prompt, {plan.passes} {'pass' if plan.passes == 1 else 'passes'} an update. All figures are predictions."
    )
    loaded = [
        name for name, _ in oracles_named(config.oracle, config.oracle_options) if name in MODEL_ORACLES
    ]
    if loaded:
        print(f"Not in the figures: the model of the oracle {', '.join(loaded)}.")
    if config.dynamic_sampling:
        rounds = config.dynamic_sampling_rounds
        print(f"Not in the figures: the extra rollouts of dynamic_sampling, up to {rounds} a step.")
    _print_memory(plan)
    print(f"\n{'seconds of a step':<30}{sum(plan.seconds.values()):>10.1f}")
    for name, seconds in plan.seconds.items():
        print(f"  {name:<28}{seconds:>10.1f}")
    print()
    if plan.fits:
        print(f"It fits: {plan.peak / GIB:.1f} of {gpu.memory:.1f} GiB.")
        return 0
    print(f"It does not fit: {plan.peak / GIB:.1f} GiB are needed, {gpu.memory:.1f} are there.")
    flags, changed = make_fit(plan)
    if changed.fits:
        print(f"It fits ({changed.peak / GIB:.1f} GiB) with {' '.join(flags)}")
    else:
        said = f"with {' '.join(flags)} it still takes" if flags else "it takes"
        print(
            f"No change of the options makes it fit: {said} {changed.peak / GIB:.1f} GiB. {_bound(changed)}"
        )
    return 3


def _print_memory(plan) -> None:
    from rlaif_fast.plan.plan import CONTEXT, FRAGMENTED, GIB

    print(f"\n{'GiB at the peak of':<30}{'rollout':>10}{'update':>10}")
    columns = [plan.rollout, plan.update]
    for name in dict.fromkeys(name for column in columns for name in column):
        print(f"  {name:<28}" + "".join(f"{column.get(name, 0) / GIB:>10.2f}" for column in columns))
    totals = [sum(column.values()) for column in columns]
    print(
        f"  {'allocator and CUDA':<28}"
        + "".join(f"{(t * FRAGMENTED + CONTEXT) / GIB:>10.2f}" for t in totals)
    )
    print(f"  {'together':<28}" + "".join(f"{(t * (1 + FRAGMENTED) + CONTEXT) / GIB:>10.2f}" for t in totals))


def _bound(plan) -> str:
    phase = max(PHASES, key=lambda phase: sum(getattr(plan, phase).values()))
    part = max(getattr(plan, phase).items(), key=lambda item: item[1])[0]
    return f"Most of it are the {part} of the {phase}: take a smaller model, a larger GPU or shorter videos."


if __name__ == "__main__":
    sys.exit(main())
