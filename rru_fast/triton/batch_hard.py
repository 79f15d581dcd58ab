"""`batch_hard_triplet`: tiles of the distance matrix on tensor cores, reduced to each anchor's two hardest partners.

One launch for all groups (strips), after one that subtracts what their features share; the N x N matrix is never
stored. A tile's distances only select the partners; the two distances that enter the loss are computed from the
difference of the vectors, so that near points keep their digits. Backward, a program gathers a feature's gradient, as
anchor and from the anchors that selected it, in their order: no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rru_fast.arguments import BatchHardArguments, BatchHardOutputs, BatchHardSaved
from rru_fast.triton import _device, _launch
from rru_fast.triton import batch_hard_kernels as kernels
from rru_fast.triton._autotune import ALL_REGISTERS, Candidates, KernelConfig, autotune
from rru_fast.triton._launch import cdiv, next_power_of_2
from rru_fast.triton._precision import TL_DTYPES, acc_dtype, block_k, matmul_precision, uses_tensor_cores
from rru_fast.triton._strided import StridedFeatures, StridedVector, vectorizable


def forward(args: BatchHardArguments) -> BatchHardOutputs:
    """Find each anchor's hardest positive and negative, and its loss."""
    features, labels = args.features, args.labels
    groups, n, d = features.shape
    precision = matmul_precision(features.dtype)

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
            features=StridedFeatures(features, *features.stride()),
            ranked=StridedFeatures(ranked, *ranked.stride()),
            labels=StridedVector(labels, labels.stride(0)),
            n=n,
            margin=args.margin,
            D=d,
            SOFT=args.soft,
            COSINE=args.metric == "cosine",
            PRECISION=precision,
            **config,
        )
        return BatchHardOutputs(loss, d_pos, d_neg, positive, negative)

    with _device.on_device(features):
        ranked = features if args.metric == "cosine" else _subtract_common(features)
        vectorized = vectorizable(ranked, 2)
        config = autotune(
            "batch_hard",
            (groups, n, d, args.soft, args.metric, precision, vectorized),
            features,
            lambda: _candidates(features, precision, vectorized),
            lambda config: run(config["batch_hard"]),
        )
        return run(config["batch_hard"])


def _candidates(features: Tensor, precision: str, vectorized: bool) -> Candidates:
    """Return configs of the forward."""
    groups, n, _ = features.shape
    tensor_cores = uses_tensor_cores(features.dtype, precision)
    num_sms = _device.num_sms(features)

    def config(block_m: int, block_n: int, num_warps: int) -> KernelConfig:
        blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k(features.dtype, precision, vectorized)}
        return {**blocks, "num_warps": num_warps, "num_stages": 3, **ALL_REGISTERS}

    rows = 16
    while rows < 64 and groups * cdiv(n, 2 * rows) >= num_sms:
        rows *= 2
    warps = 8 if rows == 64 and (precision == "ieee" or not vectorized) else 4
    tiles = [(16, 64, 4), (64, 64, 8)]
    if not tensor_cores:
        tiles += [(32, 64, 4)] if vectorized else []
    elif vectorized:
        tiles += [(16, 128, 4), (64, 128, 8), (128, 64, 8)]
    default = config(rows, 64 if n > 32 else 32, warps)
    return Candidates({"batch_hard": default}, {"batch_hard": [config(*tile) for tile in tiles]})


def _subtract_common(features: Tensor) -> Tensor:
    """Subtract from features (G, N, D) a vector that most of each group share: their products then keep digits."""
    groups, n, d = features.shape
    ranked = features.new_empty(groups, n, d)
    columns = min(128, next_power_of_2(d))
    _launch.launch(
        kernels.subtract_common_kernel,
        (cdiv(n, 16), groups, cdiv(d, columns)),
        ranked=ranked,
        features=StridedFeatures(features, *features.stride()),
        n=n,
        D=d,
        ACC=TL_DTYPES[acc_dtype(features.dtype)],
        BLOCK_N=16,
        BLOCK_K=columns,
        BLOCK_D=min(1024, next_power_of_2(d)),
        num_warps=4,
    )
    return ranked


def backward(d_loss: Tensor, saved: BatchHardSaved, args: BatchHardArguments) -> Tensor:
    """Return the gradient of the features, nonzero only for active anchors and their hardest positive and negative."""
    features, positive, negative = args.features, saved.positive, saved.negative
    groups, n, d = features.shape
    d_features = features.new_empty(groups, n, d)
    # Choosers sorted by partner and then by anchor; an anchor without a negative is sorted past all features.
    partners, choices = torch.cat((positive, torch.where(negative < 0, n, negative)), 1).sort(dim=1, stable=True)
    every_feature = torch.arange(n + 1, device=features.device).expand(groups, -1).contiguous()
    begins = torch.searchsorted(partners, every_feature)
    columns = min(1024, next_power_of_2(d))
    with _device.on_device(features):
        _launch.launch(
            kernels.batch_hard_bwd_kernel,
            (n, groups, cdiv(d, columns)),
            d_features=d_features,
            d_loss=StridedFeatures(d_loss[..., None], *d_loss[..., None].stride()),
            features=StridedFeatures(features, *features.stride()),
            d_pos=saved.d_pos,
            d_neg=saved.d_neg,
            positive=positive,
            negative=negative,
            choices=choices,
            begins=begins,
            n=n,
            margin=args.margin,
            D=d,
            ACC=TL_DTYPES[saved.d_pos.dtype],
            SOFT=args.soft,
            COSINE=args.metric == "cosine",
            BLOCK_A=16,
            BLOCK_K=columns,
            num_warps=4,
        )
    return d_features
