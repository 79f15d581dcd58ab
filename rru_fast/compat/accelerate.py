"""Swap modules of a model for fast ones in place, and restore them."""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn

from rru_fast import modules, reference
from rru_fast.compat import third_party

FAST = {reference.RRU: modules.RRU, reference.BatchHardTripletLoss: modules.BatchHardTripletLoss}
Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, backend: str = "auto", cuda_graph: bool = False) -> Model:
    """Give every module in `model` that computes one of the operators a fast forward, in place.

    Swapped are modules of `rru_fast.reference`, but not of subclasses, and third-party modules: rru-reid's RRU,
    person-reid-lib's FuseNet and BatchHardTripletLoss and torchreid's TripletLoss, recognized by their attributes. A
    third-party module is left alone, with a warning that says why, if a float64 copy gives other outputs, gradients or
    buffers by the fast forward (comparing takes seconds at the paper's size), if its forward sets attributes or has
    other argument names, or if a submodule that the fast forward does not call has hooks: neither they nor hooks added
    there later would run.

    Module objects, parameters, buffers, hooks and optimizers stay. Called again, it changes the backend. A reference
    module gets the fast class. A third-party module keeps its class and gets a `forward` attribute: its repr does not
    show it, torch.jit.script refuses it, and a `__reduce__` or `__deepcopy__` of its class may give a copy that runs
    the original's weights: restore before such a copy.

    Args:
        model: any module, itself possibly one to swap. With FSDP2, swap before `fully_shard`.
        backend: as in the constructors of the fast modules.
        cuda_graph: as in the constructor of `rru_fast.RRU`; not for third-party units.

    Returns:
        The same `model`. Warns if there was nothing to swap.

    Raises:
        TypeError: model is not a module, or an accelerated module's forward has been replaced.
        ValueError: the backend is unknown or cannot serve here, or runs no CUDA graphs.

    >>> import rru_fast
    >>> model = rru_fast.accelerate(rru_fast.reference.RRU(16, spatial=(4, 2)))
    >>> type(model) is rru_fast.RRU, type(rru_fast.restore(model)) is rru_fast.reference.RRU
    (True, True)
    """
    _check_module(model)
    modules.check_cuda_graph(cuda_graph, backend)
    swaps: dict[nn.Module, third_party.Replacement | None] = {}
    for name, module in model.named_modules():
        replacement, accelerated = third_party.find(module), "_accelerated_from" in vars(module)
        if replacement is None:
            if type(module) in FAST or accelerated:
                swaps[module] = None
            continue
        title, kind = f"{name or 'the model'} ({type(module).__name__})", replacement.name
        if accelerated:
            _check_bound("accelerate", module)
        elif (reason := third_party.difference(module, replacement)) is not None:
            warnings.warn(f"accelerate: {title} looks like {kind} and is left alone: {reason}", stacklevel=2)
            continue
        if cuda_graph and replacement.attributes >= third_party.UNIT:
            raise ValueError(f"cuda_graph: got True with {title}, wanted False: {kind} runs no CUDA graphs")
        swaps[module] = replacement
    if not swaps:
        warnings.warn(f"accelerate: {type(model).__name__} holds no module to swap", stacklevel=2)
    for module, replacement in swaps.items():
        vars(module).setdefault("_accelerated_from", type(module))
        if type(module) in FAST:
            module.__class__ = FAST[type(module)]
        if replacement is not None:
            third_party.bind(module, replacement.forward, backend)
        elif isinstance(module, modules.RRU):
            module._choose_backend(backend, cuda_graph)
        elif isinstance(module, modules.BatchHardTripletLoss):
            module._choose_backend(backend)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`: every module it swapped gets its own forward back, with the weights it has now.

    Args:
        model: any module; fast modules that were built as such stay fast.

    Returns:
        The same `model`. Warns if there was nothing to restore.

    Raises:
        TypeError: model is not a module, or a module's class or forward has changed since, as `fully_shard` changes
            the class.
    """
    _check_module(model)
    swapped = {m: vars(m)["_accelerated_from"] for m in model.modules() if "_accelerated_from" in vars(m)}
    if not swapped:
        warnings.warn(f"restore: {type(model).__name__} holds no accelerated module", stacklevel=2)
    for module, original in swapped.items():
        if type(module) is not (made := FAST.get(original, original)):
            raise TypeError(
                f"restore: got a {type(module).__name__}, wanted the {made.__name__} that accelerate made: "
                "undo first what has changed its class since"
            )
        if original not in FAST:
            _check_bound("restore", module)
    for module, original in swapped.items():
        module.__class__ = original
        added = ("backend", "cuda_graph", "_graphs") if original in FAST else third_party.BOUND
        for name in ("_accelerated_from", *added):
            vars(module).pop(name, None)
    return model


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {model!r:.60}, wanted an nn.Module")


def _check_bound(caller: str, module: nn.Module) -> None:
    if third_party.is_replaced(module):
        raise TypeError(
            f"{caller}: got a {type(module).__name__} with another forward, wanted the one that accelerate gave it: "
            "undo first what has replaced it since"
        )
