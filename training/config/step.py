"""How a training step is computed, apart from what it computes: precision, memory layout, compiler, graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch.amp.grad_scaler import GradScaler

from training.config.recipe import Recipe
from training.model.network import Network
from training.model.operators import Ops
from training.runtime.errors import UserError

Amp = Literal["off", "bfloat16", "float16"]


@dataclass(frozen=True)
class Speed:
    """The switches; all off, a step is float32 and eager.

    amp: dtype of autocast, for the forward and the losses; float16 brings gradient scaling with it.
    channels_last: whether frames and the backbone's weights lie channels last.
    compile_backbone: whether the backbone's forward and backward are compiled by torch.compile.
    cuda_graph: whether the RRU runs as CUDA graphs.

    Raises:
        UserError: a switch has no such setting.
    """

    amp: Amp = "off"
    channels_last: bool = False
    compile_backbone: bool = False
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        if self.amp not in get_args(Amp):
            raise UserError(f"amp: got {self.amp!r}, wanted one of {', '.join(get_args(Amp))}")
        for name in ("channels_last", "compile_backbone", "cuda_graph"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}: got {getattr(self, name)!r}, wanted True or False")

    def check(self, device: torch.device, ops: Ops, recipe: Recipe) -> None:
        """Raise a UserError where a switch has nothing to act on, or would compute something else.

        Args:
            device: where to compute.
            ops: which operators.
            recipe: what is trained.
        """
        if (self.amp, device.type, recipe.head, recipe.frames) == ("bfloat16", "cpu", "stim", 2):
            # oneDNN's weight gradient of a 3x3x3 convolution is wrong there, as of PyTorch 2.11.
            raise UserError(
                "amp: got 'bfloat16' on a CPU for clips of 2 frames with STIM, wanted more frames, or 'off'"
            )
        if not self.cuda_graph:
            return
        if device.type != "cuda":
            raise UserError(f"cuda_graph: got True on device {device.type!r}, wanted a CUDA device")
        if ops != "fast" or recipe.rru == "none":
            raise UserError(f"cuda_graph: got True with ops={ops!r}, rru={recipe.rru!r}, wanted an RRU of ops='fast'")

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context of a forward and its losses."""
        dtype = torch.float16 if self.amp == "float16" else torch.bfloat16
        return torch.autocast(device.type, dtype=dtype, enabled=self.amp != "off")

    def scaler(self, device: torch.device) -> GradScaler:
        """What keeps float16 gradients from vanishing; in another dtype it does nothing."""
        return GradScaler(device.type, enabled=self.amp == "float16")

    def prepare(self, network: Network) -> None:
        """Lay out and compile a network's backbone, in place; the names in its state_dict stay."""
        network.backbone.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        if self.compile_backbone:
            network.backbone.compile()

    @property
    def memory_format(self) -> torch.memory_format:
        """How frames and the backbone's weights are stored."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def changed(self) -> list[str]:
        """What is otherwise than in a plain step, each as "switch setting (was)"."""
        now = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return [f"{name} {value} ({was})" for name, (value, was) in now.items() if value != was]


PLAIN = Speed()


@contextmanager
def as_evaluated(network: Network) -> Iterator[None]:
    """Have a network run eager and ungraphed inside the block, as one that is only evaluated does.

    Tracklets differ in length: nearly every batch would be compiled, or captured, anew.
    """
    graphed = [module for module in network.modules() if getattr(module, "cuda_graph", False)]
    for module in graphed:
        vars(module)["cuda_graph"] = False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in graphed:
            vars(module)["cuda_graph"] = True
