"""What the documents name exists: links, files, tests, flags, options, and the names that their Python code imports."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import re
import shlex
import subprocess
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

import pytest

from rlaif_fast.oracle import registry
from rlaif_fast.oracle.judge import JudgeOptions
from rlaif_fast.plugins import find
from rlaif_fast.trainer.options import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md")),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "bench" / "results").glob("*/README.md"),
    ]
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"(?<![\w/{}<>*-])(?:[\w-][\w.-]*/)*[\w-]+\.(?:py|md|sh|yaml|cpp|cuh|cu|h)(?![\w*])")

# Files of a reader's own, and one that must never be made.
MADE_UP = {"FILE.yaml", "config.yaml", "judges.py", "kernels/__init__.py", "my_package/judges.py"}

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def tracked() -> tuple[str, ...]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return tuple(f"/{name}" for name in listed.stdout.splitlines() if (ROOT / name).exists())


@cache
def names_of_tests(path: Path) -> tuple[str, ...]:
    return tuple(re.findall(r"^def ((?:test|bench)_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def commands(text: str) -> list[list[str]]:
    """The words of every command in code blocks and between backticks, without comments."""
    blocks = [body.replace("\\\n", " ") for _, body in FENCE.findall(text)]
    indented = re.findall(r"^    (python .*)", text, re.MULTILINE)
    inline = re.findall(r"`([^`]+)`", FENCE.sub("", text))
    lines = [line for block in blocks for line in re.split(r"\n|&&", block)] + indented
    lines += [" ".join(piece.split()) for piece in inline]
    found = []
    for line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # prose or code with an apostrophe
            continue
        if {"pytest", "python", "torchrun", "-k"} & set(words):
            found.append([word.strip("[]") for word in words])
    return found


@each_document
def test_links_lead_somewhere(path):
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text(encoding="utf-8"))):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not link.startswith(("https://", "http://")) and (
            not target.exists() or (anchor and anchor not in anchors(target))
        ):
            lost.append(link)
    assert lost == []


@each_document
def test_files_exist(path):
    names = set(FILE.findall(path.read_text(encoding="utf-8"))) - MADE_UP
    assert [
        name for name in sorted(names) if not any(known.endswith(f"/{name}") for known in tracked())
    ] == []


@each_document
def test_tests_exist(path):
    tests = [name for file in (ROOT / "tests").glob("test_*.py") for name in names_of_tests(file)]
    named = re.findall(r"`(test_\w+?)(\.\.\.)?`", path.read_text(encoding="utf-8"))
    assert [
        name
        for name, cut in named
        if name not in tests and not (cut and any(t.startswith(name) for t in tests))
    ] == []


@each_document
def test_pytest_commands_select_something(path):
    """Each word of `-k` is in the name of a test of the files, or, for a device in a benchmark's, in its code."""
    empty = []
    for words in commands(path.read_text(encoding="utf-8")):
        if "-k" not in words:
            continue
        files = [file for word in words if word.startswith(("tests", "bench")) for file in python_files(word)]
        files = files or python_files("tests")
        texts = [" ".join([file.stem, *names_of_tests(file)]) for file in files]
        texts += [file.read_text(encoding="utf-8") for file in files if file.is_relative_to(ROOT / "bench")]
        expression = words[words.index("-k") + 1]
        wanted = set(re.findall(r"\w+", expression)) - {"and", "or", "not"}
        if not all(any(word in text for text in texts) for word in wanted):
            empty.append(" ".join(words))
    assert empty == []


def python_files(name: str) -> list[Path]:
    path = ROOT / name
    return sorted(path.glob("*.py")) if path.is_dir() else [path]


@each_document
def test_flags_exist(path):
    unknown = []
    for words in commands(path.read_text(encoding="utf-8")):
        known = known_flags(words)
        ours = words[words.index("-m") :] if "-m" in words else words
        flags = {word.partition("=")[0].partition(".")[0] for word in ours if re.match("--.", word)}
        if known is not None and (lost := sorted(flags - known)):
            unknown.append((" ".join(words), lost))
    assert unknown == []


def known_flags(words: list[str]) -> set[str] | None:
    """The flags of one of our commands or scripts; None for a command of others."""
    for launcher in ("-m", "python"):
        after = words[words.index(launcher) + 1 :] if launcher in words else []
        if len(after) > 1 and after[0].startswith("rlaif_fast."):
            return help_flags(after[0], after[1])
        if after and after[0].startswith("bench/"):
            return set(re.findall(r'"(--[\w-]+)"', (ROOT / after[0]).read_text(encoding="utf-8")))
    return None


@cache
def help_flags(module: str, first: str) -> set[str]:
    """The flags in the help of a command, and of its subcommand `first`."""
    room = (ROOT / module.replace(".", "/")).is_dir()
    main = importlib.import_module(f"{module}.__main__" if room else module).main
    calls = [["--help"]]
    if module in ("rlaif_fast.data", "rlaif_fast.oracle", "rlaif_fast.video"):
        calls.append([first, "--help"])
    if module == "rlaif_fast.evaluate":
        calls.append(["--benchmark", "videomme", "--help"])
    printed = io.StringIO()
    for call in calls:
        with suppress(SystemExit), redirect_stdout(printed):
            main(call)
    return set(re.findall(r"--[\w-]+", printed.getvalue()))


@each_document
def test_defaults_told_beside_a_name_are_those_of_the_code(path):
    """`name` (number), where `name` is an option of a run or of an oracle."""
    told = re.findall(r"`(?:--)?(\w+)` \((\d[\d.]*)(?<!\.)\b", path.read_text(encoding="utf-8"))
    defaults = [
        vars(TrainConfig()),
        *({name: p.default for name, p in own.items()} for own in oracle_options()),
    ]
    assert [
        (name, value)
        for name, value in told
        if (known := [own[name] for own in defaults if name in own]) and float(value) not in known
    ] == []


def test_every_option_of_an_oracle_is_documented():
    text = (ROOT / "docs/oracles.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<=[`\"])\w+|\w+(?==)", text))
    assert sorted({name for own in oracle_options() for name in own} - named) == []


def oracle_options() -> list[dict[str, inspect.Parameter]]:
    """The options of each of our oracles, `JudgeOptions` included."""
    judge = inspect.signature(JudgeOptions).parameters
    found = []
    for name in registry._BUILTIN:
        own = dict(inspect.signature(find("oracles", name, registry._BUILTIN)).parameters)
        found.append(own | dict(judge) if own.pop("judge", None) else own)
    return found


@each_document
def test_python_blocks_import_what_there_is(path):
    for language, code in FENCE.findall(path.read_text(encoding="utf-8")):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code.replace("=...", "=None").replace(", ...", ""))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("rlaif_fast"):
                if node.module.startswith("rlaif_fast.adapters.trl"):
                    pytest.importorskip("trl")
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
