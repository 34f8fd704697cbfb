"""The boundary of an operator: dataclasses become its flat arguments, and dataclasses again inside.

The schema, the arguments and the way back all follow the fields of the dataclass, so a new option or input is
written down once.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "str": "str",
    "bool": "bool",
    "float": "float",
    "float | None": "float?",
    "int | None": "int?",
}


def declare(*kinds: type) -> str:
    """Return the part of an operator's schema that carries these dataclasses."""
    return ", ".join(f"{_TYPES[str(field.type)]} {field.name}" for kind in kinds for field in fields(kind))


def flatten(*values: Any) -> tuple[Any, ...]:
    """Return the fields of dataclasses, in the order in which `declare` names them."""
    return tuple(getattr(value, field.name) for value in values for field in fields(value))


def unflatten(arguments: tuple[Any, ...], *kinds: type) -> tuple[Any, ...]:
    """Return the dataclasses again, then the arguments that follow them."""
    values = []
    for kind in kinds:
        count = len(fields(kind))
        values.append(kind(*arguments[:count]))
        arguments = arguments[count:]
    return (*values, *arguments)
