"""rru_fast::batch_hard, eq. 8 and 10 per anchor; the caller takes the mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rru_fast.arguments import BatchHardArguments, BatchHardOutputs, BatchHardSaved, flatten, schema, unflatten
from rru_fast.composite import batch_hard as composite
from rru_fast.cpu import batch_hard as cpu
from rru_fast.ops._registration import choose, forbid_second_order, kernels, without_autocast

KERNELS = kernels("batch_hard", composite, cpu)


@torch.library.custom_op(
    "rru_fast::batch_hard",
    mutates_args=(),
    schema=f"({schema(BatchHardArguments)}, str backend) -> ({schema(BatchHardOutputs)})",
)
def batch_hard(*arguments: Any) -> tuple[Tensor, ...]:
    """Return `BatchHardOutputs` of `BatchHardArguments`."""
    args, backend = unflatten(arguments, BatchHardArguments)
    with without_autocast(args.features):
        outputs = choose(KERNELS, backend, args.features.device).forward(args)
    return flatten(outputs)


@batch_hard.register_fake
def _(features: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(features.dtype, torch.float32)
    loss, d_pos, d_neg = (features.new_empty(features.shape[:2], dtype=dtype) for _ in range(3))
    positive, negative = (features.new_empty(features.shape[:2], dtype=torch.int64) for _ in range(2))
    return loss, d_pos, d_neg, positive, negative


@torch.library.custom_op(
    "rru_fast::batch_hard_backward",
    mutates_args=(),
    schema=f"(Tensor d_loss, {schema(BatchHardSaved)}, {schema(BatchHardArguments)}, str backend) -> Tensor",
)
def batch_hard_backward(d_loss: Tensor, *arguments: Any) -> Tensor:
    """Return the gradient of the features, (G, N, D)."""
    saved, args, backend = unflatten(arguments, BatchHardSaved, BatchHardArguments)
    with without_autocast(args.features):
        d_features: Tensor = choose(KERNELS, backend, args.features.device).backward(d_loss, saved, args)
    return d_features


@batch_hard_backward.register_fake
def _(d_loss: Tensor, d_pos: Tensor, d_neg: Tensor, positive: Tensor, negative: Tensor, f: Tensor, *_: Any) -> Tensor:
    return f.new_empty(f.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, labels, *ctx.options = inputs
    _loss, *saved = output
    ctx.save_for_backward(*saved, features, labels)
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    d_features = None if d_loss is None else batch_hard_backward(d_loss, *ctx.saved_tensors, *ctx.options)
    return d_features, None, None, None, None, None


batch_hard.register_autograd(_backward, setup_context=_setup)
forbid_second_order(batch_hard_backward, "rru_fast.batch_hard_triplet")
