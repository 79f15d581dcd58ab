"""Batch-hard mining and triplet loss as classes of pytorch-metric-learning (pml), which must be installed.

>>> import torch
>>> from rru_fast.contrib.pml import BatchHardTripletLoss
>>> loss = BatchHardTripletLoss(margin=0.5)
>>> loss(torch.eye(4), torch.tensor([0, 0, 1, 1]))
tensor(0.5000)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rru_fast import backends, checks, functional
from rru_fast.compat.loss_form import AT_FLOOR
from rru_fast.types import Metric

try:
    from pytorch_metric_learning import losses, miners
    from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
    from pytorch_metric_learning.reducers import AvgNonZeroReducer
    from pytorch_metric_learning.utils import common_functions, loss_and_miner_utils
except ModuleNotFoundError as error:
    if error.name != "pytorch_metric_learning":
        raise
    raise ImportError(
        "rru_fast.contrib.pml: got no pytorch-metric-learning, wanted it installed: pip install pytorch-metric-learning"
    ) from error

__all__ = ["BatchHardMiner", "BatchHardTripletLoss"]

Triplets = tuple[Tensor, Tensor, Tensor]
"""Anchors, positives and negatives, int64 (A,) each."""


class Hardest(NamedTuple):
    """Hardest triplets of the A anchors that have a positive and a negative.

    triplets: the anchors, ascending, and their partners.
    d_pos, d_neg: distances (A,), with gradients; 1 - similarity for `CosineSimilarity`.
    losses: the operator's (A,); None where its distances differ from pml's.
    """

    triplets: Triplets
    d_pos: Tensor
    d_neg: Tensor
    losses: Tensor | None


def metric_of(distance: Any) -> Metric:
    """Return the operator's name of a distance of pml.

    Raises:
        ValueError: the operator does not have it.
    """
    p, power = getattr(distance, "p", None), getattr(distance, "power", None)
    if p == 2 and power == 1:
        # Not by isinstance: a subclass may compute another distance.
        if type(distance) is LpDistance:
            return "euclidean"
        if type(distance) is CosineSimilarity and distance.normalize_embeddings:
            return "cosine"
    raise ValueError(
        f"distance: got {type(distance).__name__} with p={p}, power={power}, "
        "wanted LpDistance or CosineSimilarity with p=2, power=1"
    )


def is_served(embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor | None) -> bool:
    """Return True if the operator mines as pml does.

    Other embeddings under the very same labels are the anchors' counterparts, row by row, and pml then leaves out an
    anchor's own.
    """
    return ref_labels is not None and (ref_labels is not labels or ref_emb is embeddings)


def find_hardest(
    distance: Any,
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor,
    ref_labels: Tensor,
    margin: Any,
    backend: str,
) -> Hardest:
    """Find the hardest triplets of embeddings (N, D) with labels (N,), and their losses, by one call of the operator.

    Positives and negatives are among `ref_emb` (M, D) with `ref_labels` (M,); an anchor is not its own positive if
    these are the embeddings and labels themselves. 16-bit embeddings are normalized and compared in float32.
    """
    own = ref_emb is embeddings and ref_labels is labels
    distance.check_shapes(embeddings, None if own else ref_emb)
    metric = metric_of(distance)
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, ref_emb.dtype), torch.float32)
    features = embeddings.to(dtype)
    candidates = features if own else ref_emb.to(dtype)
    if metric == "euclidean" or distance.collect_stats:
        normalized = distance.maybe_normalize(features)
        normalized_candidates = normalized if own else distance.maybe_normalize(candidates)
        distance.set_default_stats(features, candidates, normalized, normalized_candidates)
        features, candidates = normalized, normalized_candidates
    labels, ref_labels = _as_integers(labels, labels if own else ref_labels)
    options: dict[str, Any] = {} if own else {"gallery": candidates, "gallery_labels": ref_labels}
    options |= {"reduction": "none", "return_indices": True, "return_distances": True}
    loss, d_pos, d_neg, positive, negative = functional.batch_hard_triplet(
        features, labels, margin=margin, metric=metric, backend=backend, **options
    )
    anchor = torch.arange(len(labels), device=labels.device)
    exact = positive != anchor if own else positive >= 0
    if metric == "euclidean":
        exact &= (d_pos > AT_FLOOR) & (d_neg > AT_FLOOR)
    if bool((exact & (negative >= 0)).all()):
        return Hardest((anchor, positive, negative), d_pos, d_neg, loss)
    if own:
        # The operator counts an anchor among its positives: it finds it where there is no other, or none farther.
        positive = torch.where(positive == anchor, _another_of_its_label(labels, anchor), positive)
    kept = ((positive >= 0) & (negative >= 0)).nonzero()[:, 0]
    triplets = kept, positive[kept], negative[kept]
    if bool(exact[kept].all()):
        return Hardest(triplets, d_pos[kept], d_neg[kept], loss[kept])
    a, p, n = features[triplets[0]], candidates[triplets[1]], candidates[triplets[2]]
    if metric == "cosine":
        a, p, n = F.normalize(a), F.normalize(p), F.normalize(n)
        return Hardest(triplets, 1 - (a * p).sum(1), 1 - (a * n).sum(1), None)
    return Hardest(triplets, torch.linalg.vector_norm(a - p, dim=1), torch.linalg.vector_norm(a - n, dim=1), None)


def _as_integers(labels: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Number labels that are not integers; equal ones have one number."""
    if not any(y.is_floating_point() or y.dtype == torch.bool for y in (labels, ref_labels)):
        return labels, ref_labels
    if ref_labels is labels:
        labels = torch.unique(labels, return_inverse=True)[1]
        return labels, labels
    numbers = torch.unique(torch.cat((labels, ref_labels)), return_inverse=True)[1]
    return numbers[: len(labels)], numbers[len(labels) :]


