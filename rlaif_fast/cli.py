"""The common part of all commands: configuration from YAML and flags, and errors as one line."""

from __future__ import annotations

import copy
import io
import itertools
import os
import re
import select
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from rlaif_fast.errors import HINTS, RlaifFastError, UsageError, first_line, missing, nearest, printable
from rlaif_fast.termination import ECHO_SECONDS, EXIT_CODE, Terminated, Termination
from rlaif_fast.yaml_keys import packaged, refuse_repeated_keys

Config = TypeVar("Config")

# Packages of the extra "train", by their import names.
OF_TRAIN = {
    *("transformers", "av", "jsonargparse", "yaml", "rich", "matplotlib", "tensorboard", "jinja2", "PIL"),
    *("safetensors", "tokenizers", "peft", "sacrebleu"),
}


def parse_config(
    config_class: type[Config],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    under: Path | None = None,
) -> Config:
    """Read a dataclass from `--config FILE` and `--key value`; a flag wins over a file, in any order.

    Keys that are set twice are named on standard error with the value that wins. `--print-config` prints the result as
    YAML and exits; `--help` documents every field.

    Args:
        config_class: The dataclass.
        argv: The arguments; None for those of the command line.
        prog: The command's name, for its help.
        description: What it does, for its help.
        under: A file whose values apply if neither a flag nor a file of the user's sets them.

    Raises:
        UsageError: A key is unknown (the nearest name is suggested), occurs twice in a file, a value does not fit
            its type, or the file cannot be read.
    """
    files, flags = _files_and_flags(_words(argv))
    parser = _parser(config_class, prog, description)  # type: ignore[arg-type]
    values = parser.parse_args([*(["--config", str(under)] if under else []), *files, *flags])
    _tell_twice(parser, files, flags, _names(config_class))
    found = {name: _plain(getattr(values, name)) for name in _names(config_class)}
    return config_class(**_texts_kept(found, files, flags))


def given_values(
    config_class: type, argv: Sequence[str] | None, *, prog: str, description: str, flags_alone: bool = False
) -> dict[str, Any]:
    """The keys that the command line or its `--config FILE` sets, with their values.

    Args:
        config_class: The dataclass.
        argv: The arguments; None for those of the command line.
        prog: The command's name, for its help.
        description: What it does, for its help.
        flags_alone: Leave out what files set.

    Raises:
        UsageError: As in `parse_config`.
    """
    files, flags = _files_and_flags(_words(argv))
    words = flags if flags_alone else [*files, *flags]
    values = _parser(config_class, prog, description).parse_args(words, defaults=False)
    found = {name: _plain(values[name]) for name in _names(config_class) if name in values}
    return _texts_kept(found, [] if flags_alone else files, flags)


