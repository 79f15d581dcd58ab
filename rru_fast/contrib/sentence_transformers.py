"""Batch-hard triplet losses as classes of sentence-transformers, 5.0 or newer, which must be installed.

>>> import torch
>>> from rru_fast.contrib.sentence_transformers import BatchHardTripletLoss
>>> model = torch.nn.Identity()  # a SentenceTransformer
>>> loss = BatchHardTripletLoss(model, margin=0.5)
>>> loss([{"sentence_embedding": torch.eye(4)}], torch.tensor([0, 0, 1, 1]))
tensor(0.5000)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rru_fast import backends, checks, functional
from rru_fast.compat.loss_form import AT_FLOOR, label_codes
from rru_fast.types import Metric

try:
    from sentence_transformers import SentenceTransformer
except ModuleNotFoundError as error:
    if error.name != "sentence_transformers":
        raise
    raise ImportError(
        "rru_fast.contrib.sentence_transformers: got no sentence-transformers, wanted it installed: "
        "pip install sentence-transformers"
    ) from error
try:
    from sentence_transformers.sentence_transformer import losses
except ModuleNotFoundError as error:
    if error.name != "sentence_transformers.sentence_transformer":
        raise
    from sentence_transformers import losses  # their place before 5.4

__all__ = ["BatchHardSoftMarginTripletLoss", "BatchHardTripletLoss"]
EUCLIDEAN = losses.BatchHardTripletLossDistanceFunction.eucledian_distance  # spelled so in every version
COSINE = losses.BatchHardTripletLossDistanceFunction.cosine_distance


def metric_of(distance_metric: Any) -> Metric:
    """Return the operator's name of a distance of sentence-transformers.

    Raises:
        ValueError: the operator does not have it.
    """
    if distance_metric is EUCLIDEAN:
        return "euclidean"
    if distance_metric is COSINE:
        return "cosine"
    name = getattr(distance_metric, "__name__", repr(distance_metric))
    raise ValueError(
        f"distance_metric: got {name}, wanted BatchHardTripletLossDistanceFunction's eucledian_distance or "
        "cosine_distance"
    )


def distance_gaps(loss: Any, labels: Tensor, embeddings: Tensor) -> Tensor:
    """Return D_pos - D_neg of every anchor, (N,), for a loss with `distance_metric` and `backend`.

    16-bit embeddings are compared in float32.
    """
    metric = metric_of(loss.distance_metric)
    if embeddings.dim() != 2:
        raise ValueError(f"embeddings: got shape {tuple(embeddings.shape)}, wanted (N, D)")
    features = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    options: dict[str, Any] = {"reduction": "none", "return_indices": True, "return_distances": True}
    _, d_pos, d_neg, _, negative = functional.batch_hard_triplet(
        features, label_codes(labels, features), metric=metric, backend=loss.backend, **options
    )
    if metric == "euclidean":
        d_pos, d_neg = (torch.where(d <= AT_FLOOR, 0, d) for d in (d_pos, d_neg))
    return d_pos - torch.where(negative < 0, d_pos, d_neg)


class BatchHardTripletLoss(losses.BatchHardTripletLoss):  # type: ignore[misc]
    """sentence-transformers' `BatchHardTripletLoss` on `rru_fast.batch_hard_triplet`, without the N x N matrix.

    Mean over anchors of max(D_pos - D_neg + margin, 0), D_pos the distance to the farthest positive, 0 without one,
    D_neg to the nearest negative, D_pos without one.

    Args:
        model: a `SentenceTransformer`.
        distance_metric: `BatchHardTripletLossDistanceFunction.eucledian_distance` or `cosine_distance`. Read at every
            call.
        margin: a number. Read at every call, as `triplet_margin`.
        backend: "auto", or a backend that `rru_fast.show_config` lists as available.

    forward(sentence_features, labels) takes what a `SentenceTransformerTrainer` passes, labels (N,) or (N, 1) of any
    real dtype, and returns the loss, in float64 for float64 embeddings, else in float32.

    Euclidean distances up to 1e-6 count as 0. An embedding of zeros is at cosine distance 1 from itself: without a
    positive its D_pos is 1, where theirs is 0; without a negative its D_neg is D_pos, where theirs is D_pos + 1.

    Raises:
        ValueError: `distance_metric` is another; `margin` is not a finite number; `backend` is not available;
            embeddings are not (N, D); labels are not N.
        RuntimeError: for second-order gradients, forward-mode AD and torch.func.grad (use backend="reference").
    """

    def __init__(
        self, model: SentenceTransformer, distance_metric: Any = EUCLIDEAN, margin: float = 5, *, backend: str = "auto"
    ) -> None:
        metric_of(distance_metric)
        checks.check_number("margin", margin, -checks.FINITE, checks.FINITE, "a finite number")
        backends.check_backend(backend)
        super().__init__(model, distance_metric, margin)
        self.backend = backend

    def batch_hard_triplet_loss(self, labels: Tensor, embeddings: Tensor) -> Tensor:
        """Return the loss of embeddings (N, D); `forward` calls it."""
        violation: Tensor = distance_gaps(self, labels, embeddings) + self.triplet_margin
        # Not relu, nor clamp, whose gradient at 0 is 0 (clamp's as of PyTorch 2.14): theirs is 1.
        return torch.where(violation < 0, 0, violation).mean()


class BatchHardSoftMarginTripletLoss(losses.BatchHardSoftMarginTripletLoss):  # type: ignore[misc]
    """sentence-transformers' `BatchHardSoftMarginTripletLoss` on the operator: the mean of softplus(D_pos - D_neg).

    Arguments, inputs and errors are those of `BatchHardTripletLoss`; it has no margin.
    """

    def __init__(self, model: SentenceTransformer, distance_metric: Any = EUCLIDEAN, *, backend: str = "auto") -> None:
        metric_of(distance_metric)
        backends.check_backend(backend)
        super().__init__(model, distance_metric)
        self.backend = backend

    def batch_hard_triplet_soft_margin_loss(self, labels: Tensor, embeddings: Tensor) -> Tensor:
        """Return the loss of embeddings (N, D); `forward` calls it."""
        return F.softplus(distance_gaps(self, labels, embeddings)).mean()
