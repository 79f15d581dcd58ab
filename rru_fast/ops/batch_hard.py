"""rru_fast::batch_hard, eq. 8 and 10 an anchor at a time; the mean is left to the caller."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rru_fast.composite import batch_hard as composite
from rru_fast.ops._registration import choose, forbid_second_order, kernels, without_autocast

KERNELS = kernels("batch_hard", composite)


@torch.library.custom_op("rru_fast::batch_hard", mutates_args=())
def batch_hard(
    features: Tensor, labels: Tensor, margin: float, soft: bool, metric: str, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """features (G, N, D) to loss, d_pos, d_neg (float32 at least), positive and negative (int64), each (G, N)."""
    with without_autocast(features):
        serving = choose(KERNELS, backend, features.device)
        loss, d_pos, d_neg, positive, negative = serving.forward(features, labels, margin, soft, metric)
    return loss, d_pos, d_neg, positive, negative


@batch_hard.register_fake
def _(
    features: Tensor, labels: Tensor, margin: float, soft: bool, metric: str, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(features.dtype, torch.float32)
    loss, d_pos, d_neg = (features.new_empty(features.shape[:2], dtype=dtype) for _ in range(3))
    positive, negative = (features.new_empty(features.shape[:2], dtype=torch.int64) for _ in range(2))
    return loss, d_pos, d_neg, positive, negative


@torch.library.custom_op("rru_fast::batch_hard_backward", mutates_args=())
def batch_hard_backward(
    d_loss: Tensor,
    features: Tensor,
    d_pos: Tensor,
    d_neg: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float,
    soft: bool,
    metric: str,
    backend: str,
) -> Tensor:
    """Gradient of the features, (G, N, D)."""
    with without_autocast(features):
        d_features: Tensor = choose(KERNELS, backend, features.device).backward(
            d_loss, features, d_pos, d_neg, positive, negative, margin, soft, metric
        )
    return d_features


@batch_hard_backward.register_fake
def _(d_loss: Tensor, features: Tensor, *_: Any) -> Tensor:
    return features.new_empty(features.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, _, *ctx.options = inputs
    ctx.save_for_backward(features, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    d_features = None if d_loss is None else batch_hard_backward(d_loss, *ctx.saved_tensors, *ctx.options)
    return d_features, None, None, None, None, None


batch_hard.register_autograd(_backward, setup_context=_setup)
forbid_second_order(batch_hard_backward, "rru_fast.batch_hard_triplet")