def _another_of_its_label(labels: Tensor, anchor: Tensor) -> Tensor:
    """Return per anchor the index of another feature of its label, -1 where there is none."""
    _, label = torch.unique(labels, return_inverse=True)
    first = torch.full_like(anchor, len(anchor)).scatter_reduce(0, label, anchor, "amin")[label]
    last = torch.zeros_like(anchor).scatter_reduce(0, label, anchor, "amax")[label]
    return torch.where(first == anchor, last, first).masked_fill(first == last, -1)


class BatchHardMiner(miners.BatchHardMiner):  # type: ignore[misc]
    """pml's `BatchHardMiner` on `rru_fast.batch_hard_triplet`: the same triplets, without the matrix of distances.

    Args:
        distance: `LpDistance` (p=2, power=1, normalizing or not) or `CosineSimilarity`; `LpDistance()` if None. Read at
            every call.
        allowed_pos_range, allowed_neg_range: as in pml. With one of them mining is pml's own, in plain PyTorch.
        collect_stats: as in pml. Records `hardest_triplet`, `hardest_pos_pair` and the like.
        backend: "auto", or a backend that `rru_fast.show_config` lists as available.

    forward(embeddings, labels, ref_emb=None, ref_labels=None) takes embeddings (N, D), float64, float32, float16 or
    bfloat16, and labels (N,) of any real dtype, and returns the indices of anchors, positives and negatives, int64
    (A,) each, in the order of the anchors. Anchors without a positive or without a negative are left out; an anchor is
    never its own positive. Of equal distances either may be returned. With other embeddings as `ref_emb`, (M, D),
    positives and negatives are mined there, in O((N + M) D) memory; under the very same labels as embeddings, of which
    pml leaves out an anchor's own row, by pml in plain PyTorch.

    Raises:
        ValueError: `distance` is another; `backend` is not available; embeddings are not (N, D).
    """

    def __init__(
        self,
        *,
        distance: Any = None,
        allowed_pos_range: tuple[float, float] | None = None,
        allowed_neg_range: tuple[float, float] | None = None,
        collect_stats: bool | None = None,
        backend: str = "auto",
    ) -> None:
        ranges = {"allowed_pos_range": allowed_pos_range, "allowed_neg_range": allowed_neg_range}
        super().__init__(distance=distance, collect_stats=collect_stats, **ranges)
        metric_of(self.distance)
        backends.check_backend(backend)
        self.backend = backend

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Triplets:
        """Return anchors, positives and negatives; `forward` calls it."""
        in_range = self.allowed_pos_range is not None or self.allowed_neg_range is not None
        if in_range or not is_served(embeddings, labels, ref_emb, ref_labels):
            found: Triplets = super().mine(embeddings, labels, ref_emb, ref_labels)
            return found
        hardest = find_hardest(self.distance, embeddings, labels, ref_emb, ref_labels, 0.0, self.backend)
        if self.distance.is_inverted:
            self.set_stats(1 - hardest.d_pos, 1 - hardest.d_neg)
        else:
            self.set_stats(hardest.d_pos, hardest.d_neg)
        return hardest.triplets


