"""rru_fast::batch_hard, eq. 8 and 10 per anchor; the caller takes the mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rru_fast.arguments import (
    BatchHardArguments,
    BatchHardOutputs,
    BatchHardSaved,
    BatchHardUpstream,
    flatten,
    schema,
    unflatten,
)
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
    schema=f"({schema(BatchHardUpstream, BatchHardSaved, BatchHardArguments)}, str backend) -> Tensor",
)
def batch_hard_backward(*arguments: Any) -> Tensor:
    """Return the gradient of the features, (G, N, D). That of the distances is by plain PyTorch on every backend."""
    upstream, saved, args, backend = unflatten(arguments, BatchHardUpstream, BatchHardSaved, BatchHardArguments)
    found: list[Tensor] = []
    with without_autocast(args.features):
        if upstream.d_loss is not None:
            kernels = choose(KERNELS, backend, args.features.device)
            found.append(kernels.backward(upstream.d_loss, saved, args))
        if upstream.d_d_pos is not None or upstream.d_d_neg is not None:
            found.append(composite.distances_backward(upstream.d_d_pos, upstream.d_d_neg, saved, args))
        return found[0] if len(found) == 1 else found[0].add_(found[1])


@batch_hard_backward.register_fake
def _(*arguments: Any) -> Tensor:
    _, _, args, _ = unflatten(arguments, BatchHardUpstream, BatchHardSaved, BatchHardArguments)
    return torch.empty_like(args.features, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, labels, *ctx.options = inputs
    _loss, *saved = output
    ctx.save_for_backward(*saved, features, labels)
    ctx.mark_non_differentiable(*saved[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    upstream = gradients[:3]
    if all(gradient is None for gradient in upstream):
        return (None,) * 6
    return batch_hard_backward(*upstream, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


batch_hard.register_autograd(_backward, setup_context=_setup)
forbid_second_order(batch_hard_backward, "rru_fast.batch_hard_triplet")
