"""The floors of docs/architecture.md: a module imports its own floor's room and floors below, and never in a circle."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "rlaif_fast"

# From the top down. Rooms of one floor do not import each other; modules of the package's root are rooms too.
FLOORS = (
    ("__main__", "train", "evaluate", "compare", "doctor", "export"),
    ("comparison", "adapters", "checkup", "evals", "plan"),
    ("report",),
    ("trainer",),
    ("runs",),
    ("algorithms",),
    ("distributed",),
    ("oracle",),
    ("rollout",),
    ("prompts",),
    ("policy",),
    ("data",),
    ("video",),
    ("command_parser",),
    ("cli", "outputs", "plugins"),
    ("yaml_keys",),
    ("digests", "errors", "machine", "recent", "streams", "termination"),
    ("loss",),
)
FLOOR_OF = {room: -height for height, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("rlaif_fast", *path.relative_to(ROOT).with_suffix("").parts)
        names[".".join(part for part in parts if part != "__init__")] = path
    return names


def room(module: str) -> str:
    """The folder or root module that a module belongs to; "" for the package itself.

    `python -m rlaif_fast.video` and its like are commands: they stand above every room and nothing imports them.
    """
    return "__main__" if module.endswith(".__main__") else module.partition(".")[2].partition(".")[0]


def imports_of(path: Path, known: set[str], *, when_loaded: bool = False) -> set[str]:
    """The modules of ours that a file imports; `when_loaded` leaves out those inside functions."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    for node in list(nodes):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        deferred = when_loaded and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if typing_only or deferred:
            inside = {id(child) for statement in node.body for child in ast.walk(statement)}
            nodes = [other for other in nodes if id(other) not in inside]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known) or {node.module}
    return {name for name in found if name.partition(".")[0] == "rlaif_fast"}


@cache
def graph(when_loaded: bool = False) -> dict[str, set[str]]:
    """What each module imports."""
    known = modules()
    return {name: imports_of(path, set(known), when_loaded=when_loaded) for name, path in known.items()}


def upward(edges: dict[str, set[str]]) -> list[str]:
    """The arrows that do not go down."""
    found = []
    for module, targets in edges.items():
        for target in sorted(targets):
            above, below = room(module), room(target)
            if above and below and above != below and FLOOR_OF[above] <= FLOOR_OF[below]:
                found.append(f"{module} -> {target}")
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, in order; none where there is no circle."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done or module not in edges:
            return []
        path.append(module)
        for target in sorted(edges[module]):
            if found := visit(target):
                return found
        path.pop()
        done.add(module)
        return []

    return next((found for module in sorted(edges) if (found := visit(module))), [])


def test_every_room_has_a_floor():
    assert {room(module) for module in graph()} - {""} <= set(FLOOR_OF)


def test_no_import_goes_up():
    assert upward(graph()) == []


def test_no_module_imports_itself_by_a_circle():
    edges = {name: targets - {name} for name, targets in graph(when_loaded=True).items()}
    assert circle(edges) == []


def test_the_loss_imports_nothing_else_of_ours():
    outside = {
        f"{module} -> {target}"
        for module, targets in graph().items()
        if room(module) == "loss"
        for target in targets
        if room(target) != "loss" and target != "rlaif_fast._C"
    }
    assert outside == set()


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import rlaif_fast", ["torch", "transformers", "av", "jsonargparse"]),
        (
            "from rlaif_fast import fused_linear_grpo_rank_loss",
            ["torch._dynamo", "sympy", "transformers", "av"],
        ),
        ("import rlaif_fast.train", ["torch", "transformers", "av", "jsonargparse"]),
    ],
)
def test_what_is_imported_is_light(statement, heavy):
    command = f"{statement}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("edges", "found"),
    [
        ({"rlaif_fast.video.a": {"rlaif_fast.data.b"}}, ["rlaif_fast.video.a -> rlaif_fast.data.b"]),
        ({"rlaif_fast.evals.a": {"rlaif_fast.plan.b"}}, ["rlaif_fast.evals.a -> rlaif_fast.plan.b"]),
        ({"rlaif_fast.data.a": {"rlaif_fast.video.b", "rlaif_fast.data.c"}}, []),
    ],
)
def test_an_upward_arrow_is_seen(edges, found):
    assert upward(edges) == found


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b"}, "b": set()}) == []


def test_every_command_has_a_script_and_every_script_a_command():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    scripts = {target.partition(":")[0]: name for name, target in project["scripts"].items()}
    commands = {
        name for name in modules() if name.endswith(".__main__") or name.partition(".")[2] in FLOORS[0]
    }
    assert set(scripts) == commands
    for module, script in scripts.items():
        assert script == f"rlaif-fast-{module.removesuffix('.__main__').rpartition('.')[2]}"
        assert callable(importlib.import_module(module).main)


def test_the_top_level_holds_what_the_layout_names_and_nothing_else():
    top = subprocess.run(["git", "ls-files"], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    if top.returncode:
        pytest.skip("not a git checkout")
    names = {name.partition("/")[0] for name in top.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} == {
        *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "pyproject.toml", "setup.py"),
        *("bench", "configs", "csrc", "docs", "examples", "kernels", "rlaif_fast", "tests"),
    }


def test_no_file_of_code_is_longer_than_400_lines():
    kinds = {".py", ".cpp", ".cu", ".h", ".cuh"}
    folders = ("rlaif_fast", "kernels", "csrc", "bench", "tests", "examples")
    files = [path for folder in folders for path in (ROOT.parent / folder).rglob("*") if path.suffix in kinds]
    assert len(files) > 400
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: length for path, length in lengths.items() if length > 400} == {}
