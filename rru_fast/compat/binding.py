"""Shadow an object's forward in place, and restore it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

MARK = "_accelerated_from"  # attribute of every swapped object: its class before the swap
WARNED = "_accelerate_warned"  # the last warning that a call of it gave
BOUND = ("forward", "_replicate_for_data_parallel")

# Subclasses of plain objects' classes, whose __call__ is the forward that `bind` gave the object.
_callable: dict[type[Any], type[Any]] = {}


def bind(obj: Any, forward: Callable[..., Any], *settings: Any) -> None:
    """Shadow the forward of the object's class by `forward(obj, *settings, *inputs)`."""
    vars(obj).setdefault(MARK, type(obj))
    # A partial, not a bound method: pickle could not find that again. nn.DataParallel copies vars(module) to its
    # replicas, where forward would still be bound to the module.
    bound: Any = partial(forward, obj, *settings)
    bound.__signature__ = _signature(original_forward(obj))
    vars(obj)["forward"] = bound
    if isinstance(obj, nn.Module):
        vars(obj)["_replicate_for_data_parallel"] = partial(_replicate, obj, forward, *settings)
    else:
        obj.__class__ = bound_class(original_class(obj))


def unbind(obj: Any) -> None:
    """Give the object its own forward and class back."""
    obj.__class__ = original_class(obj)
    for name in (*BOUND, MARK, WARNED):
        vars(obj).pop(name, None)


def is_bound(obj: Any) -> bool:
    """Return True if the object has been swapped."""
    return MARK in getattr(obj, "__dict__", {})


def is_replaced(obj: Any) -> bool:
    """Return True if `obj.forward` has been assigned since `bind`."""
    return not isinstance(vars(obj).get("forward"), partial)


def original_class(obj: Any) -> type[Any]:
    """Return the object's class, of a swapped one that before the swap."""
    cls: type[Any] = getattr(obj, "__dict__", {}).get(MARK, type(obj))
    return cls


def bound_class(cls: type[Any]) -> type[Any]:
    """Return the class of a swapped object that had `cls`: of a plain one a subclass of the same name."""
    if _calls_forward(cls):
        return cls
    if cls not in _callable:
        names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        metaclass: Any = type(cls)
        _callable[cls] = metaclass(cls.__name__, (cls,), {**names, "__call__": _call, "__reduce_ex__": _reduce})
    return _callable[cls]


def original_forward(obj: Any) -> Callable[..., Any]:
    """Return the function that `bind` shadows, which takes the object first."""
    cls = original_class(obj)
    forward: Callable[..., Any] = cls.forward if _calls_forward(cls) else cls.__call__
    return forward


def _calls_forward(cls: type[Any]) -> bool:
    """Return True if calling an instance calls its attribute forward; Python looks up __call__ in the class alone."""
    if issubclass(cls, nn.Module):
        return True
    forward, code = getattr(cls, "forward", None), getattr(cls.__call__, "__code__", None)
    return forward is not None and cls.__call__ is not forward and (code is None or "forward" in code.co_names)


def run_original(obj: Any, reason: str, *args: Any, **kwargs: Any) -> Any:
    """Call the forward that `bind` shadows; warn of the reason, once until another."""
    if not torch.compiler.is_compiling() and vars(obj).get(WARNED) != reason:
        vars(obj)[WARNED] = reason
        name = original_class(obj).__name__
        warnings.warn(f"accelerate: {name} runs its own forward, since {reason}", stacklevel=4)
    return original_forward(obj)(obj, *args, **kwargs)


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the function's signature without its first parameter, for whoever inspects it, as torch.export does."""
    _self, *parameters = inspect.signature(function).parameters.values()
    return inspect.Signature([p.replace(annotation=p.empty) for p in parameters])


def _replicate(module: nn.Module, forward: Callable[..., Any], *settings: Any) -> nn.Module:
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)  # type: ignore[no-untyped-call]
    bind(replica, forward, *settings)
    return replica


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    forward = self.forward
    if isinstance(forward, partial) and forward.args[0] is not self:
        return run_original(self, "it is a shallow copy of the one that was swapped", *args, **kwargs)
    return forward(*args, **kwargs)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    return _rebuild, (original_class(self),), vars(self)


def _rebuild(cls: type[Any]) -> Any:
    made: Any = bound_class(cls)
    return made.__new__(made)
