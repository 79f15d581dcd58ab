"""The paper's equations in plain PyTorch with autograd: the oracle for every other backend.

Liu, Yuan, Zhou, Li, "Spatial and Temporal Mutual Promotion for Video-based Person Re-identification", AAAI 2019
(arXiv 1812.10305); equation numbers are the paper's. Written for clarity, and to be exact in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.nn.functional import all_reduce

from rru_fast.checks import check_eval_only, check_process_group
from rru_fast.distributed import GRAPH_BREAK_ERROR, count_values, spans_ranks
from rru_fast.types import Inputs, Metric, Reduction, Refined, State


def refine(
    x: Tensor,
    w: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w_s1: Tensor | None = None,
    w_s2: Tensor | None = None,
    w_c: Tensor | None = None,
    *,
    inputs: Inputs = "appearance+motion",
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float | Sequence[float] = 0.1,
    eps: float = 1e-3,
    bn_groups: int = 1,
    lengths: Tensor | None = None,
    state: State | None = None,
    process_group: ProcessGroup | None = None,
) -> Refined:
    """Run eq. 1-5 frame by frame and pool strips by eq. 9. Arguments as in `rru_fast.refine`."""
    check_eval_only(training, lengths, state)
    check_process_group(process_group, bn_groups)
    ranks = process_group if training and spans_ranks(process_group) else None
    if ranks is not None and torch.compiler.is_compiling():
        raise RuntimeError(GRAPH_BREAK_ERROR)
    elements = sum(count_values(x, w.shape[0], ranks)) if ranks is not None else 0
    if lengths is not None:
        lengths = lengths.to(x.device, torch.int64)
    norm = partial(
        normalize,
        gamma=gamma,
        beta=beta,
        running_mean=running_mean,
        running_var=running_var,
        training=training,
        eps=eps,
        bn_groups=bn_groups,
        ranks=ranks,
        elements=elements,
    )
    # At t = 1 the past is X_1, so S_1 = X_1 for any gate; the gate runs to update the running statistics.
    x_prev, s = state if state is not None else (x[:, 0], x[:, 0])
    frames = x
    if lengths is not None:
        time = torch.arange(x.shape[1], device=x.device)
        ended = (time >= lengths[:, None])[:, :, None, None, None]  # (B, T, 1, 1, 1)
        frames = x.masked_fill(ended, 0)  # a NaN there would reach the gradients, as 0 * NaN
    refined = []
    for x_t, step in zip(frames.unbind(1), momenta(momentum, x.shape[1]), strict=True):
        z = gate(x_t, s, x_prev, partial(norm, momentum=step), w, w_s1, w_s2, w_c, inputs)
        s = s + z * (x_t - s)  # eq. 5
        x_prev = x_t
        refined.append(s)
    features = torch.stack(refined, 1)
    if lengths is None:
        strips = features.mean((1, 4))  # eq. 9
        return Refined(features, strips, None if training else last_state(x, features, None))
    features = features.masked_fill(ended, 0)
    strips = features.mean(4).sum(1) / lengths.to(x)[:, None, None]
    return Refined(features, strips, last_state(x, features, lengths))


def gate(
    x_t: Tensor,
    s: Tensor,
    x_prev: Tensor,
    norm: Callable[[Tensor], Tensor],
    w: Tensor,
    w_s1: Tensor | None,
    w_s2: Tensor | None,
    w_c: Tensor | None,
    inputs: Inputs,
) -> Tensor:
    """Gate Z_t of one frame, eq. 1-4.

    Args:
        x_t, s, x_prev: X_t, S_{t-1} and X_{t-1}, (B, C, H, W).
        norm: batch norm of the transition's output (B, D, H, W).
        w, w_s1, w_s2, w_c, inputs: as in `rru_fast.refine`.

    Returns:
        Z_t, (B, C, H, W); (B, 1, H, W) without channel attention, (B, C, 1, 1) without spatial attention.
    """
    if inputs == "raw":
        v = torch.cat((x_t, s), 1)
    elif inputs == "appearance":
        v = x_t - s
    else:
        v = torch.cat((x_t - s, x_t - x_prev), 1)
    y = F.relu(norm(F.conv2d(v, w[:, :, None, None])))  # (B, D, H, W), eq. 1
    z: Tensor | None = None
    if w_s1 is not None and w_s2 is not None:  # eq. 2: (B, 1, H, W)
        z = F.linear(F.relu(F.linear(y.mean(1).flatten(1), w_s1)), w_s2).view(-1, 1, *y.shape[2:])
    if w_c is not None:  # eq. 3: (B, C, 1, 1)
        z_c = F.linear(y.mean((2, 3)), w_c)[:, :, None, None]
        z = z_c if z is None else z_c * z
    return torch.sigmoid(cast(Tensor, z))  # eq. 4


def normalize(
    u: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    bn_groups: int,
    ranks: ProcessGroup | None,
    elements: int,
) -> Tensor:
    """Batch norm of u (B, D, H, W), in training per group of clips, or over ranks of `elements` values per channel."""
    if not training:
        return F.batch_norm(u, running_mean, running_var, gamma, beta, False, momentum, eps)
    if ranks is not None:
        return _norm_over_ranks(u, running_mean, running_var, gamma, beta, momentum, eps, ranks, elements)
    # As under DataParallel: statistics per group; the first group updates the buffers.
    first, *others = u.chunk(bn_groups)
    parts = [F.batch_norm(first, running_mean, running_var, gamma, beta, True, momentum, eps)]
    parts += [F.batch_norm(u_g, None, None, gamma, beta, True, momentum, eps) for u_g in others]
    return torch.cat(parts) if others else parts[0]


def _norm_over_ranks(
    u: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    momentum: float,
    eps: float,
    process_group: ProcessGroup,
    elements: int,
) -> Tensor:
    """F.batch_norm of u (B, D, H, W) in training, over all ranks, which have `elements` values per channel."""
    # torch.compile may trace this function after a graph break in `refine`; its all_reduce has another gradient.
    if torch.compiler.is_compiling():
        raise RuntimeError(GRAPH_BREAK_ERROR)
    sum_over_ranks = partial(cast("Callable[..., Tensor]", all_reduce), group=process_group)
    wide = u.double()  # F.batch_norm sums in fp64 on a CPU
    mean = sum_over_ranks(wide.sum((0, 2, 3))) / elements
    centered = wide - mean[:, None, None]
    var = sum_over_ranks(centered.square().sum((0, 2, 3))) / elements
    if running_mean is not None and running_var is not None:
        for running, step in ((running_mean, mean), (running_var, var * (elements / (elements - 1)))):
            running.mul_(1 - momentum).add_(step.detach().to(running), alpha=momentum)
    uhat = centered * (var[:, None, None] + eps).rsqrt()
    return (uhat * gamma[:, None, None] + beta[:, None, None]).to(u.dtype)


def last_state(x: Tensor, s: Tensor, lengths: Tensor | None) -> State:
    """Copy each clip's last frame of x and s, both (B, T, C, H, W), as the state for its next chunk.

    Copies, so that the caller may reuse the memory of x, and the state does not keep this chunk alive.
    """
    if lengths is None:
        return State(x.select(1, -1).clone(), s.select(1, -1).clone())
    clip, last = torch.arange(x.shape[0], device=x.device), lengths - 1
    return State(x[clip, last], s[clip, last])


def strip_pool(s: Tensor) -> Tensor:
    """Average (B, T, C, H, W) over time and width, eq. 9, to (B, C, H)."""
    return s.mean((1, 4))


def batch_hard_triplet(
    features: Tensor,
    labels: Tensor,
    *,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    margin: float | Literal["soft"] = 0.3,
    metric: Metric = "euclidean",
    reduction: Reduction = "mean",
    return_indices: bool = False,
    return_distances: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Batch-hard triplet loss, eq. 8, or eq. 10 for features (G, N, D). Arguments: `rru_fast.batch_hard_triplet`."""
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = features, labels
    d = distance_matrix(features, gallery, metric)
    same = labels.long()[:, None] == gallery_labels.long()
    d_pos, positive = d.masked_fill(~same, float("-inf")).max(-1)
    d_neg, negative = d.masked_fill(same, float("inf")).min(-1)
    loss = reduce(loss_of_gap(d_pos - d_neg, margin), reduction)  # the gap is -inf without a partner: no loss
    distances = (d_pos, d_neg) if return_distances else ()
    positive, negative = positive.masked_fill((~same).all(-1), -1), negative.masked_fill(same.all(-1), -1)
    indices = (positive, negative) if return_indices else ()
    return (loss, *distances, *indices) if return_distances or return_indices else loss


