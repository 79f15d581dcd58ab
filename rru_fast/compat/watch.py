"""Notice that an attribute which a swapped forward was compared with has changed since."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rru_fast.compat import binding

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
IGNORED = frozenset(vars(nn.Module())) | {*binding.BOUND, binding.MARK, binding.WARNED, "_compiled_call_impl"}
VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
CONTAINERS = (list, tuple, set, dict)
NOT_USERS = {"torch", "numpy", *sys.stdlib_module_names} - {"argparse", "types"}  # whose namespaces hold options
MISSING = object()


class Watch(NamedTuple):
    """Attributes of one object."""

    owner: Any
    name: str
    """Of the owner, in the swapped object."""
    values: dict[str, Any]
    absent: tuple[str, ...]
    """Names that the code mentions and that neither the owner nor its class has."""
    inherited: tuple[str, ...]
    """Names that the code mentions and that its class has."""

    def changed(self) -> str | None:
        """Return the name of an attribute that is not what it was, or None."""
        now = vars(self.owner)
        submodules = now.get("_modules", now)
        for key, then in self.values.items():
            value = now.get(key, MISSING)
            if not is_same(submodules.get(key, MISSING) if value is MISSING else value, then):
                return _join(self.name, key)
        for names in (self.absent, self.inherited):  # a missing attribute takes an nn.Module's getattr a microsecond
            for key in names:
                if key in now:
                    return _join(self.name, key)
        return None

    def changed_when_compiled(self) -> str | None:
        """As `changed`, in terms that torch.compile guards, as it does not vars()."""
        for key, then in self.values.items():
            if not is_same(getattr(self.owner, key, None), then):
                return _join(self.name, key)
        for key in self.absent:
            if getattr(self.owner, key, None) is not None:
                return _join(self.name, key)
        return None


class ClassWatch:
    """Functions and plain values of a class. A copy in another process takes them as they are there."""

    def __init__(self, owner: type[Any]) -> None:
        self.owner, self.values = owner, dict(_class_attributes(owner))

    def __deepcopy__(self, memo: object) -> ClassWatch:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return ClassWatch, (self.owner,)

    def changed(self) -> str | None:
        """Return the name of an attribute that is not what it was, or None."""
        now = vars(self.owner)
        for key, then in self.values.items():
            if not is_same(now.get(key, MISSING), then):
                return f"{self.owner.__name__}.{key}"
        return None

    def changed_when_compiled(self) -> None:
        """Return None: torch.compile does not guard classes."""
        return None


def watch(obj: Any, *, nested: bool = True) -> tuple[Watch | ClassWatch, ...]:
    """Return what the attributes of the object and its classes are now, if `nested` also those of what it holds.

    Raises:
        ValueError: one is a tensor, whose values cannot be watched without reading them.
    """
    mentioned = {name for code in _code(obj) for name in _names(code)} - IGNORED
    found, queue, seen = [], [("", obj)], set()
    while queue:
        name, owner = queue.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        values = dict(_attributes(owner, inner=nested, hooks=owner is not obj))
        for key, value in values.items():
            if _holds_tensor(value):
                raise ValueError(f"{_join(name, key)} is a tensor, whose values may change")
        absent = sorted(mentioned - values.keys()) if owner is obj or not isinstance(owner, nn.Module) else []
        by_class = [key for key in absent if hasattr(type(owner), key)]
        others = [key for key in absent if key not in by_class]
        found.append(Watch(owner, name, {k: _freeze(v) for k, v in values.items()}, tuple(others), tuple(by_class)))
        if nested:
            queue += [(_join(name, key), value) for key, value in values.items() if has_attributes(value)]
    return (*found, *(ClassWatch(cls) for cls in _classes(obj)))


def changed(watches: tuple[Watch | ClassWatch, ...]) -> str | None:
    """Return the name of an attribute that is not what it was, or None."""
    compiling = torch.compiler.is_compiling()
    for watch in watches:
        name = watch.changed_when_compiled() if compiling else watch.changed()
        if name is not None:
            return name
    return None


def is_users(cls: Any) -> bool:
    """Return True if a class or function is not of PyTorch, numpy or Python itself."""
    return cls.__module__.partition(".")[0] not in NOT_USERS


def has_attributes(value: Any) -> bool:
    """Return True for a module, and for an instance of a user's class or a namespace."""
    if isinstance(value, type | Tensor | types.FunctionType | types.MethodType | types.ModuleType):
        return False
    return isinstance(value, nn.Module) or (hasattr(value, "__dict__") and is_users(type(value)))


def _attributes(owner: Any, inner: bool, hooks: bool) -> Iterator[tuple[str, Any]]:
    """Yield an object's own attributes; of a module also submodules, if `inner` parameters and buffers, and hooks."""
    held = vars(owner)
    if isinstance(owner, nn.Module):
        names = ("_modules", "_parameters", "_buffers") if inner else ("_modules",)
        groups = [held[name].items() for name in names]
        yield from ((key, value) for group in groups for key, value in group if value is not None)
        yield from ((key, held[key]) for key in HOOKS if hooks)
    yield from ((key, value) for key, value in held.items() if key not in IGNORED)


def _classes(obj: Any) -> list[type[Any]]:
    """Return the user's classes of an object."""
    return [cls for cls in binding.original_class(obj).__mro__ if is_users(cls)]


def _class_attributes(cls: type[Any]) -> Iterator[tuple[str, Any]]:
    kinds = (types.FunctionType, staticmethod, *VALUES)
    for key, value in vars(cls).items():
        if isinstance(value, kinds) and (key[:2] != "__" or key == "__call__"):
            yield key, value


def _code(obj: Any) -> Iterator[types.CodeType]:
    for _, value in (pair for cls in _classes(obj) for pair in _class_attributes(cls)):
        function = value.__func__ if isinstance(value, staticmethod) else value
        if isinstance(function, types.FunctionType):
            yield function.__code__


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names that code mentions, and the strings that could be names."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    return any(map(_holds_tensor, value)) if isinstance(value, list | tuple) else isinstance(value, Tensor)


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def _freeze(value: Any) -> Any:
    """Copy containers, however deep, so that changes in place show; return anything else as it is."""
    if isinstance(value, dict):
        return {key: _freeze(inner) for key, inner in value.items()}
    return (
        type(value)(map(_freeze, value))
        if type(value) in (list, tuple)
        else value.copy()
        if type(value) is set
        else value
    )


def is_same(now: Any, then: Any) -> bool:
    """Return True if a value has not changed: the same object, or equal plain values or containers of them."""
    if isinstance(then, dict):
        return (
            isinstance(now, dict)
            and len(now) == len(then)
            and all(is_same(now.get(k, MISSING), v) for k, v in then.items())
        )
    if isinstance(then, list | tuple):
        return type(now) is type(then) and len(now) == len(then) and all(map(is_same, now, then))
    if now is then:
        return True
    return type(now) is type(then) and isinstance(then, (*VALUES, set)) and bool(now == then)
