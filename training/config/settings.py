"""Everything that a run's figures depend on, but for the machine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from training.config.presets import QUICK
from training.config.recipe import Recipe
from training.config.step import StepConfig
from training.data.config import SourceConfig
from training.runtime.atomic_files import realpath
from training.runtime.errors import UserError
from training.runtime.fields import Config


@dataclass(frozen=True)
class Settings(Config):
    """A run's settings: the recipe, the data, the step.

    Raises:
        UserError: an option has no such value.
    """

    recipe: Recipe = QUICK
    split: int = 0
    """Index of the dataset's split."""
    source: SourceConfig = field(default_factory=SourceConfig)
    step: StepConfig = field(default_factory=StepConfig)

    def validate(self) -> None:
        groups = self.recipe.model.bn_groups
        if self.step.sync_bn and groups > 1:
            raise UserError(f"sync_bn: got True with bn_groups={groups}, wanted one or the other")

    def clamp_identities(self, identities: int) -> Settings:
        """Return these, with P lowered to the identities to train on, where the recipe allows that."""
        batch = self.recipe.batch
        if batch.strict_people or identities >= batch.people or identities < 2:
            return self
        return replace(self, recipe=replace(self.recipe, batch=replace(batch, people=identities)))

    def absolute(self) -> Settings:
        """Return these with absolute paths: a run may be continued from another working folder."""
        root, weights = self.source.data_root, self.recipe.model.weights
        if weights not in ("imagenet", "random"):
            weights = str(realpath(Path(weights)))
        return replace(
            self,
            recipe=replace(self.recipe, model=replace(self.recipe.model, weights=weights)),
            source=replace(self.source, data_root=None if root is None else realpath(root)),
        )
