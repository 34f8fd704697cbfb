"""What a cached verdict depends on besides the request: the code of a function, the weights of a model."""

from __future__ import annotations

import builtins
import functools
import hashlib
import json
import logging
import re
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from rlaif_fast.digests import file_digest
from rlaif_fast.errors import UsageError
from rlaif_fast.policy.model_files import base_of, model_files

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), PurePath)


def function_digest(function: Any) -> str:
    """A digest of what may make functions differ: code, defaults, closures and what they use of their module.

    For `functools.partial` the arguments count too, for a callable object its class and attributes. A function's
    string attribute `identity`, if any, is used instead. Code of other modules counts only by its name.

    Raises:
        UsageError: The function holds a value that has no identity, such as a model.
    """
    parts = _Parts(function)
    return hashlib.sha256(repr(parts.of(function, "it")).encode()).hexdigest()[:32]


def model_digest(
    model: str,
    revision: str | None = None,
    *,
    known: Mapping[str, str] | None = None,
    commit_of: Callable[[str], str | None] = lambda model: None,
) -> str:
    """A digest of the files in a model's folder and, if it holds adapters, of the base's files.

    Args:
        model: A folder, whose files are read, or a hub name.
        revision: The commit that a hub name was loaded at.
        known: Known digests of files in the folder, by name; these files are not read again.
        commit_of: Finds the commit of a base given by hub name.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return str(revision or commit_of(model))
    files = {
        path.relative_to(folder).as_posix(): (known or {}).get(path.name) or file_digest(path)
        for path in model_files(folder)
    }
    base = base_of(folder)
    if base and Path(base).expanduser() != folder:
        base = model_digest(base, commit_of=commit_of)
    return hashlib.sha256(json.dumps([files, base], sort_keys=True).encode()).hexdigest()[:32]


class _Parts:
    """Values as nested tuples whose `repr` is the same in every process."""

    def __init__(self, root: Any) -> None:
        while isinstance(root, functools.partial):
            root = root.func
        self.module = getattr(root, "__module__", None)
        self.name = getattr(root, "__qualname__", None) or type(root).__qualname__
        self.named: dict[int, int] = {}  # functions and classes, with the place where each was described
        self.open: list[int] = []  # what is being described, outermost first

    def of(self, value: Any, where: str) -> Any:
        if isinstance(value, _PLAIN):
            return type(value).__name__, str(value) if isinstance(value, PurePath) else value
        if id(value) in self.named:
            return "again", self.named[id(value)]
        if id(value) in self.open:
            return "around", self.open.index(id(value))
        if isinstance(value, (types.FunctionType, type)):
            self.named[id(value)] = len(self.named)
        self.open.append(id(value))
        found = self._of(value, where)
        self.open.pop()
        return found

    def _of(self, value: Any, where: str) -> Any:
        named = getattr(value, "identity", None) if callable(value) else None
        if isinstance(named, str):
            return "identity", named
        if isinstance(value, functools.partial):
            return "partial", *(self.of(x, where) for x in (value.func, value.args, value.keywords))
        if isinstance(value, types.MethodType):
            return "method", self.of(value.__func__, where), self.of(value.__self__, where)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        # a cache around a function
        if callable(value) and hasattr(value, "__wrapped__") and not isinstance(value, type):
            return "wrapped", self.of(value.__wrapped__, where)
        if isinstance(value, types.CodeType):
            return self._code(value, where)
        if isinstance(value, (list, tuple)):
            return type(value).__name__, *(self.of(x, where) for x in value)
        if isinstance(value, (set, frozenset)):
            return type(value).__name__, *sorted((self.of(x, where) for x in value), key=repr)
        if isinstance(value, Mapping) and type(value) in (dict, types.MappingProxyType):
            return "dict", *((self.of(key, where), self.of(x, where)) for key, x in value.items())
        if isinstance(value, re.Pattern):
            return "pattern", value.pattern, value.flags
        if isinstance(value, (types.ModuleType, logging.Logger)):
            return type(value).__name__, getattr(value, "__name__", None) or value.name
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, types.ModuleType):
            return "builtin", value.__module__, value.__qualname__
        if callable(value) and type(value).__module__ == self.module and hasattr(value, "__dict__"):
            return "object", self.of(type(value), where), self.of(vars(value), f"an attribute of {where}")
        raise UsageError(
            f"cache: no identity can be made of the oracle function {self.name!r}: {where} holds a "
            f"{type(value).__qualname__}; give the function an attribute 'identity', a text that changes with its "
            "verdicts, or leave cache out"
        )

    def _function(self, function: types.FunctionType) -> Any:
        name = function.__module__, function.__qualname__
        if function.__module__ != self.module:
            return "function", *name
        cells = zip(function.__code__.co_freevars, function.__closure__ or ())
        closure = [(key, self.of(_content(cell), f"{key!r}")) for key, cell in cells]
        defaults = self.of(function.__defaults__, "a default"), self.of(function.__kwdefaults__, "a default")
        used = {
            key: self.of(function.__globals__[key], f"{key!r}")
            for key in sorted(set(_names(function.__code__)))
            if key in function.__globals__ and not hasattr(builtins, key)
        }
        return "function", *name, self.of(function.__code__, "its code"), defaults, closure, used

    def _code(self, code: types.CodeType, where: str) -> Any:
        constants = tuple(self.of(constant, where) for constant in code.co_consts)
        counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        table = getattr(code, "co_exceptiontable", b"")
        return (
            "code",
            code.co_code,
            constants,
            code.co_names,
            code.co_varnames,
            code.co_freevars,
            counts,
            table,
        )

    def _class(self, value: type) -> Any:
        name = value.__module__, value.__qualname__
        if value.__module__ != self.module:
            return "class", *name
        held = {key: getattr(x, "__func__", getattr(x, "fget", x)) for key, x in vars(value).items()}
        own = {
            key: self.of(x, f"{key!r}")
            for key, x in sorted(held.items())
            if isinstance(x, (types.FunctionType, *_PLAIN, list, tuple, dict, set)) and key != "__doc__"
        }
        return "class", *name, [self.of(base, "a base") for base in value.__bases__], own


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


def _names(code: types.CodeType) -> Iterator[str]:
    """The names that code reads, including those of inner functions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