def hardest_distances(
    features: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor, *, metric: Metric
) -> tuple[Tensor, Tensor]:
    """Return D_pos and D_neg of `batch_hard_triplet` per anchor."""
    found = batch_hard_triplet(
        features,
        labels,
        gallery=gallery,
        gallery_labels=gallery_labels,
        metric=metric,
        reduction="none",
        return_distances=True,
    )
    return found[1], found[2]


def distance_matrix(features: Tensor, gallery: Tensor, metric: Metric) -> Tensor:
    """Return distances (..., N, M) of features (..., N, D) to a gallery (..., M, D)."""
    if metric == "cosine":
        return 1 - F.normalize(features, dim=-1) @ F.normalize(gallery, dim=-1).mT
    # 0 * f makes infinite features NaN, and so their distances.
    common = common_part(gallery.detach())
    a, b = (f - common + 0 * f for f in (features, gallery))
    d2 = a.square().sum(-1).unsqueeze(-1) + b.square().sum(-1).unsqueeze(-2) - 2 * a @ b.mT
    return d2.clamp(min=1e-12).sqrt()


def loss_of_gap(gap: Tensor, margin: float | Literal["soft"]) -> Tensor:
    """Return the loss per anchor of D_pos - D_neg."""
    return F.softplus(gap) if margin == "soft" else F.relu(float(margin) + gap)


def reduce(loss: Tensor, reduction: Reduction) -> Tensor:
    """Return the mean or the sum of a loss, or the loss unchanged."""
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def common_part(features: Tensor) -> Tensor:
    """Estimate a large vector (..., 1, D) common to most of features (..., N, D); 0 if there is none.

    Subtracting it leaves distances unchanged, but |a|^2 + |b|^2 - 2 ab no longer cancels. The estimate is the median of
    three medians of three features each, if its square is at least 16 times that of their range, so that outliers
    neither shift nor hide it.
    """
    n = features.shape[-2]
    nine = torch.stack([features[..., i * n // 9, :] for i in range(9)])
    low, middle, high = nine.view(3, 3, *nine.shape[1:]).sort(0).values[1].sort(0).values  # (..., D) each
    shared = 16 * (high - low).square().sum(-1, keepdim=True) < middle.square().sum(-1, keepdim=True)
    return torch.where(shared, middle, 0).unsqueeze(-2)


def momenta(momentum: float | Sequence[float], frames: int) -> list[float]:
    """Return the momentum of the running statistics for each frame."""
    return [float(step) for step in momentum] if isinstance(momentum, Sequence) else [float(momentum)] * frames
