"""rru_fast::batch_hard, eq. 8 and 10: the loss, reduced, and each anchor's partners."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rru_fast.arguments import (
    BatchHardArguments,
    BatchHardNeed,
    BatchHardOutputs,
    BatchHardSaved,
    BatchHardUpstream,
    flatten,
    schema,
    unflatten,
)
from rru_fast.auto.kinds import batch_hard_key
from rru_fast.composite import batch_hard as composite
from rru_fast.ops._registration import Kernels, choose, kernels, register, without_autocast

KERNELS = kernels("batch_hard", composite)
BACKWARD = (BatchHardUpstream, BatchHardSaved, BatchHardArguments)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Return the loss in features' dtype, reduced, and `BatchHardSaved`; features are (N, D) or (G, N, D)."""
    args, reduction, backend = unflatten(arguments, BatchHardArguments)
    with without_autocast(args.features):
        outputs = _choose(backend, args).forward(_in_groups(args))
        loss, *saved = (_reshaped(value, args.features.shape[:-1]) for value in flatten(outputs))
        if reduction != "none":
            loss = loss.mean() if reduction == "mean" else loss.sum()
        return loss.to(args.features.dtype), *saved


def _choose(backend: str, args: BatchHardArguments) -> Kernels:
    return choose(
        "batch_hard",
        KERNELS,
        backend,
        args.features.device,
        lambda: batch_hard_key(args.features, args.gallery, args.metric, gradients=True),
    )


def _reshaped(value: Tensor, shape: torch.Size) -> Tensor:
    """Return a fresh tensor in another shape, not as a view: users may change an operator's outputs in place."""
    return value if value.shape == shape else torch.ops.aten._unsafe_view(value, shape)  # type: ignore[no-any-return]


def _in_groups(args: BatchHardArguments) -> BatchHardArguments:
    """Return features and gallery as (G, N, D)."""
    if args.features.dim() == 3:
        return args
    return replace(args, features=args.features[None], gallery=None if args.gallery is None else args.gallery[None])


def _fake(features: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    reduction = arguments[-2]
    per_anchor = features.shape[:-1]
    loss = features.new_empty(per_anchor if reduction == "none" else ())
    dtype = torch.promote_types(features.dtype, torch.float32)
    d_pos, d_neg = (features.new_empty(per_anchor, dtype=dtype) for _ in range(2))
    positive, negative = (features.new_empty(per_anchor, dtype=torch.int64) for _ in range(2))
    return loss, d_pos, d_neg, positive, negative


def _backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the gradients of features and gallery, an empty tensor in place of one that is not needed."""
    upstream, saved, args, reduction, need, backend = unflatten(arguments, *BACKWARD)
    grouped = _in_groups(args)
    groups = grouped.features.shape[:2]
    with without_autocast(args.features):
        d_loss = upstream.d_loss
        if d_loss is not None:
            d_loss = d_loss.to(saved.d_pos.dtype)
            if reduction != "none":
                d_loss = (d_loss / saved.d_pos.numel() if reduction == "mean" else d_loss).expand(groups)
        upstream = BatchHardUpstream(
            *(d if d is None else d.reshape(groups) for d in (d_loss, upstream.d_d_pos, upstream.d_d_neg))
        )
        saved = BatchHardSaved(*(value.view(groups) for value in flatten(saved)))
        kernels = _choose(backend, args)
        gradients = kernels.backward(upstream, saved, grouped, BatchHardNeed(*need))
        d_features, d_gallery = (
            args.features.new_empty(0) if d is None else _reshaped(d, v.shape)
            for d, v in ((gradients.features, args.features), (gradients.gallery, args.gallery))
        )
    return d_features, d_gallery


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    _, _, args, _, need, _ = unflatten(arguments, *BACKWARD)
    d_features, d_gallery = (
        v.new_empty(v.shape) if needed and v is not None else args.features.new_empty(0)
        for v, needed in zip((args.features, args.gallery), need, strict=True)
    )
    return d_features, d_gallery


batch_hard, batch_hard_backward = register(
    "batch_hard",
    f"({schema(BatchHardArguments)}, str reduction, str backend) -> ({schema(BatchHardOutputs)})",
    f"({schema(*BACKWARD)}, str reduction, bool[] need, str backend) -> (Tensor d_features, Tensor d_gallery)",
    (_forward, _backward, _fake, _fake_backward),
)
