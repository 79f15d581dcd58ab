"""What users' classes and functions are made of: the code that an object runs, and the names that it reads."""

from __future__ import annotations

import contextlib
import dis
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rru_fast.compat import binding

VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
CONTAINERS = (list, tuple, dict, set, frozenset)
NOT_USERS = {"torch", "numpy", *sys.stdlib_module_names} - {"argparse", "types"}  # whose namespaces hold options


def is_users(cls: Any) -> bool:
    """Return True if a class or function is not of PyTorch, numpy or Python itself."""
    return str(cls.__module__).partition(".")[0] not in NOT_USERS


def has_attributes(value: Any) -> bool:
    """Return True for a module, and for an instance of a user's class or a namespace."""
    kinds = (type, Tensor, types.FunctionType, types.MethodType, types.ModuleType)
    if type(value) in (weakref.ProxyType, weakref.CallableProxyType) or isinstance(value, kinds):
        return False
    if isinstance(value, nn.Module):
        return True
    return is_users(type(value)) and isinstance(getattr(value, "__dict__", None), dict)


def functions_of(obj: Any) -> Iterator[types.FunctionType]:
    """Yield the user's functions that the object's classes hold, and those that these call by a global name."""
    queue: list[Any] = [v for cls in binding.original_class(obj).__mro__ if is_users(cls) for v in vars(cls).values()]
    seen: set[int] = set()
    while queue:
        value = queue.pop()
        if isinstance(value, property):
            queue += [value.fget, value.fset]
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if not isinstance(value, types.FunctionType) or id(value) in seen or not is_users(value):
            continue
        seen.add(id(value))
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # not assigned yet
                queue.append(cell.cell_contents)
        queue += [value.__globals__.get(name) for name in globals_in(value.__code__)]
        yield value


def names_in(code: types.CodeType) -> Iterator[str]:
    """Yield the names that code mentions, and the strings that could be names."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def globals_in(code: types.CodeType) -> set[str]:
    """Return the names of globals that code reads."""
    inner = [globals_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}.union(*inner)


def is_data(value: Any) -> bool:
    """Return True if a global is a value, a container, or a function or object of the user's."""
    if isinstance(value, types.FunctionType):
        return is_users(value)
    return isinstance(value, (*VALUES, *CONTAINERS)) or has_attributes(value)


def is_special(key: str) -> bool:
    return key[:2] == "__" and key != "__call__"


def digest(value: Any) -> str:
    """Return a text that is the same in another process for the same value or code."""
    function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    if isinstance(value, property):
        return f"property {digest(value.fget)}"
    if isinstance(function, types.FunctionType):
        return _digest_code(function.__code__)
    if isinstance(value, dict):
        return str({repr(key): digest(held) for key, held in value.items()})
    if isinstance(value, CONTAINERS):
        texts = [digest(held) for held in value]
        return f"{type(value).__name__} {sorted(texts) if isinstance(value, set | frozenset) else texts}"
    return repr(value) if isinstance(value, VALUES) else type(value).__name__


def _digest_code(code: types.CodeType) -> str:
    constants = [_digest_code(c) if isinstance(c, types.CodeType) else digest(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"
