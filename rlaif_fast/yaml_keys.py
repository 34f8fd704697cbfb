"""YAML files whose keys stand once: of two equal ones a reader would drop the first in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlaif_fast.errors import UsageError


def refuse_repeated_keys(file: str | Path) -> bool:
    """See to it that no mapping of a YAML file has a key twice; says whether the file holds keys at all.

    Raises:
        UsageError: One has; the key and its line are named.
        OSError: The file cannot be read.
        yaml.YAMLError: It is no YAML.
    """
    import yaml

    root = yaml.compose(Path(file).read_text(encoding="utf-8"), yaml.SafeLoader)
    left: list[Any] = [root]
    met: set[int] = set()  # an alias may lead back to what holds it
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
