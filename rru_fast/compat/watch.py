"""Notice that something which a swapped forward was compared with has changed since."""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib
import logging
import pathlib
import re
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from rru_fast.compat import binding
from rru_fast.compat.user_code import (
    CONTAINERS,
    VALUES,
    digest,
    functions_of,
    globals_in,
    has_attributes,
    is_data,
    is_special,
    is_users,
    names_in,
)

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
GROUPS = ("_modules", "_parameters", "_buffers")
OWN = frozenset({*binding.BOUND, binding.MARK, binding.WARNED})
OF_MODULES = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
DESCRIPTORS = (property, classmethod, staticmethod)
INERT = (logging.Logger, enum.Enum, pathlib.PurePath, re.Pattern, types.ModuleType, types.BuiltinFunctionType, type)
LARGEST = 1000  # of containers that are compared at every call


class MISSING:
    """Stands for what there is not."""


class ANY:
    """Stands for a value that may change."""


class Watch(NamedTuple):
    """Attributes of one object."""

    owner: Any
    cls: type[Any] | None
    """The owner's class before a swap; None if it may change, as FSDP changes it."""
    name: str
    """Of the owner, in the swapped object."""
    values: dict[str, Any]
    mentioned: dict[str, Any]
    """Other names that the code mentions, and their values in the class, MISSING for none: for torch.compile."""

    def changed(self) -> str | None:
        """Return the name of an attribute that is not what it was, or None."""
        now = vars(self.owner)
        module = isinstance(self.owner, nn.Module)
        if self.cls is not None and not binding.is_instance(self.owner, self.cls):
            return _join(self.name, "__class__")
        swapped = binding.MARK in now
        for key in now:
            if key not in self.values and not (module and key in OF_MODULES) and not (swapped and key in OWN):
                return _join(self.name, key)
        groups = [now[group] for group in GROUPS] if module else []
        for key in (key for group in groups for key in group):
            if key not in self.values:
                return _join(self.name, key)
        for key, then in self.values.items():
            value = now.get(key, MISSING)
            for group in groups if value is MISSING else ():
                value = group.get(key, value)
            if not is_same(value, then):
                return _join(self.name, key)
        return None

    def changed_when_compiled(self) -> str | None:
        """As `changed`, in terms that torch.compile guards, as it does not vars()."""
        for key, then in self.values.items():
            if not is_same(getattr(self.owner, key, MISSING), then):
                return _join(self.name, key)
        for key, then in self.mentioned.items():
            if not is_same(getattr(self.owner, key, MISSING), then):
                return _join(self.name, key)
        return None


class NamespaceWatch:
    """What a class, or of a module the globals that the code reads, holds.

    A pickle has digests of it: where they differ on loading, the code or its values are no longer the same.
    """

    def __init__(self, owner: type[Any] | types.ModuleType, names: tuple[str, ...] | None) -> None:
        self.owner, self.names, self.differs = owner, names, ""
        held = vars(owner)
        keys = [key for key in held if not is_special(key)] if names is None else names
        self.values = {key: freeze(held[key]) if key in held else MISSING for key in keys}

    def __deepcopy__(self, memo: object) -> NamespaceWatch:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        owner = self.owner.__name__ if isinstance(self.owner, types.ModuleType) else self.owner
        return _load_namespace, (owner, self.names, {key: digest(value) for key, value in self.values.items()})

    def changed(self) -> str | None:
        """Return the name of an attribute that is not what it was, or None."""
        now = vars(self.owner)
        if self.differs:
            return f"{self.owner.__name__}.{self.differs}"
        for key, then in self.values.items():
            if not is_same(now.get(key, MISSING), then):
                return f"{self.owner.__name__}.{key}"
        for key in now if self.names is None else ():
            if key not in self.values and not is_special(key):
                return f"{self.owner.__name__}.{key}"
        return None

    def changed_when_compiled(self) -> str | None:
        """Return what `changed` did on loading; torch.compile guards none of the rest."""
        return self.differs or None


Watches = tuple[Watch | NamespaceWatch, ...]


def _load_namespace(owner: Any, names: tuple[str, ...] | None, digests: dict[str, str]) -> NamespaceWatch:
    found = NamespaceWatch(importlib.import_module(owner) if isinstance(owner, str) else owner, names)
    now = {key: digest(value) for key, value in found.values.items()}
    found.differs = next((key for key in (*digests, *now) if digests.get(key) != now.get(key)), "")
    return found