def typed_sections(
    config_class: type, sections: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The sections of a file in another format, each with keys of a dataclass, as `--config` would read them.

    Raises:
        UsageError: A key is unknown, or a value does not fit its type; the section is named.
    """
    parser = _parser(config_class, "", "")
    found = {}
    for section, keys in sections.items():
        try:
            values = parser.parse_object(copy.deepcopy(dict(keys)), defaults=False)
        except UsageError as error:
            raise UsageError(f"config: {section}: {error}") from None
        found[section] = {name: _plain(values[name]) for name in keys}
        # The parser would parse the texts inside keys of any type a second time.
        found[section] |= {name: written for name, written in keys.items() if isinstance(written, dict)}
    return found


def flag_is_true(argv: Sequence[str], name: str) -> bool:
    """Whether the arguments contain `--name true`, before they are parsed."""
    words = " ".join(argv).replace("=", " ").split()
    return f"--{name}" in words and words[words.index(f"--{name}") + 1 :][:1] == ["true"]


def _words(argv: Sequence[str] | None) -> list[str]:
    return list(sys.argv[1:] if argv is None else argv)


def _files_and_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that name configuration files, in their order, and all others."""
    files: list[str] = []
    flags: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--config":
            files += [word, *itertools.islice(rest, 1)]
        else:
            (files if word.startswith("--config=") else flags).append(word)
    for word in files:
        if word != "--config":
            _check_file(_path_in(word))
    return files, flags


def _path_in(word: str) -> Path:
    """The file that an argument names, alone or after `--config=`."""
    return Path(word.removeprefix("--config=")).expanduser()


def _check_file(path: Path) -> None:
    try:
        from yaml import YAMLError
    except ImportError:
        return  # the parser says what to install
    try:
        if not refuse_repeated_keys(path):
            raise UsageError(
                f"config: {path} holds no keys (`KEY: value`, one a line); add some, or leave it out"
            )
    except UnicodeDecodeError as error:
        raise UsageError(f"config: {path} is no text in UTF-8: {first_line(error)}") from None
    except (ValueError, YAMLError) as error:
        raise UsageError(f"config: cannot read {path}: {' '.join(str(error).split())}") from None


def _texts_kept(values: dict[str, Any], files: Sequence[str], flags: Sequence[str]) -> dict[str, Any]:
    """`values` with the texts that files and flags quote inside keys of any type.

    The parser parses such a text a second time, and turns "16" into a number and "Answer: (.*)" into a mapping.
    """
    import yaml

    open_ended = {name: held for name, held in values.items() if isinstance(held, dict) and held}
    texts: dict[str, dict[str, str | None]] = {name: {} for name in open_ended}

    def note(name: str, node: Any) -> None:
        if name in texts and isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                quoted = isinstance(value, yaml.ScalarNode) and value.style
                texts[name][key.value] = value.value if quoted else None

    if not open_ended:
        return values
    for word in files:
        if (path := _path_in(word)).is_file():
            root: Any = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
            for key, node in root.value:
                note(key.value, node)
    for word, following in itertools.zip_longest(flags, flags[1:], fillvalue=""):
        name, given, text = word.removeprefix("--").partition("=")
        section, dot, inner = name.partition(".")
        if word.startswith("--") and dot and section in texts:
            texts[section][inner] = None  # command-line values are never quoted
        elif word.startswith("--") and name in texts:
            note(name, yaml.compose(text if given else following, yaml.SafeLoader))
    for name, held in open_ended.items():
        kept = {key: text for key, text in texts[name].items() if key in held and text is not None}
        values[name] = held | kept
    return values


def _tell_twice(parser: Any, files: Sequence[str], flags: Sequence[str], names: Sequence[str]) -> None:
    """Say which value wins for each key that two files, a file and a flag, or two flags set."""
    settings = [word for word in flags if not word.startswith("--print-config")]
    paths = [word.removeprefix("--config=") for word in files if word != "--config"]
    sources = [(path, ["--config", path]) for path in paths] + [("the flag", settings)]
    before: dict[str, tuple[str, Any]] = {}
    for source, words in sources:
        found = parser.parse_args(words, defaults=False)
        for name in names:
            if name not in found:
                continue
            held = _texts_kept({name: _plain(found[name])}, *_files_and_flags(words))[name]
            if name in before and held != before[name][1]:
                earlier = "the file" if len(paths) == 1 else before[name][0]
                tell(f"{name}: {held!r} ({source}; {earlier} says {before[name][1]!r})")
            before[name] = source, held
    given = Counter(word[2:].partition("=")[0] for word in settings if word.startswith("--"))
    for name in names:
        if given[name] > 1:
            tell(f"{name}: {before[name][1]!r} (the last of {given[name]} flags)")


def _names(config_class: type) -> list[str]:
    assert is_dataclass(config_class)
    return [field.name for field in fields(config_class)]


@cache
def _parser(config_class: type, prog: str, description: str) -> Any:
    try:
        import jsonargparse
    except ImportError as error:
        raise UsageError(str(missing("this command", error, "train"))) from None

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UsageError(_explain(message, config_class))

    usage = f"{prog} [--config FILE] [--KEY VALUE]..."  # the keys are many, and described below
    parser = Parser(
        prog=prog, usage=usage, description=description, print_config="--print-config", allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    for base in config_class.__mro__:
        own = set(vars(base).get("__annotations__", {}))
        # Inherited fields that it sets anew keep the place and the help text of the base.
        own -= {name for parent in base.__bases__ if is_dataclass(parent) for name in _names(parent)}
        if is_dataclass(base) and own:
            inherited = {field.name for field in fields(base)} - own
            parser.add_class_arguments(base, skip=inherited, as_group=True)
    parser.set_defaults({f.name: f.default for f in fields(config_class) if f.default is not MISSING})
    return parser


def packaged_config(name: str) -> Path:
    """Path of a configuration file in the package, such as "tiny.yaml"."""
    path = packaged(name)
    if path is None:
        raise UsageError(f"config: {name} is not among the packaged configurations; reinstall rlaif-fast")
    return path


def _plain(value: Any) -> Any:
    return vars(value) if type(value).__name__ == "Namespace" else value


def _explain(message: str, config_class: type) -> str:
    """The parser's complaint in one line: what a key expects, or the nearest known name for an unknown key."""
    line = " ".join(part.strip() for part in message.strip().splitlines() if part.strip())
    kinds = get_type_hints(config_class)
    unfit = re.match(r'Parser key "(\w+)": .*(?:Got|Given) value: (.*)', line)
    if unfit and unfit[1] in kinds:
        return f"{unfit[1]}: expected {_in_words(kinds[unfit[1]])}, got {unfit[2]}"
    bare = re.search(r"[Uu]nrecognized arguments: (?!-)(.*)", line)
    if bare:
        return f"unexpected {bare[1]!r}; a configuration file goes with --config FILE, a key with --KEY VALUE"
    unknown = re.search(
        r"[Uu]nrecognized arguments?: -*([\w-]+)|[Kk]ey '([\w-]+)' is not expected|'([\w.-]+)' is not", line
    )
    if unknown:
        key = next(group for group in unknown.groups() if group)
        names, otherwise = _names(config_class), "; see --help for the keys there are"
        return f"unknown key {key!r}{nearest(key.replace('-', '_'), names, otherwise)}"
    return line


def _in_words(kind: Any) -> str:
    """What a value of a type looks like to the user who writes it."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    if kind in words:
        return words[kind]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))}, each {_in_words(get_args(kind)[0])}"
    if get_origin(kind) in (dict, list):
        return "keys with values, {KEY: value}" if get_origin(kind) is dict else "a list, [a, b], of text"
    return " or ".join(map(_in_words, get_args(kind))) or str(kind)


def is_first() -> bool:
    """Whether this process is not one of torchrun's, or is the first of them."""
    return os.environ.get("RANK", "0") == "0"


def tell(line: str) -> None:
    """Print a line beside the results; if all processes of torchrun would say it, only one does."""
    if is_first():
        print(line, file=sys.stderr)


def run_command(command: Callable[[], int], *, debug: bool = False, flag: str = "") -> int:
    """Run a command; print an error as one line and return its exit code.

    Args:
        command: Returns the exit code; errors give 2 for usage, 1 for failure, 130 for Ctrl-C, 143 for SIGTERM and
            SIGHUP. If nothing reads its output any more, it ends with 1 and says nothing.
        debug: Show tracebacks instead.
        flag: The flag that turns this on; empty if the command has none.
    """
    hint = f" (run with {flag} for the traceback)" if flag else ""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the caller closed it
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - it stays open
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for what its encoding lacks
    try:
        with Termination(0.0, echo_seconds=ECHO_SECONDS).installed():
            code = command()
        sys.stdout.flush()
        return code
    except RlaifFastError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Terminated as error:
        print(f"terminated by {error}", file=sys.stderr)
        return EXIT_CODE
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 1
        if debug:
            raise
        print(f"error: {_os_reason(error)}{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"error: {_reason(error)}{hint}", file=sys.stderr)
        return 1


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in OF_TRAIN:
        return str(missing("this command", error, "train"))
    return f"{type(error).__name__}: {error}"


def _reader_is_gone() -> bool:
    """Whether nothing reads the standard output any more; further output is then dropped."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # no file: a notebook's, a test's
        return False
    poll = select.poll()
    poll.register(output, 0)  # errors are always reported
    gone = bool(poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone


def _os_reason(error: OSError) -> str:
    """What the system refused, where, and what to do."""
    paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
    where = f"{' and '.join(paths)}: " if paths else ""
    reason = error.strerror or str(error) or type(error).__name__
    return printable(f"{where}{reason}{HINTS.get(error.errno or 0, '')}")
