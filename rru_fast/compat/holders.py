"""Everything that a model, an engine, a list or a function holds, by name."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from rru_fast.compat.user_code import globals_in, has_attributes, is_users
from rru_fast.compat.watch import OF_MODULES, OWN

CONTAINERS = (list, tuple, set, frozenset, dict)


def is_holder(value: object) -> bool:
    """Return True if the value may hold modules and losses, or is one."""
    functions = (types.FunctionType, types.MethodType, functools.partial)
    return isinstance(value, (*CONTAINERS, *functions)) or has_attributes(value)


def walk(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield every module and every instance of a user's class that `root` is or holds, with its name, each once.

    Followed are submodules, attributes, elements of containers, and of functions the variables of their closures and
    the globals that they name, but not into PyTorch's, numpy's and Python's own objects.
    """
    seen: set[int] = set()
    stack = [("", root)]
    while stack:
        name, value = stack.pop()
        try:
            if id(value) in seen or not is_holder(value):
                continue
            seen.add(id(value))
            held, named = list(_held(value)), has_attributes(value)
        except Exception:  # a proxy of something gone, or an attribute that raises
            continue
        if named:
            yield name, value
        stack.extend(reversed([(f"{name}{key}" if name else key.lstrip("."), inner) for key, inner in held]))


def _held(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a value holds, each with the name of the way to it."""
    if isinstance(value, dict):
        yield from ((f"[{_key(key)}]", held) for key, held in list(value.items()))
    elif isinstance(value, CONTAINERS):
        yield from ((f"[{index}]", held) for index, held in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        yield from _variables(value) if is_users(value) else ()
    else:
        if isinstance(value, nn.Module):
            yield from ((f".{key}", module) for key, module in value._modules.items())
        if is_users(type(value)) or not isinstance(value, nn.Module):
            skipped = OWN | OF_MODULES if isinstance(value, nn.Module) else OWN
            yield from ((f".{key}", held) for key, held in list(vars(value).items()) if key not in skipped)


def _key(key: Any) -> str:
    """Return a dict's key in few words: a tensor's repr takes a while."""
    return repr(key) if isinstance(key, str | int) else type(key).__name__


def _variables(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f".{name}", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for name in globals_in(function.__code__):
        held = function.__globals__.get(name)
        if has_attributes(held) or isinstance(held, list | dict):
            yield f".{name}", held
