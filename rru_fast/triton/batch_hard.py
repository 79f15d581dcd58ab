"""`batch_hard_triplet`: tiles of the distance matrix on tensor cores, reduced to each anchor's two hardest partners.

One launch for all groups (strips), after one that subtracts what their candidates share or, for cosine, computes norms;
the N x M matrix is never stored. A tile's distances only select the partners; the two distances that enter the loss are
computed from the difference of the vectors, or of the unit vectors, so that near points keep their digits. Backward, a
program gathers a row's gradient, as anchor and from the anchors that selected it, in their order: no atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rru_fast.arguments import (
    BatchHardArguments,
    BatchHardGradients,
    BatchHardNeed,
    BatchHardOutputs,
    BatchHardSaved,
    BatchHardUpstream,
    flatten,
)
from rru_fast.precision import matmul_precision
from rru_fast.triton import _device, _launch
from rru_fast.triton import batch_hard_kernels as kernels
from rru_fast.triton._autotune import ALL_REGISTERS, Candidates, KernelConfig, autotune
from rru_fast.triton._launch import cdiv, next_power_of_2
from rru_fast.triton._precision import TL_DTYPES, acc_dtype, block_k, uses_tensor_cores
from rru_fast.triton._strided import StridedAnchors, StridedFeatures, StridedVector, vectorizable

# Up to this many anchors, a program that scans them all takes less time than the launches that sort them: an estimate.
FEW_ANCHORS = 64


class Upstream(NamedTuple):
    """Gradients of the loss per anchor and of the two distances; None for one that is not used."""

    d_loss: StridedAnchors | None
    d_d_pos: StridedAnchors | None
    d_d_neg: StridedAnchors | None


class Partners(NamedTuple):
    """Each anchor's distances and partners, (G, N), contiguous."""

    d_pos: Tensor
    d_neg: Tensor
    positive: Tensor
    negative: Tensor


def forward(args: BatchHardArguments) -> BatchHardOutputs:
    """Find each anchor's hardest positive and negative, and its loss."""
    features, gallery, labels, gallery_labels = args.features, args.gallery, args.labels, args.gallery_labels
    groups, n, d = features.shape
    m = args.candidates.shape[1]
    precision = matmul_precision(features.dtype)
    rows = _rows(features, gallery)

    def run(config: KernelConfig) -> BatchHardOutputs:
        loss, d_pos, d_neg = (features.new_empty((groups, n), dtype=acc_dtype(features.dtype)) for _ in range(3))
        positive, negative = (features.new_empty((groups, n), dtype=torch.int64) for _ in range(2))
        _launch.launch(
            kernels.batch_hard_fwd_kernel,
            (cdiv(n, config["BLOCK_M"]), groups),
            loss=loss,
            d_pos=d_pos,
            d_neg=d_neg,
            positive=positive,
            negative=negative,
            **rows,
            labels=StridedVector(labels, labels.stride(0)),
            gallery_labels=None if gallery_labels is None else StridedVector(gallery_labels, gallery_labels.stride(0)),
            ranked=ranked,
            inverse_norms=inverse_norms,
            common=common,
            n=n,
            m=m,
            margin=args.margin,
            D=d,
            SOFT=args.soft,
            PRECISION=precision,
            **config,
        )
        return BatchHardOutputs(loss, d_pos, d_neg, positive, negative)

    with _device.on_device(features):
        ranked, inverse_norms, common = None, None, None
        if args.metric == "cosine":
            # Products of 16-bit operands are exact; their differences would not be.
            common = features.new_empty((groups, d)) if features.dtype == acc_dtype(features.dtype) else None
            inverse_norms = _inverse_norms(args, common)
            vectorized = vectorizable(features, 2) and vectorizable(args.candidates, 2)
        else:
            ranked = _subtract_common(args)
            vectorized = vectorizable(ranked, 2)
        config = autotune(
            "batch_hard",
            (groups, n, 0 if gallery is None else m, d, args.soft, args.metric, precision, vectorized),
            features,
            lambda: _candidates(args, precision, vectorized),
            lambda config: run(config["batch_hard"]),
        )
        return run(config["batch_hard"])


def _rows(features: Tensor, gallery: Tensor | None) -> dict[str, Any]:
    """Return features and gallery as arguments of the kernels."""
    return {
        "features": StridedFeatures(features, *features.stride()),
        "gallery": None if gallery is None else StridedFeatures(gallery, *gallery.stride()),
    }


def _num_rows(args: BatchHardArguments) -> int:
    """Return N + M, or N without a gallery."""
    return args.features.shape[1] + (0 if args.gallery is None else args.gallery.shape[1])


