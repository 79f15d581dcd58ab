"""Swap the reference modules of a model for the fast ones, in place, and back."""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn

from rru_fast import modules, reference

FAST: dict[type[nn.Module], type[nn.Module]] = {
    reference.RRU: modules.RRU,
    reference.BatchHardTripletLoss: modules.BatchHardTripletLoss,
}

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, backend: str = "auto", cuda_graph: bool = False) -> Model:
    """Turn every reference module in `model` into its fast twin, in place.

    The module objects stay, and with them parameters, buffers, hooks and whoever else holds them (optimizers, DDP,
    averaged copies); only what their forward runs changes. Called again, it changes their backend. A subclass of a
    reference module is left alone, for its forward is its own.

    Args:
        model: any module, itself possibly a reference module.
        backend: what the fast modules shall run, as in their constructors.
        cuda_graph: whether the RRUs shall run as CUDA graphs, as in their constructor.

    Returns:
        The same `model`. Warns if there was nothing to swap.

    Raises:
        ValueError: the backend is unknown or cannot serve here, or runs no CUDA graphs.

    >>> import rru_fast
    >>> model = rru_fast.accelerate(rru_fast.reference.RRU(16, spatial=(4, 2)))
    >>> type(model) is rru_fast.RRU, type(rru_fast.restore(model)) is rru_fast.reference.RRU
    (True, True)
    """
    modules.check_cuda_graph(cuda_graph, backend)
    targets = [module for module in model.modules() if type(module) in FAST or _accelerated(module)]
    if not targets:
        warnings.warn(f"accelerate: {type(model).__name__} holds no reference module to swap", stacklevel=2)
    for module in targets:
        if not _accelerated(module):
            module._accelerated_from = type(module)  # type: ignore[assignment]
            module.__class__ = FAST[type(module)]
        if isinstance(module, reference.RRU):
            module._choose_backend(backend, cuda_graph)
        elif isinstance(module, reference.BatchHardTripletLoss):
            module._choose_backend(backend)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`: every module it swapped is a reference module again, with the weights it has now.

    Args:
        model: any module; fast modules that were built as such stay fast.

    Returns:
        The same `model`. Warns if there was nothing to restore.
    """
    targets = [module for module in model.modules() if _accelerated(module)]
    if not targets:
        warnings.warn(f"restore: {type(model).__name__} holds no accelerated module", stacklevel=2)
    for module in targets:
        module.__class__ = module.__dict__.pop("_accelerated_from")
        for name in ("backend", "cuda_graph", "_graphs"):
            module.__dict__.pop(name, None)
    return model


def _accelerated(module: nn.Module) -> bool:
    return "_accelerated_from" in module.__dict__
