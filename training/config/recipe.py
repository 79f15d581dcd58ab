"""A recipe: everything that decides a training run, but for the data's place and the machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tyro.conf import Fixed, Suppress

from training.config.optim import OptimConfig
from training.data.config import BatchConfig, DataConfig
from training.evaluation.config import EvalConfig
from training.model.config import LossConfig, ModelConfig
from training.runtime.errors import UserError
from training.runtime.fields import Config, check_count


@dataclass(frozen=True)
class Recipe(Config):
    """The training; where the paper and its authors' code differ, each difference is an option, to be switched alone.

    Raises:
        UserError: a number is out of range, or the parts do not go together.
    """

    name: Suppress[Fixed[str]] = "paper"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    epochs: int = 900
    """Passes over the sampler; the paper gives no number, its authors' code trains for 900."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 0
    """Decides initial weights, order of the data and dropout."""

    def validate(self) -> None:
        check_count("epochs", self.epochs)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed: got {self.seed}, wanted 0 to {2**32 - 1}")
        if self.loss.part_loss and self.model.rru == "none":
            raise UserError("part_loss: got True with rru='none', wanted an RRU: the strips come out of it")
        clips, groups = self.batch.people * self.batch.clips, self.model.bn_groups
        if clips % groups:
            raise UserError(f"bn_groups: got {groups}, which does not divide {clips} clips")
        if clips == groups:
            raise UserError(
                f"bn_groups: got {groups} for {clips} clips, wanted at least 2 clips a group: "
                "the classifier's batch norm has no statistics of one"
            )

    @property
    def preset(self) -> Literal["paper", "official"]:
        """The origin of the values that options start from, the paper or its authors' code, as a result shows it."""
        return "official" if self.name == "official" else "paper"
