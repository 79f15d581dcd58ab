"""Interface of reid-strong-baseline's triplet loss, and of TransReID, CLIP-ReID, SOLIDER and others built on it."""

from __future__ import annotations

from torch import Tensor, nn

from rru_fast import backends
from rru_fast.checks import FINITE, check_dense, check_flags, check_number
from rru_fast.compat.loss_form import Formula, label_codes, widened


class TripletLoss(nn.Module):
    """Batch-hard triplet loss of eq. 8 with the arguments and return values of reid-strong-baseline's `TripletLoss`.

    In place of `from .triplet_loss import TripletLoss`. `rru_fast.accelerate` swaps objects of the original class.

    Args:
        margin: a number, or None for the soft margin, softplus(D_pos - D_neg).
        hard_factor: h, which makes the distances (1 + h) D_pos and (1 - h) D_neg, as in TransReID.
        backend: "auto", or a backend that `rru_fast.show_config` lists as available.

    forward(global_feat, labels, normalize_feature=False) takes features (N, D) and labels (N,) or (N, 1), integers,
    floats or bools, and returns (loss, dist_ap, dist_an): the mean over anchors, and each anchor's distances to its
    farthest positive and nearest negative, (N,), with gradients. With `normalize_feature` features are divided by their
    norm plus 1e-12 first. Identities may have different numbers of features.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it wanted.
        RuntimeError: for second-order gradients, forward-mode AD and torch.func.grad (use backend="reference").

    >>> import torch
    >>> loss, dist_ap, dist_an = TripletLoss(0.3)(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 1]))
    >>> loss, dist_ap, dist_an
    (tensor(0.), tensor([1.0000e+00, 1.0000e+00, 1.0000e-06]), tensor([3., 2., 2.]))
    """

    def __init__(self, margin: float | None = None, hard_factor: float = 0.0, *, backend: str = "auto") -> None:
        super().__init__()
        if margin is not None:
            check_number("margin", margin, -FINITE, FINITE, "a finite number or None")
        check_number("hard_factor", hard_factor, -FINITE, FINITE, "a finite number")
        backends.check_backend(backend)
        self.margin, self.hard_factor, self.backend = margin, hard_factor, backend

    def forward(self, global_feat: Tensor, labels: Tensor, normalize_feature: bool = False) -> tuple[Tensor, ...]:
        """Return (loss, dist_ap, dist_an)."""
        check_dense("global_feat", global_feat, "(N, D)")
        check_dense("labels", labels, "(N,) or (N, 1)")
        if global_feat.dim() != 2:
            raise ValueError(f"global_feat: got shape {tuple(global_feat.shape)}, wanted (N, D)")
        n = len(global_feat)
        if labels.shape not in ((n,), (n, 1)):
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, wanted ({n},) or ({n}, 1), one per feature")
        check_flags(normalize_feature=normalize_feature)
        formula = Formula(
            metric="euclidean",
            norm="added" if normalize_feature else "none",
            kind="soft" if self.margin is None else "hinge",
            margin=self.margin or 0.0,
            factors=(1 + self.hard_factor, 1 - self.hard_factor),
            scale=1.0,
            reduction="mean",
            returns=tuple,
            extras=("d_pos", "d_neg"),
        )
        found: tuple[Tensor, ...] = formula(
            widened(global_feat), label_codes(labels, global_feat), mask=None, backend=self.backend
        )
        return found

    def extra_repr(self) -> str:
        return f"margin={self.margin!r}, hard_factor={self.hard_factor!r}, backend={self.backend!r}"