def watch(obj: Any, *, unit: bool = False) -> Watches:
    """Return what the object, what it holds, its classes and the globals that they read are now.

    Args:
        obj: a loss, or a unit.
        unit: leave out what is inside of submodules, parameters and buffers, which a unit's forward reads anew.

    Raises:
        ValueError: something of it cannot be watched, as a tensor cannot without reading its values.
    """
    functions = list(functions_of(obj))
    mentioned = {name for function in functions for name in names_in(function.__code__)} - OF_MODULES - OWN
    found: list[Watch | NamespaceWatch] = []
    classes: dict[type[Any], None] = {}
    namespaces = _globals(functions)
    queue, seen = [("", obj)], set()
    for module, names in namespaces.items():
        queue += [pair for name in names for pair in _objects(f"{module}.{name}", vars(sys.modules[module])[name])]
    while queue:
        name, owner = queue.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        cls = binding.original_class(owner)
        values = dict(_attributes(owner, unit, hooks=owner is not obj))
        for key, value in values.items():
            held = list(_objects(_join(name, key), value))
            queue += [pair for pair in held if not unit or not isinstance(pair[1], nn.Module)]
        others = sorted(mentioned - values.keys()) if is_users(cls) else []
        in_class = {key: getattr(cls, key, MISSING) for key in others}
        plain = {key: value for key, value in in_class.items() if value is MISSING or isinstance(value, VALUES)}
        found.append(Watch(owner, None if unit else cls, name, {k: freeze(v) for k, v in values.items()}, plain))
        for base in cls.__mro__:
            if is_users(base) and base not in classes:
                classes[base] = None
                queue += _held_by_class(base)
    found += [NamespaceWatch(cls, None) for cls in classes]
    found += [NamespaceWatch(sys.modules[module], names) for module, names in namespaces.items()]
    return tuple(found)


def _held_by_class(cls: type[Any]) -> list[tuple[str, Any]]:
    """Return the objects with attributes that a class's own attributes are or contain."""
    found = []
    for key, value in vars(cls).items():
        if not is_special(key) and not isinstance(value, types.FunctionType):
            with contextlib.suppress(ValueError):  # as abc's caches
                found += list(_objects(f"{cls.__name__}.{key}", value))
    return found


def _globals(functions: list[types.FunctionType]) -> dict[str, tuple[str, ...]]:
    """Return the names of the values, functions and objects of the user's that functions read as globals, by module."""
    found: dict[str, set[str]] = {}
    for function in functions:
        module, held = function.__globals__.get("__name__", ""), function.__globals__
        if getattr(sys.modules.get(module), "__dict__", None) is held:
            names = found.setdefault(module, set())
            names |= {name for name in globals_in(function.__code__) if is_data(held.get(name, sys))}
    return {module: tuple(sorted(names)) for module, names in found.items() if names}


def changed(watches: Watches) -> str | None:
    """Return the name of something that is not what it was, or None."""
    compiling = torch.compiler.is_compiling()
    for watch in watches:
        name = watch.changed_when_compiled() if compiling else watch.changed()
        if name is not None:
            return name
    return None


def _attributes(owner: Any, unit: bool, hooks: bool) -> Iterator[tuple[str, Any]]:
    """Yield an object's own attributes; of a module also its submodules, parameters, buffers and hooks."""
    held = vars(owner)
    module = isinstance(owner, nn.Module)
    if module:
        yield from held["_modules"].items()
        for group in ("_parameters", "_buffers"):
            yield from ((key, ANY if unit else value) for key, value in held[group].items())
        yield from ((key, held[key]) for key in HOOKS if hooks)
    skipped = (OF_MODULES if module else frozenset()) | (OWN if binding.is_bound(owner) else frozenset())
    yield from ((key, value) for key, value in held.items() if key not in skipped)


def _objects(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the objects with attributes that a value is or contains.

    Raises:
        ValueError: it contains something that cannot be watched.
    """
    if isinstance(value, (*VALUES, *INERT, *DESCRIPTORS)):
        return
    if isinstance(value, CONTAINERS):
        if len(value) > LARGEST:
            raise ValueError(f"its {name} has {len(value)} items, wanted at most {LARGEST} to compare at every call")
        for key, held in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _objects(f"{name}[{key!r:.20}]", held)
    elif isinstance(value, types.FunctionType):
        for held in (cell.cell_contents for cell in value.__closure__ or ()):
            of_decorator = isinstance(held, types.MethodType) and not is_users(type(held.__self__))  # torch.no_grad's
            if not of_decorator and not isinstance(held, (*VALUES, *INERT, types.FunctionType)):
                raise ValueError(f"its {name} is a closure, whose variables may change")
    elif isinstance(value, types.MethodType):
        yield from _objects(name, value.__self__)
    elif isinstance(value, functools.partial):
        for held in (value.func, value.args, value.keywords):
            yield from _objects(name, held)
    elif has_attributes(value) and not any(getattr(cls, "__slots__", ()) for cls in type(value).__mro__[:-1]):
        yield name, value
    else:
        raise ValueError(f"its {name} is a {type(value).__name__}, whose contents may change")


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def freeze(value: Any) -> Any:
    """Copy containers, however deep, so that changes in place show; return anything else as it is."""
    if isinstance(value, dict):
        return {key: freeze(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(freeze, value))
    return value.copy() if isinstance(value, set) else value


def is_same(now: Any, then: Any) -> bool:
    """Return True if a value has not changed: the same object, or equal plain values or containers of them."""
    if then is ANY:
        return True
    if isinstance(then, dict):
        same = isinstance(now, dict) and len(now) == len(then)
        return same and all(is_same(now.get(key, MISSING), value) for key, value in then.items())
    if isinstance(then, tuple):
        return isinstance(now, list | tuple) and len(now) == len(then) and all(map(is_same, now, then))
    if now is then:
        return True
    if isinstance(then, types.MethodType):
        return isinstance(now, types.MethodType) and now.__func__ is then.__func__ and now.__self__ is then.__self__
    return type(now) is type(then) and isinstance(then, (*VALUES, set, frozenset)) and bool(now == then)
