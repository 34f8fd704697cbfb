"""What all commands share: configuration from YAML and flags, and errors as one line."""

from __future__ import annotations

import difflib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rlaif_fast.errors import RlaifFastError, UsageError

Config = TypeVar("Config")


def parse_config(
    config_class: type[Config], argv: Sequence[str] | None, *, prog: str, description: str
) -> Config:
    """Read a dataclass from `--config FILE` and `--key value` overrides, in that order of precedence.

    `--print-config` prints the result as YAML and exits; `--help` documents every field.

    Raises:
        UsageError: A key is unknown (the nearest name is suggested), a value does not fit its type, or the file
            cannot be read.
    """
    try:
        import jsonargparse
    except ImportError:
        raise UsageError('commands need the extra "train": pip install "rlaif-fast[train]"') from None
    assert is_dataclass(config_class)
    names = [field.name for field in fields(config_class)]

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UsageError(_explain(message, names))

    parser = Parser(prog=prog, description=description, print_config="--print-config", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    for base in (config_class, *config_class.__bases__):
        own = set(vars(base).get("__annotations__", {}))
        if is_dataclass(base) and own:
            inherited = {field.name for field in fields(base)} - own
            parser.add_class_arguments(base, skip=inherited, as_group=True)
    values = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    plain = {name: getattr(values, name) for name in names}
    return config_class(**{name: _plain(value) for name, value in plain.items()})


def packaged_config(name: str) -> Path:
    """Path of a configuration file that comes with the package, such as "tiny.yaml"."""
    spec = find_spec("rlaif_fast_configs")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in map(Path, folders):
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"config: {name} is not among the packaged configurations; reinstall rlaif-fast")


def _plain(value: Any) -> Any:
    return vars(value) if type(value).__name__ == "Namespace" else value


def _explain(message: str, names: Sequence[str]) -> str:
    """One line of the parser's complaint, with the nearest known name where a key is unknown."""
    line = " ".join(part.strip() for part in message.strip().splitlines() if part.strip())
    unknown = re.search(
        r"[Uu]nrecognized arguments?: -*([\w-]+)|[Kk]ey '([\w-]+)' is not expected|'([\w-]+)' is not", line
    )
    if unknown:
        key = next(group for group in unknown.groups() if group)
        near = difflib.get_close_matches(key.replace("-", "_"), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; see --help for the keys there are"
        return f"unknown key {key!r}{hint}"
    return line


def run_command(command: Callable[[], int], *, debug: bool = False) -> int:
    """Run a command; print an error as one line and return its exit code (2 for usage, 1 for failure).

    Args:
        command: Returns the exit code.
        debug: Show tracebacks instead.
    """
    try:
        return command()
    except RlaifFastError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(
            f"error: {type(error).__name__}: {error} (run with --debug true for the traceback)",
            file=sys.stderr,
        )
        return 1
