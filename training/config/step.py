"""Options of a training step that leave what it computes: operators, precision, layout, compiler, graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch.amp.grad_scaler import GradScaler

from training.config.recipe import Recipe
from training.model.network import Network
from training.model.operators import Ops
from training.runtime.errors import UserError
from training.runtime.fields import Config, Switch, differing


@dataclass(frozen=True)
class StepConfig(Config):
    """The step.

    Raises:
        UserError: an option has no such value.
    """

    ops: Ops = "fast"
    """The library's operators, or their plain PyTorch twins (reference)."""
    amp: Literal["off", "bfloat16", "float16"] = "off"
    """Autocast of the forward and the losses to a 16-bit dtype; float16 scales the gradients."""
    channels_last: Switch = False
    """Store frames and the backbone's weights channels last."""
    compile_backbone: Switch = False
    """Run the backbone through torch.compile; that takes minutes at the start."""
    cuda_graph: Switch = False
    """Run the RRU as CUDA graphs, on a GPU."""
    sync_bn: bool = False
    """Share batch statistics between all processes, in every batch norm."""

    def check(self, device: torch.device, recipe: Recipe) -> None:
        """Raise a UserError where a switch has nothing to act on.

        Args:
            device: where to compute.
            recipe: the training.
        """
        if not self.cuda_graph:
            return
        if device.type != "cuda":
            raise UserError(f"cuda_graph: got True on device {device.type!r}, wanted a CUDA device")
        if self.ops != "fast" or recipe.model.rru == "none":
            got = f"ops={self.ops!r}, rru={recipe.model.rru!r}"
            raise UserError(f"cuda_graph: got True with {got}, wanted an RRU of ops='fast'")

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context of a forward and its losses."""
        dtype = torch.float16 if self.amp == "float16" else torch.bfloat16
        return torch.autocast(device.type, dtype=dtype, enabled=self.amp != "off")

    def scaler(self, device: torch.device) -> GradScaler:
        """Return the scaler of float16 gradients; in another dtype it does nothing."""
        return GradScaler(device.type, enabled=self.amp == "float16")

    def prepare(self, network: Network) -> None:
        """Lay out and compile a network's backbone, in place; the names in its state_dict stay."""
        network.backbone.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        if self.compile_backbone:
            network.backbone.compile()

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of frames and of the backbone's weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def diff_from_eager(self) -> list[str]:
        """List the differences from an eager float32 step, each as "switch setting (was)"; the operators are none."""
        eager = StepConfig(ops=self.ops)
        return [f"{name} {now} ({before})" for name, (before, now) in differing(eager, self).items()]


EAGER_FP32 = StepConfig()


@contextmanager
def eager_mode(network: Network) -> Iterator[None]:
    """Run a network eager and ungraphed inside the block, as one that is only evaluated does.

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