class BatchHardTripletLoss(losses.BaseMetricLossFunction):  # type: ignore[misc]
    """pml's `TripletMarginLoss` on the triplets of its `BatchHardMiner`, by one call of `rru_fast.batch_hard_triplet`.

    Per anchor relu(D_pos - D_neg + margin), D_pos the distance to its farthest positive, itself excluded, D_neg to its
    nearest negative; anchors without a positive or without a negative are left out.

    Args:
        margin: a number.
        smooth_loss: softplus(D_pos - D_neg + margin) instead.
        distance: `LpDistance` (p=2, power=1, normalizing or not) or `CosineSimilarity`, of which D is the negative;
            `LpDistance()`, which normalizes, if None. Read at every call.
        reducer: as in pml; `AvgNonZeroReducer()` if None.
        embedding_regularizer, embedding_reg_weight, collect_stats: as in pml.
        backend: "auto", or a backend that `rru_fast.show_config` lists as available.

    forward(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None) takes embeddings (N, D), float64,
    float32, float16 or bfloat16, and labels (N,) of any real dtype, and returns the reduced loss. With `ref_emb`,
    (M, D), hardest positives and negatives are mined there. The operator serves calls without `indices_tuple`, in
    O((N + M) D) memory: the losses have embeddings' dtype, under autocast at least float32. In plain PyTorch, from the
    N x M matrix of `distance`:

    - With `indices_tuple`, triplets or pairs of a miner, the loss is that of pml's `TripletMarginLoss` on them. So it
      is in `CrossBatchMemory`, which passes all pairs where it has no miner.
    - With `ref_emb` under the very same labels as embeddings, of which pml leaves out an anchor's own row, hardest
      positives and negatives are mined by pml.

    Raises:
        ValueError: `margin` is not a finite number; `distance` is another; `backend` is not available; neither labels
            nor indices are given; embeddings are not (N, D).
        TypeError: `smooth_loss` is not True or False.
        RuntimeError: for second-order gradients, forward-mode AD and torch.func.grad (use backend="reference").
    """

    def __init__(
        self,
        margin: float = 0.05,
        *,
        smooth_loss: bool = False,
        distance: Any = None,
        reducer: Any = None,
        embedding_regularizer: Any = None,
        embedding_reg_weight: float = 1,
        collect_stats: bool | None = None,
        backend: str = "auto",
    ) -> None:
        checks.check_number("margin", margin, -checks.FINITE, checks.FINITE, "a finite number")
        checks.check_flags(smooth_loss=smooth_loss)
        backends.check_backend(backend)
        super().__init__(
            distance=distance,
            reducer=reducer,
            embedding_regularizer=embedding_regularizer,
            embedding_reg_weight=embedding_reg_weight,
            collect_stats=collect_stats,
        )
        metric_of(self.distance)
        self.margin, self.smooth_loss, self.backend = margin, smooth_loss, backend
        self.add_to_recordable_attributes(list_of_names=["margin"], is_stat=False)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """Return the loss of every triplet, for a reducer; `forward` calls it."""
        common_functions.labels_or_indices_tuple_required(labels, indices_tuple)
        if indices_tuple is not None or labels is None or ref_labels is None:
            mined = None
        else:
            mined = self._mined_losses(embeddings, labels, ref_emb, ref_labels)
        triplets, per_triplet = mined or self._given_losses(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if len(triplets[0]) == 0:
            zero: dict[str, dict[str, Any]] = self.zero_losses()
            return zero
        return {"loss": {"losses": per_triplet, "indices": triplets, "reduction_type": "triplet"}}

    def _mined_losses(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> tuple[Triplets, Tensor] | None:
        """Return triplets and losses by the operator, None if it does not mine as pml does."""
        if not is_served(embeddings, labels, ref_emb, ref_labels):
            return None
        # softplus is linear from 20 on, in PyTorch with gradient 1; the operator's gradient is sigmoid everywhere.
        # Distances of normalized embeddings stay below.
        soft = self.smooth_loss and self.margin == 0 and self.distance.normalize_embeddings
        margin = "soft" if soft else self.margin
        hardest = find_hardest(self.distance, embeddings, labels, ref_emb, ref_labels, margin, self.backend)
        per_triplet = hardest.losses
        if per_triplet is None or self.smooth_loss != soft:
            per_triplet = self._losses(hardest.d_pos - hardest.d_neg)
        # In 16 bits a GradScaler's first scale, 2^16, would overflow in the loss's gradient.
        keep_wide = torch.is_autocast_enabled(embeddings.device.type)
        return hardest.triplets, per_triplet if keep_wide else per_triplet.to(embeddings.dtype)

    def _given_losses(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> tuple[Triplets, Tensor]:
        if indices_tuple is None:
            miner = miners.BatchHardMiner(distance=self.distance)
            indices_tuple = miner(embeddings, labels, ref_emb, ref_labels)
        anchor, positive, negative = loss_and_miner_utils.convert_to_triplets(indices_tuple, labels, ref_labels)
        distances = self.distance(embeddings, ref_emb)
        gap = self.distance.margin(distances[anchor, positive], distances[anchor, negative])
        return (anchor, positive, negative), self._losses(gap)

    def _losses(self, gap: Tensor) -> Tensor:
        violation = gap + self.margin
        return F.softplus(violation) if self.smooth_loss else F.relu(violation)

    def get_default_reducer(self) -> Any:
        """Return pml's default reducer of `TripletMarginLoss`: the mean over losses above 0."""
        return AvgNonZeroReducer()

    def _get_name(self) -> str:
        return type(self).__qualname__.rpartition(".")[2]


# CrossBatchMemory and SelfSupervisedLoss accept a loss by its class's name, from a list of pml's own.
BatchHardTripletLoss.__name__ = "TripletMarginLoss"
