"""Options of the optimizer; the defaults are the paper's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from training.runtime.errors import UserError
from training.runtime.fields import Config, check_count


@dataclass(frozen=True)
class OptimConfig(Config):
    """SGD with Nesterov momentum 0.9, and how its learning rates change from epoch to epoch.

    Raises:
        UserError: an option has no such value, or a number is out of range.
    """

    learning_rate: float = 0.01
    """Of layers that start at random."""
    learning_rate_pretrained: float = 0.001
    """Of layers that come out of a weights file."""
    weight_decay: float = 5e-4
    """On every parameter, norms and biases too."""
    schedule: Literal["none", "cosine", "step"] = "none"
    """Decay of the learning rates: none, to 0 along half a cosine, or by step_factor every step_epochs."""
    warmup_epochs: int = 0
    """Epochs at the beginning over which the learning rates rise linearly."""
    step_epochs: int = 300
    """Epochs between the steps of schedule step."""
    step_factor: float = 0.1
    """Factor of each step of schedule step."""

    def validate(self) -> None:
        for name, value in (
            ("learning_rate", self.learning_rate),
            ("learning_rate_pretrained", self.learning_rate_pretrained),
            ("weight_decay", self.weight_decay),
            ("step_factor", self.step_factor),
        ):
            if not 0 <= value < math.inf:
                raise UserError(f"{name}: got {value}, wanted a number, at least 0")
        check_count("warmup_epochs", self.warmup_epochs, 0)
        check_count("step_epochs", self.step_epochs)

    def rate_factor(self, epoch: int, epochs: int) -> float:
        """Return the factor on both learning rates in an epoch, from the epoch's number alone.

        Args:
            epoch: epochs completed before it, from 0.
            epochs: of the whole run.
        """
        warmup = min(1.0, (epoch + 1) / (self.warmup_epochs + 1))
        after = max(0, epoch - self.warmup_epochs)
        match self.schedule:
            case "cosine":
                length = max(1, epochs - self.warmup_epochs)
                return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, after / length)))
            case "step":
                return warmup * self.step_factor ** (after // self.step_epochs)
        return warmup
