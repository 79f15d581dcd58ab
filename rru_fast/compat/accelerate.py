"""Swap modules and losses for fast ones in place, and restore them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

from rru_fast import modules, reference
from rru_fast.compat import binding, holders, loss_form, loss_match, units
from rru_fast.compat.loss_examples import NoMatch

FAST = {reference.RRU: modules.RRU, reference.BatchHardTripletLoss: modules.BatchHardTripletLoss}
ADDED = ("backend", "cuda_graph", "_graphs")  # attributes of the fast classes
ELSEWHERE = "a loss outside of the model is swapped by itself: accelerate(loss), or of the engine, list or function"
Held = TypeVar("Held")


def accelerate(model: Held, *, backend: str = "auto", cuda_graph: bool = False) -> Held:
    """Give everything in `model` that computes one of the operators a fast forward, in place.

    Swapped are modules of `rru_fast.reference`, but not of subclasses, rru-reid's RRU and person-reid-lib's FuseNet,
    recognized by their attributes, and batch-hard triplet losses, modules or plain objects, of any repository whose
    arguments, distance, margin and return value one of the operator's options fits (docs/losses.md has a table). A
    third-party one is left alone, with a warning that says why, if a float64 copy gives other outputs, gradients or
    buffers by the fast forward (comparing a unit takes seconds at the paper's size), if its forward sets attributes,
    or if a submodule that the fast forward does not call has hooks: neither they nor hooks added there later would run.

    Objects, parameters, buffers, hooks and optimizers stay. Called again, it changes the backend, and compares losses
    again. A reference module gets the fast class. A third-party module keeps its class and gets a `forward` attribute:
    its repr does not show it, torch.jit.script refuses it, and a shallow copy, or one by a `__reduce__` or
    `__deepcopy__` of its class, may run the original's: restore before such a copy. A plain object gets a subclass of
    its class, of the same name. Where an attribute is not what it was at the swap, or a call has arguments that the
    operator does not serve, a third-party one runs its own forward, with a warning.

    Args:
        model: a module, a loss, or an object, function, list or dict that holds them: attributes, elements, and the
            variables of a function's closure are followed, but not into objects of PyTorch's and Python's own classes
            other than modules. With FSDP2, swap before `fully_shard`.
        backend: as in the constructors of the fast modules.
        cuda_graph: as in the constructor of `rru_fast.RRU`; not for third-party units.

    Returns:
        The same `model`. Warns if there was nothing to swap.

    Raises:
        TypeError: model can hold nothing, or an accelerated module's forward has been replaced.
        ValueError: the backend is unknown or cannot serve here, or runs no CUDA graphs.

    >>> import rru_fast
    >>> model = rru_fast.accelerate(rru_fast.reference.RRU(16, spatial=(4, 2)))
    >>> type(model) is rru_fast.RRU, type(rru_fast.restore(model)) is rru_fast.reference.RRU
    (True, True)
    """
    _check_holder(model)
    modules.check_cuda_graph(cuda_graph, backend)
    swaps: list[_Swap] = []
    left_alone = []
    for name, obj in holders.walk(model):
        title = f"{name} ({binding.original_class(obj).__name__})" if name else binding.original_class(obj).__name__
        try:
            swap = _find_swap(obj, backend, cuda_graph)
        except _LeftAlone as reason:
            warnings.warn(f"accelerate: {title} looks like {reason}", stacklevel=2)
            left_alone.append(title)
            continue
        if swap is not None and swap.without_graphs and cuda_graph:
            raise ValueError(
                f"cuda_graph: got True with {title}, wanted False: {swap.without_graphs} runs no CUDA graphs"
            )
        swaps += [swap] if swap is not None else []
    if not swaps and not left_alone:
        warnings.warn(f"accelerate: {_name(model)} holds no module to swap; {ELSEWHERE}", stacklevel=2)
    for swap in swaps:
        swap.apply()
    return model


class _Swap(NamedTuple):
    apply: Callable[[], None]
    without_graphs: str | None = None
    """Name of a unit that runs no CUDA graphs."""


class _LeftAlone(Exception):
    """What an object looks like, and why it is not swapped."""


def _find_swap(obj: Any, backend: str, cuda_graph: bool) -> _Swap | None:
    """Return what swaps the object, or changes the backend of a swapped one; None if it computes no operator.

    Raises:
        _LeftAlone: it is not swapped, and why.
    """
    if type(obj) in FAST or isinstance(obj, tuple(FAST.values())):
        built_fast = type(obj) not in FAST and not binding.is_bound(obj)
        return None if built_fast else _Swap(partial(_swap_own, obj, backend, cuda_graph))
    if binding.is_bound(obj):
        _check_bound("accelerate", obj)
    unit = units.find(obj)
    if unit is not None:
        reason = None if binding.is_bound(obj) else units.difference(obj, unit)
        if reason is not None:
            raise _LeftAlone(f"{unit.name} and is left alone: {reason}")
        return _Swap(partial(units.bind, obj, unit, backend), unit.name)
    if not loss_match.is_candidate(obj):
        return None
    try:
        form = loss_match.find_form(obj)
    except NoMatch as reason:
        if binding.is_bound(obj):  # its attributes have changed since the swap
            binding.unbind(obj)
        raise _LeftAlone(f"a batch-hard triplet loss and is left alone: {reason}") from None
    except Exception as error:  # whatever its code raises, the others are swapped
        raise _LeftAlone(f"a batch-hard triplet loss and is left alone: {type(error).__name__}: {error}") from None
    return _Swap(partial(binding.bind, obj, loss_form.forward, backend, form))


def _swap_own(module: Any, backend: str, cuda_graph: bool) -> None:
    vars(module).setdefault(binding.MARK, type(module))
    module.__class__ = FAST.get(type(module), type(module))
    if isinstance(module, modules.RRU):
        module._choose_backend(backend, cuda_graph)
    else:
        module._choose_backend(backend)


def restore(model: Held) -> Held:
    """Undo `accelerate`: everything it swapped gets its own forward back, with the weights it has now.

    Args:
        model: as for `accelerate`; fast modules that were built as such stay fast.

    Returns:
        The same `model`. Warns if there was nothing to restore.

    Raises:
        TypeError: model can hold nothing, or a module's class or forward has changed since, as `fully_shard` changes
            the class.
    """
    _check_holder(model)
    swapped = [obj for _, obj in holders.walk(model) if binding.is_bound(obj)]
    if not swapped:
        warnings.warn(f"restore: {_name(model)} holds no accelerated module", stacklevel=2)
    for obj in swapped:
        original = binding.original_class(obj)
        if type(obj) is not (made := FAST.get(original, binding.bound_class(original))):
            raise TypeError(
                f"restore: got a {type(obj).__name__}, wanted the {made.__name__} that accelerate made: "
                "undo first what has changed its class since"
            )
        if original not in FAST:
            _check_bound("restore", obj)
    for obj in swapped:
        added = ADDED if binding.original_class(obj) in FAST else ()
        binding.unbind(obj)
        for name in added:
            vars(obj).pop(name, None)
    return model


def _name(model: Any) -> str:
    return str(getattr(model, "__name__", type(model).__name__))


def _check_holder(model: object) -> None:
    if not holders.is_holder(model):
        wanted = "an nn.Module, a loss, or an object, function, list or dict that holds them"
        raise TypeError(f"model: got {model!r:.60}, wanted {wanted}")


def _check_bound(caller: str, obj: Any) -> None:
    if binding.is_replaced(obj):
        raise TypeError(
            f"{caller}: got a {type(obj).__name__} with another forward, wanted the one that accelerate gave it: "
            "undo first what has replaced it since"
        )