def _candidates(args: BatchHardArguments, precision: str, vectorized: bool) -> Candidates:
    """Return configs of the forward."""
    features = args.features
    groups, n, _ = features.shape
    tensor_cores = uses_tensor_cores(features.dtype, precision)
    num_sms = _device.num_sms(features)
    # A third stage of tiles that are only multiplied would spill registers.
    num_stages = 2 if args.metric == "cosine" else 3

    def config(block_m: int, block_n: int, num_warps: int) -> KernelConfig:
        blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k(features.dtype, precision, vectorized)}
        return {**blocks, "num_warps": num_warps, "num_stages": num_stages, **ALL_REGISTERS}

    rows = 16
    while rows < 64 and groups * cdiv(n, 2 * rows) >= num_sms:
        rows *= 2
    warps = 8 if rows == 64 and (precision == "ieee" or not vectorized) else 4
    tiles = [(16, 64, 4), (64, 64, 8)]
    if not tensor_cores:
        tiles += [(32, 64, 4)] if vectorized else []
    elif vectorized:
        tiles += [(16, 128, 4), (64, 128, 8), (128, 64, 8)]
    default = config(rows, 64 if args.candidates.shape[1] > 32 else 32, warps)
    return Candidates({"batch_hard": default}, {"batch_hard": [config(*tile) for tile in tiles]})


def _subtract_common(args: BatchHardArguments) -> Tensor:
    """Subtract from features and gallery, (G, N + M, D), a vector that most of a group's candidates share.

    Their products then keep digits.
    """
    features = args.features
    groups, n, d = features.shape
    rows = _num_rows(args)
    ranked = features.new_empty(groups, rows, d)
    columns = min(128, next_power_of_2(d))
    _launch.launch(
        kernels.subtract_common_kernel,
        (cdiv(rows, 16), groups, cdiv(d, columns)),
        ranked=ranked,
        **_rows(features, args.gallery),
        n=n,
        rows=rows,
        D=d,
        ACC=TL_DTYPES[acc_dtype(features.dtype)],
        BLOCK_N=16,
        BLOCK_K=columns,
        BLOCK_D=min(1024, next_power_of_2(d)),
        num_warps=4,
    )
    return ranked


def _inverse_norms(args: BatchHardArguments, common: Tensor | None) -> Tensor:
    """Return the inverse norms of features and gallery, (G, N + M).

    `common` (G, D) gets a unit vector near most candidates of a group.
    """
    features = args.features
    groups, n, d = features.shape
    rows = _num_rows(args)
    inverse_norms = features.new_empty((groups, rows), dtype=acc_dtype(features.dtype))
    _launch.launch(
        kernels.inverse_norms_kernel,
        (cdiv(rows, 4) + (common is not None), groups),
        inverse_norms=inverse_norms,
        common=common,
        **_rows(features, args.gallery),
        n=n,
        rows=rows,
        D=d,
        BLOCK_N=4,
        BLOCK_K=min(256, next_power_of_2(d)),
        num_warps=4,
        **ALL_REGISTERS,
    )
    return inverse_norms


def backward(
    upstream: BatchHardUpstream, saved: BatchHardSaved, args: BatchHardArguments, need: BatchHardNeed
) -> BatchHardGradients:
    """Return the gradients, nonzero only for anchors with a gradient and their hardest positive and negative."""
    features, gallery = args.features, args.gallery
    groups, n, d = features.shape
    columns = min(512, next_power_of_2(d))

    def gather(like: Tensor, as_anchor: bool, as_partner: bool) -> Tensor:
        """Return the gradient of the rows of `like` as anchors or as partners or both."""
        gradient = like.new_empty(like.shape)
        partners, choices = None, None
        if as_partner and n > FEW_ANCHORS:  # sorted by partner and then by anchor, those without a partner first
            partners, choices = torch.cat((saved.positive, saved.negative), 1).sort(dim=1, stable=True)
        _launch.launch(
            kernels.batch_hard_bwd_kernel,
            (like.shape[1], groups, cdiv(d, columns)),
            d_rows=gradient,
            upstream=Upstream(*(None if v is None else StridedAnchors(v, *v.stride()) for v in flatten(upstream))),
            saved=Partners(*flatten(saved)),
            **_rows(features, gallery),
            inverse_norms=inverse_norms,
            partners=partners,
            choices=choices,
            n=n,
            m=args.candidates.shape[1],
            margin=args.margin,
            D=d,
            SOFT=args.soft,
            AS_ANCHOR=as_anchor,
            AS_PARTNER=as_partner,
            BLOCK_A=8,
            BLOCK_K=columns,
            num_warps=4,
            **ALL_REGISTERS,
        )
        return gradient

    with _device.on_device(features):
        inverse_norms = _inverse_norms(args, None) if args.metric == "cosine" else None
        return BatchHardGradients(
            features=gather(features, True, gallery is None) if need.features else None,
            gallery=gather(gallery, False, True) if need.gallery and gallery is not None else None,
        )
