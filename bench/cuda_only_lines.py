"""Lists the lines that only a CUDA device reaches, and checks that each is either run by a test or has a reason.

    python bench/cuda_only_lines.py                      # compare with bench/cuda_only_lines.txt
    python bench/cuda_only_lines.py --trace tests/...    # run tests and print which of the lines they execute

A line counts if a branch that checks for a CUDA tensor or device guards it (`x.is_cuda`, `device.type == "cuda"`,
`torch.cuda.is_available()`), or if it calls `torch.cuda` itself. For each line, the list names its file, function and
code, and who runs it: a test, or "no test: " and the reason.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".txt")
FOLDERS = ("rlaif_fast", "kernels")
ASKS = ("is_available", "is_current_stream_capturing")  # of torch.cuda: asked on any machine


class Line(NamedTuple):
    """One line of code, identified by its text, since line numbers move with every edit."""

    file: str
    function: str
    code: str


def found() -> dict[Line, tuple[Path, set[int]]]:
    """Every line that only a CUDA device reaches, with its file and the line numbers where it occurs."""
    lines: dict[Line, tuple[Path, set[int]]] = {}
    for path in sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "cuda" not in source:
            continue
        texts = source.splitlines()
        for function, statement in _statements(ast.parse(source)):
            line = Line(str(path.relative_to(ROOT)), function, " ".join(texts[statement.lineno - 1].split()))
            lines.setdefault(line, (path, set()))[1].add(statement.lineno)
    return lines


def listed() -> dict[Line, str]:
    """The committed list: each line, and who runs it."""
    rows = [row.split("\t") for row in LIST.read_text(encoding="utf-8").splitlines() if row]
    return {Line(*row[:3]): row[3] for row in rows}


def _statements(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Statements that only a CUDA device reaches, with the name of the function around them."""

    def block(body: list[ast.stmt], function: str, only: bool) -> Iterator[tuple[str, ast.stmt]]:
        for statement in body:
            if only or _calls_cuda(statement):
                yield function, statement
            yield from inside(statement, function, only)
            if isinstance(statement, ast.If) and _leaves(statement.body):
                only = only or _implies(statement.test, False)

    def inside(statement: ast.stmt, function: str, only: bool) -> Iterator[tuple[str, ast.stmt]]:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            yield from block(statement.body, statement.name, False)
            return
        if isinstance(statement, ast.If):
            yield from block(statement.body, function, only or _implies(statement.test, True))
            yield from block(statement.orelse, function, only or _implies(statement.test, False))
            return
        for name in ("body", "orelse", "finalbody"):
            yield from block(getattr(statement, name, []), function, only)
        for handler in getattr(statement, "handlers", []):
            yield from block(handler.body, function, only)

    yield from block(tree.body, "", False)  # type: ignore[attr-defined]


def _implies(test: ast.expr, value: bool) -> bool:
    """Whether a condition of that value means that there is a CUDA device."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _implies(test.operand, not value)
    if isinstance(test, ast.BoolOp):
        each = [_implies(part, value) for part in test.values]
        return any(each) if isinstance(test.op, ast.And) == value else all(each)
    if isinstance(test, ast.Compare) and isinstance(test.comparators[0], ast.Constant):
        equal = isinstance(test.ops[0], ast.Eq)
        return test.comparators[0].value == "cuda" and equal == value
    text = ast.unparse(test)
    return value and (text.endswith(".is_cuda") or text.startswith("torch.cuda.is_"))


def _leaves(body: list[ast.stmt]) -> bool:
    return isinstance(body[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break))


def _calls_cuda(statement: ast.stmt) -> bool:
    """Whether a statement itself, without the blocks inside it, calls torch.cuda."""
    own = [
        node
        for name, value in ast.iter_fields(statement)
        if name not in ("body", "orelse", "finalbody", "handlers", "annotation", "returns", "args")
        for part in (value if isinstance(value, list) else [value])
        if isinstance(part, ast.AST)
        for node in ast.walk(part)
    ]
    calls = (ast.unparse(node.func) for node in own if isinstance(node, ast.Call))
    return any(call.startswith("torch.cuda.") and call.split(".")[2] not in ASKS for call in calls)


def executed(tests: list[str]) -> set[Line]:
    """Run some tests and return the lines that they execute."""
    import pytest

    lines = found()
    wanted: dict[str, set[int]] = {str(path): set() for path, _ in lines.values()}

    def trace(frame: Any, event: str, argument: Any) -> Any:
        path = _real(frame.f_code.co_filename)
        if path not in wanted:
            return None
        if event == "line":
            wanted[path].add(frame.f_lineno)
        return trace

    sys.settrace(trace)
    try:
        pytest.main(["-q", "-p", "no:cacheprovider", *tests])
    finally:
        sys.settrace(None)
    return {line for line, (path, numbers) in lines.items() if wanted[str(path)] & numbers}


_REAL: dict[str, str] = {}


def _real(path: str) -> str:
    if path not in _REAL:
        _REAL[path] = str(Path(path).resolve())
    return _REAL[path]


def main() -> int:
    """Compare or trace; return 1 if the list does not match the code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", nargs="+", metavar="TESTS", help="tests to run")
    options = parser.parse_args()
    if options.trace:
        for line in sorted(executed(options.trace)):
            print("\t".join(line))
        return 0
    lines, known = found(), listed()
    for line in lines.keys() - known.keys():
        print("not listed:", "\t".join(line))
    for line in known.keys() - lines.keys():
        print("no longer there:", "\t".join(line))
    print(f"{len(lines)} lines, {sum(who.startswith('no test') for who in known.values())} without a test")
    return int(lines.keys() != known.keys())


if __name__ == "__main__":
    sys.exit(main())
