"""Options of the evaluations during training; the defaults are the paper's."""

from __future__ import annotations

from dataclasses import dataclass

from training.runtime.fields import Config, Switch, check_count


@dataclass(frozen=True)
class EvalConfig(Config):
    """When to evaluate, and what to measure at the end; a run that is continued may change it.

    Raises:
        UserError: an option has no such value, or a number is out of range.
    """

    eval_every: int | None = 20
    """Epochs between evaluations; None for before and after training only."""
    eval_from: int = 0
    """The first epoch that eval_every counts from."""
    compare_ops: Switch = False
    """End by timing a step with the library's operators against one with their plain PyTorch twins."""

    def validate(self) -> None:
        check_count("eval_every", self.eval_every)
        check_count("eval_from", self.eval_from, 0)

    def is_due(self, epoch: int, epochs: int) -> bool:
        """Return True if an evaluation is due after so many epochs; at 0 and at the end of training one always is."""
        since = epoch - self.eval_from
        between = self.eval_every is not None and since >= 0 and since % self.eval_every == 0
        return between or epoch in (0, epochs)
