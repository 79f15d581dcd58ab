"""Shadow an object's forward in place, and restore it."""

from __future__ import annotations

import inspect
import sys
import types
import warnings
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import nn

MARK = "_accelerated_from"  # attribute of every swapped object: its class before the swap
WARNED = "_accelerate_warned"  # warnings that calls of it gave
CALL = "_accelerated_call"  # attribute of a plain object that its class calls
BOUND = ("forward", "_replicate_for_data_parallel", CALL)

# Subclasses of plain objects' classes, whose __call__ is the forward that `bind` gave the object.
_callable: dict[type[Any], type[Any]] = {}


def bind(obj: Any, forward: Callable[..., Any], *settings: Any) -> None:
    """Shadow the forward of the object's class by `forward(obj, *settings, *inputs)`."""
    cls = original_class(obj)
    # A partial, not a bound method: pickle could not find that again. nn.DataParallel copies vars(module) to its
    # replicas, where forward would still be bound to the module.
    bound: Any = partial(forward, obj, *settings)
    bound.__signature__ = _signature(original_forward(obj))
    if not calls_forward(cls):
        object.__setattr__(obj, "__class__", bound_class(cls))
    vars(obj).setdefault(MARK, cls)
    vars(obj)["forward" if calls_forward(cls) else CALL] = bound
    if isinstance(obj, nn.Module):
        vars(obj)["_replicate_for_data_parallel"] = partial(_replicate, obj, forward, *settings)


def bound(obj: Any) -> Any:
    """Return the partial that `bind` made, or whatever has replaced it; None without one."""
    return vars(obj).get("forward" if calls_forward(original_class(obj)) else CALL)


def unbind(obj: Any) -> None:
    """Give the object its own forward and class back."""
    object.__setattr__(obj, "__class__", original_class(obj))
    for name in (*BOUND, MARK, WARNED):
        vars(obj).pop(name, None)


def is_bound(obj: Any) -> bool:
    """Return True if the object has been swapped."""
    return MARK in getattr(obj, "__dict__", {})


def is_replaced(obj: Any) -> bool:
    """Return True if `obj.forward` has been assigned since `bind`."""
    return not isinstance(bound(obj), partial)


def is_instance(obj: Any, cls: type[Any]) -> bool:
    """Return True if the object's class is `cls`, or what a swap makes of it."""
    return type(obj) is cls or type(obj) is _callable.get(cls)


def original_class(obj: Any) -> type[Any]:
    """Return the object's class, of a swapped one that before the swap."""
    cls = type(obj).__mro__[2] if issubclass(type(obj), _Silent) else type(obj)
    original: type[Any] = getattr(obj, "__dict__", {}).get(MARK, cls)
    return original


class _Silent:
    """Keeps the parents' __init_subclass__ from registering the subclass; has a __dict__, for the same layout."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        pass


def bound_class(cls: type[Any]) -> type[Any]:
    """Return the class of a swapped object that had `cls`: of a plain one a subclass of the same name."""
    if calls_forward(cls):
        return cls
    if cls not in _callable:
        names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        metaclass: Any = type(cls)
        call = update_wrapper(types.FunctionType(_call.__code__, globals()), cls.__call__)
        methods = {"__call__": call, "__reduce_ex__": _reduce}
        _callable[cls] = metaclass(cls.__name__, (_Silent, cls), {**names, **methods})
    return _callable[cls]


def original_forward(obj: Any) -> Callable[..., Any]:
    """Return the function that `bind` shadows, which takes the object first."""
    cls = original_class(obj)
    forward: Callable[..., Any] = cls.forward if calls_forward(cls) else cls.__call__
    return forward


def calls_forward(cls: type[Any]) -> bool:
    """Return True if calling an instance calls its attribute forward; Python looks up __call__ in the class alone."""
    if issubclass(cls, nn.Module):
        return True
    forward, code = getattr(cls, "forward", None), getattr(cls.__call__, "__code__", None)
    return forward is not None and cls.__call__ is not forward and (code is None or "forward" in code.co_names)


def run_original(obj: Any, reason: str, *args: Any, **kwargs: Any) -> Any:
    """Call the forward that `bind` shadows; warn of each reason once."""
    if not torch.compiler.is_compiling() and reason not in vars(obj).setdefault(WARNED, set()):
        vars(obj)[WARNED].add(reason)
        name = original_class(obj).__name__
        warnings.warn(f"accelerate: {name} runs its own forward, since {reason}", stacklevel=_users_level())
    return original_forward(obj)(obj, *args, **kwargs)


def _users_level() -> int:
    """Return the stacklevel, for the caller's warning, of the first frame that is neither PyTorch's nor ours."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "rru_fast"):
        level, frame = level + 1, frame.f_back
    return level


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the function's signature without its first parameter, for whoever inspects it, as torch.export does."""
    _self, *parameters = inspect.signature(function).parameters.values()
    return inspect.Signature([p.replace(annotation=p.empty) for p in parameters])


def _replicate(module: nn.Module, forward: Callable[..., Any], *settings: Any) -> nn.Module:
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)  # type: ignore[no-untyped-call]
    bind(replica, forward, *settings)
    return replica


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    call = vars(self).get(CALL)
    if call is None or call.args[0] is not self:  # lost by its __getstate__, or shared with the copied object
        return run_original(self, "it is a copy of the one that was swapped", *args, **kwargs)
    return call(*args, **kwargs)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Reduce as the original class does, and make the copy one of the swapped class."""
    made = type(self)
    object.__setattr__(self, "__class__", made.__mro__[2])
    try:
        function, arguments, *rest = self.__reduce_ex__(protocol)
    finally:
        object.__setattr__(self, "__class__", made)
    return _rebuild, (function, arguments), *rest


def _rebuild(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    obj = function(*arguments)
    object.__setattr__(obj, "__class__", bound_class(type(obj)))
    return obj
