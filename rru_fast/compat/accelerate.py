"""Swap the reference modules of a model, and those of other people's code, for fast ones, in place, and back."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from torch import nn

from rru_fast import modules, reference
from rru_fast.compat import third_party as foreign

FAST: dict[type[nn.Module], type[nn.Module]] = {
    reference.RRU: modules.RRU,
    reference.BatchHardTripletLoss: modules.BatchHardTripletLoss,
}

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, backend: str = "auto", cuda_graph: bool = False) -> Model:
    """Give every module in `model` that an operator here can serve the fast forward, in place.

    Those are the modules of `rru_fast.reference`, and of other people's code the RRU of rru-reid, FuseNet and
    BatchHardTripletLoss of person-reid-lib and TripletLoss of torchreid: classes that have their attributes and, on a
    copy in float64, their outputs, gradients and running statistics (which takes seconds at the paper's size). One that
    has the attributes alone, or hooks on a submodule that the fast forward reads and does not call, or a forward that
    sets an attribute of its module, is left alone with a warning that says why; nor would hooks run that are put there
    afterwards.

    The module objects stay, and with them parameters, buffers, hooks and whoever else holds them (optimizers, DDP,
    averaged copies); only what their forward runs changes. Called again, it changes their backend. A subclass of a
    reference module is left alone, for its forward is its own.

    Args:
        model: any module, itself possibly one to swap. With FSDP2, swap before `fully_shard`.
        backend: what the fast modules shall run, as in their constructors.
        cuda_graph: whether the RRUs shall run as CUDA graphs, as in their constructor; not those of other people's
            code.

    Returns:
        The same `model`. Warns if there was nothing to swap.

    Raises:
        TypeError: model is none.
        ValueError: the backend is unknown or cannot serve here, or runs no CUDA graphs.

    >>> import rru_fast
    >>> model = rru_fast.accelerate(rru_fast.reference.RRU(16, spatial=(4, 2)))
    >>> type(model) is rru_fast.RRU, type(rru_fast.restore(model)) is rru_fast.reference.RRU
    (True, True)
    """
    _check_module(model)
    modules.check_cuda_graph(cuda_graph, backend)
    swaps: dict[nn.Module, type[nn.Module]] = {}
    for name, module in model.named_modules():
        if _accelerated(module):
            swaps[module] = type(module)
        elif type(module) in FAST:
            swaps[module] = FAST[type(module)]
        elif (kind := foreign.kind_of(module)) is not None:
            title = f"{name or 'the model'} ({type(module).__name__})"
            if (why := foreign.difference(module, kind)) is not None:
                warnings.warn(f"accelerate: {title} looks like {kind.name} and is left alone: {why}", stacklevel=2)
            elif cuda_graph and kind.replaced is foreign.UNIT:
                raise ValueError(f"cuda_graph: got True with {title}, wanted False: {kind.name} runs no CUDA graphs")
            else:
                swaps[module] = foreign.fast_class(type(module), kind)  # type: ignore[arg-type]
    if not swaps:
        warnings.warn(f"accelerate: {type(model).__name__} holds no module to swap", stacklevel=2)
    for module, cls in swaps.items():
        if not _accelerated(module):
            if cls in FAST.values():
                module._accelerated_from = type(module)  # type: ignore[assignment]
            module.__class__ = cls
        if isinstance(module, reference.RRU):
            module._choose_backend(backend, cuda_graph)
        elif isinstance(module, reference.BatchHardTripletLoss | foreign.Foreign):
            module._choose_backend(backend)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`: every module it swapped has its own forward again, with the weights it has now.

    Args:
        model: any module; fast modules that were built as such stay fast.

    Returns:
        The same `model`. Warns if there was nothing to restore.

    Raises:
        TypeError: model is none, or a module's class has changed since, as `fully_shard` changes it.
    """
    _check_module(model)
    targets = [module for module in model.modules() if _accelerated(module)]
    if not targets:
        warnings.warn(f"restore: {type(model).__name__} holds no accelerated module", stacklevel=2)
    for module in targets:
        if type(module) is not (made := _made(module)):
            raise TypeError(
                f"restore: got a {type(module).__name__}, wanted the {made.__name__} that accelerate made: "
                "undo first what has changed its class since"
            )
    for module in targets:
        if isinstance(module, foreign.Foreign):
            added: tuple[str, ...] = ("_accelerated_backend",)
        else:
            added = ("_accelerated_from", "backend", "cuda_graph", "_graphs")
        module.__class__ = module._accelerated_from  # type: ignore[assignment]
        for name in added:
            module.__dict__.pop(name, None)
    return model


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {model!r:.60}, wanted an nn.Module")


def _made(module: nn.Module) -> type[nn.Module]:
    """The class that `accelerate` gave the module."""
    original: Any = module._accelerated_from
    if isinstance(module, foreign.Foreign):
        return foreign.fast_class(original, module._accelerated_kind)
    return FAST[original]


def _accelerated(module: nn.Module) -> bool:
    """Whether `accelerate` gave the module, or the one that made it, its class."""
    return "_accelerated_from" in vars(module) or isinstance(module, foreign.Foreign)
