"""YAML as our commands read it: keys are unique, a quoted text stays a text, and 1e-3 is a number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlaif_fast.errors import UsageError


def packaged(name: str) -> Path | None:
    """Path of a configuration file in the package, such as "tiny.yaml"; None if there is no such file."""
    spec = find_spec("rlaif_fast_configs")
    files = [Path(folder, name) for folder in (spec.submodule_search_locations if spec else None) or ()]
    return next((file for file in files if file.is_file()), None)


def refuse_repeated_keys(file: str | Path) -> bool:
    """Refuse a YAML file in which a mapping has a key twice; returns whether the file holds keys at all.

    Of two equal keys a reader would silently drop the first.

    Raises:
        UsageError: There is such a key; it and its line are named. Or the file cannot be read, or only once (a pipe).
        UnicodeDecodeError: It is not UTF-8 text.
        yaml.YAMLError: It is not YAML.
    """
    import yaml

    if Path(file).is_fifo():
        raise UsageError(f"config: {file} is a pipe, and the file is read more than once; write it to a file")
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        held = packaged(f"{Path(file).stem}.yaml")
        where = "" if held is None else f"; the one that comes with the package is {held}"
        raise UsageError(f"config: cannot read {file}: {error.strerror}{where}") from None
    root = yaml.compose(text, yaml.SafeLoader)
    left: list[Any] = [root]
    met: set[int] = set()  # an alias may lead back to its own container
    while left:
        node = left.pop()
        if id(node) in met:
            continue
        met.add(id(node))
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                left.append(value)
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise UsageError(
                        f"config: {file}:{line}: the key {key.value!r} stands twice; leave one out"
                    )
                seen.add(key.value)
        elif isinstance(node, yaml.SequenceNode):
            left += node.value
    return isinstance(root, yaml.MappingNode)


def load(text: str) -> Any:
    """The content of a YAML text.

    Raises:
        yaml.YAMLError: It is not YAML.
    """
    import yaml

    return yaml.load(text, _with_exponents(yaml.SafeLoader))


def dump(values: Mapping[str, Any], *, sort_keys: bool) -> str:
    """The YAML text that `load`, and a command's `--config`, read back as these values."""
    import yaml

    return yaml.dump(dict(values), Dumper=_with_exponents(yaml.SafeDumper), sort_keys=sort_keys)


def _with_exponents(base: Any) -> Any:
    """A loader or dumper that reads 1e-3 as a number; in YAML 1.1, and so in PyYAML, it is a text."""
    made: Any = type(base.__name__, (base,), {})
    exponent = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    made.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))
    return made
