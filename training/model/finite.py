"""Find the first module of a forward whose output is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook

FRAMES = "the frames"


@torch.no_grad()
def first_not_finite(network: nn.Module, clips: Tensor) -> str | None:
    """Run a forward again, eager, and name the first of its modules that puts out infinity or NaN.

    It draws on the random generators, as dropout does, and leaves the network as it was, running statistics too.
    Where batch norms synchronize, every rank has to call it.

    Args:
        network: in the mode that is in question.
        clips: what it was given; under autocast, call this under the same.

    Returns:
        The module's name as in `named_modules`, by order of execution: of a module and one inside it, the inner one.
        "the frames" where these are not finite to begin with; `None` where all outputs are finite.
    """
    names = {module: name for name, module in network.named_modules()}
    found = [] if clips.isfinite().all() else [FRAMES]

    def look(module: nn.Module, _: Any, output: Any) -> None:
        if not found and module in names and not all(tensor.isfinite().all() for tensor in _tensors(output)):
            found.append(names[module] or type(module).__name__)

    handle = register_module_forward_hook(look)
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code calls no hook
            functional_call(network, {name: buffer.clone() for name, buffer in network.named_buffers()}, (clips,))
    finally:
        handle.remove()
    return found[0] if found else None


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of an output that is one, or a tuple of outputs, named or not; what is neither has none."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple):
        for part in output:
            yield from _tensors(part)
