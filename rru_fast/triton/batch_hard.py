"""`batch_hard_triplet`: tiles of the distance matrix on the tensor cores, the two hardest of each anchor kept.

All groups (strips) in one launch, after one that subtracts what their features share; no N x N matrix. A
tile's distances only choose the partners; the two distances that enter the loss are taken from the difference of the
vectors, so that near points do not lose their digits. Backward, every feature gathers what it is to get, itself as
anchor and those that chose it in their order: no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rru_fast.triton import _host as host
from rru_fast.triton import _launch
from rru_fast.triton import batch_hard_kernels as kernels
from rru_fast.triton._autotune import Candidates, KernelConfig, autotune
from rru_fast.triton._host import power_of_2


def forward(features: Tensor, labels: Tensor, margin: float, soft: bool, metric: str) -> tuple[Tensor, ...]:
    """features (G, N, D), labels (N,) to loss, d_pos, d_neg (G, N) and int64 positive, negative (G, N).

    For "cosine" the features are unit vectors already. Without a negative: index -1, distance inf, loss 0.
    """
    groups, n, d = features.shape
    dtype = torch.promote_types(features.dtype, torch.float32)
    processors = host.processors(features)
    precision = host.matmul_precision(features.dtype)

    def blocks(m: int, other: int, k: int, warps: int, stages: int) -> KernelConfig:
        sizes = {"BLOCK_M": m, "BLOCK_N": other, "BLOCK_K": k}
        return {**sizes, "num_warps": warps, "num_stages": stages, **host.ALL_REGISTERS}

    def run(config: KernelConfig) -> tuple[Tensor, ...]:
        loss, d_pos, d_neg = (features.new_empty((groups, n), dtype=dtype) for _ in range(3))
        positive, negative = (features.new_empty((groups, n), dtype=torch.int64) for _ in range(2))
        _launch.launch(
            kernels.batch_hard_kernel,
            (-(-n // config["BLOCK_M"]), groups),
            loss,
            d_pos,
            d_neg,
            positive,
            negative,
            features,
            *features.stride(),
            ranked,
            *ranked.stride(),
            labels,
            labels.stride(0),
            n,
            margin,
            D=d,
            SOFT=soft,
            COSINE=metric == "cosine",
            PRECISION=precision,
            **config,
        )
        return loss, d_pos, d_neg, positive, negative

    ranked = features if metric == "cosine" else _without_common_part(features)
    even = host.even(ranked, 2)

    def candidates() -> Candidates:
        rows = 16
        while rows < 64 and groups * -(-n // (2 * rows)) >= processors:
            rows *= 2
        k = host.depth(features.dtype, precision, even)
        warps = 8 if rows == 64 and (precision == "ieee" or not even) else 4
        if precision == "ieee" and features.dtype.itemsize >= 4:
            tiles = [(16, 64, 4), (64, 64, 8), *([(32, 64, 4)] if even else [])]
        else:
            tiles = [(16, 64, 4), (64, 64, 8)]
            tiles += [(16, 128, 4), (64, 128, 8), (128, 64, 8)] if even else []
        default = blocks(rows, 64 if n > 32 else 32, k, warps, 3)
        others = [blocks(m, other, k, warps, 3) for m, other, warps in tiles]
        return Candidates({"batch_hard": default}, {"batch_hard": others})

    with host.on_device(features):
        sizes = (groups, n, d, soft, metric, precision, even)
        config = autotune("batch_hard", sizes, features, candidates, lambda config: run(config["batch_hard"]))
        return run(config["batch_hard"])


def _without_common_part(features: Tensor) -> Tensor:
    """Subtract from features (G, N, D) a vector that most of each group share: products of them keep their digits."""
    groups, n, d = features.shape
    ranked = features.new_empty(groups, n, d)
    block_k = min(128, power_of_2(d))
    with host.on_device(features):
        _launch.launch(
            kernels.subtract_common_kernel,
            (-(-n // 16), groups, -(-d // block_k)),
            ranked,
            features,
            *features.stride(),
            n,
            D=d,
            SUM=host.TYPES[torch.promote_types(features.dtype, torch.float32)],
            BLOCK_N=16,
            BLOCK_K=block_k,
            BLOCK_D=min(1024, power_of_2(d)),
            num_warps=4,
        )
    return ranked


def backward(
    d_loss: Tensor,
    features: Tensor,
    d_pos: Tensor,
    d_neg: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float,
    soft: bool,
    metric: str,
) -> Tensor:
    """Gradient of the features (G, N, D): an active anchor moves itself and its two partners, nobody else."""
    groups, n, d = features.shape
    d_features = features.new_empty(groups, n, d)
    # Who chose whom, sorted by whom and then by anchor; those without a negative chose nobody.
    chosen, choices = torch.cat((positive, torch.where(negative < 0, n, negative)), 1).sort(dim=1, stable=True)
    everybody = torch.arange(n + 1, device=features.device).expand(groups, -1).contiguous()
    begins = torch.searchsorted(chosen, everybody)
    block_k = min(1024, power_of_2(d))
    with host.on_device(features):
        _launch.launch(
            kernels.batch_hard_backward_kernel,
            (n, groups, -(-d // block_k)),
            d_features,
            d_loss,
            *d_loss.stride(),
            features,
            *features.stride(),
            d_pos,
            d_neg,
            positive,
            negative,
            choices,
            begins,
            n,
            margin,
            D=d,
            SUM=host.TYPES[d_pos.dtype],
            SOFT=soft,
            COSINE=metric == "cosine",
            BLOCK_A=16,
            BLOCK_K=block_k,
            num_warps=4,
        )
    return d_features
