"""The operators as functions: arguments checked, backend chosen, running statistics kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from rru_fast import backends, checks, ops, reference
from rru_fast.arguments import BatchHardArguments, RefineArguments, values
from rru_fast.distributed import OUTSIDE_GRAPHS, count_values, spans_ranks
from rru_fast.reference.equations import last_state, momenta
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
    backend: str = "auto",
) -> Refined:
    """Run the Refining Recurrent Unit over a batch of videos, eq. 1-5, and pool its strips, eq. 9, in one pass.

    S_1 = X_1 and S_t = S_{t-1} + Z_t (X_t - S_{t-1}), where the gate Z_t = sigmoid(z_c z_s^T) is computed from
    Y_t = relu(norm(W v_t)) with z_s = W_s2 relu(W_s1 mean_D(Y_t)) and z_c = W_c mean_P(Y_t).

    Args:
        x: maps X, (B, T, C, H, W), any strides; float64, float32, float16 or bfloat16.
        w: transition weights W, (D, 2C): v_t = (X_t - S_{t-1}, X_t - X_{t-1}); (D, C) for inputs="appearance".
        gamma, beta: affine parameters of the transition's batch norm, (D,).
        w_s1, w_s2: spatial attention, (A, P) and (P, A), P = H * W; both None for channel attention alone.
        w_c: channel attention, (C, D); None for spatial attention alone.
        inputs: what the gate sees, v_t: "appearance+motion", "appearance" (X_t - S_{t-1}) or "raw" (X_t, S_{t-1}).
        running_mean, running_var: (D,), read in eval mode; in training updated in place, once a frame, as BatchNorm
            does; may be None in training.
        training: batch statistics, of all clips and positions of a frame, instead of the running ones.
        momentum: of the running statistics, 0 to 1, or a list of T: a number a frame.
        eps: added to the variance.
        bn_groups: the clips are normalised in this many consecutive groups, each with statistics of its own; the
            running ones follow the first. Divides B. Training only.
        lengths: integers (B,) from 1 to T: frames past a clip's length are ignored and their S is 0. Eval mode only.
            Values are checked when the tensor is on the CPU, but not inside torch.compile.
        state: `.state` of the call that refined the video so far; eval mode only. Chunk by chunk the features are those
            of one go (16-bit dtypes: the state is rounded to the dtype at each boundary); the strips are means over
            each chunk's own frames, to be averaged by their numbers.
        process_group: in training, batch statistics are those of the clips of all its ranks, in forward and backward,
            as with torch's SyncBatchNorm; ranks may bring different numbers of clips, not of frames. All call, and run
            the backward, together: each frame past the first is a collective of 2 D values forward and one backward,
            each call one more. Gradients of weights are each rank's own, to be added up (DistributedDataParallel takes
            their mean). None, eval mode and a group of one: each rank by itself. Excludes `bn_groups`; inside
            torch.compile a graph break.
        backend: "auto", or a backend `show_config` lists as available.

    Weights are of x's dtype, or float32 beside a 16-bit x. Whatever x's dtype, the arithmetic is float32 at least. On a
    GPU float32 products of the transition have the precision of the convolution they replace: TF32 by default, float32
    with `torch.backends.cudnn.allow_tf32 = False`.

    Returns:
        `Refined(features, strips, state)`: S (B, T, C, H, W), (B, C, H), and in eval mode the last frames.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it wanted.
        RuntimeError: on second-order gradients, forward mode and torch.func.grad (backend="reference" has them); a
            kernel that Triton cannot compile or launch.
    """
    checks.check_refine(
        x,
        w,
        gamma,
        beta,
        w_s1,
        w_s2,
        w_c,
        inputs,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        bn_groups,
        lengths,
        state,
        process_group,
    )
    # The operator takes Python's own numbers; in eval mode there are no groups.
    eps, bn_groups = float(eps), int(bn_groups) if training else 1
    # The operator is given "auto" as it is: whichever backend serves where a traced or exported program runs.
    if backends.choose(backend, x.device) == "reference":
        w, w_s1, w_s2, w_c = (v if v is None else v.to(x.dtype) for v in (w, w_s1, w_s2, w_c))  # type: ignore[assignment]
        if running_mean is not None:  # F.batch_norm takes one dtype for these beside x's
            gamma, beta = gamma.to(running_mean.dtype), beta.to(running_mean.dtype)
        return reference.refine(
            x,
            w,
            gamma,
            beta,
            w_s1,
            w_s2,
            w_c,
            inputs=inputs,
            running_mean=running_mean,
            running_var=running_var,
            training=training,
            momentum=momentum,
            eps=eps,
            bn_groups=bn_groups,
            lengths=lengths,
            state=state,
            process_group=process_group,
        )
    if lengths is not None:
        lengths = lengths.to(x.device, torch.int64)
    state_x, state_s = (None, None) if state is None else map(_usable, state)
    differentiable = (x, w, gamma, beta, w_s1, w_s2, w_c, state_x, state_s)
    checks.check_derivatives("rru_fast.refine", *differentiable)
    save = _may_need_gradients(differentiable)
    group_name = ""
    counts: list[int] = []
    if training and process_group is not None and spans_ranks(process_group):
        if torch.compiler.is_compiling():
            raise RuntimeError(OUTSIDE_GRAPHS)
        group_name, counts = process_group.group_name, count_values(x, w.shape[0], process_group)
    args = RefineArguments(
        x=x,
        w=w,
        gamma=gamma,
        beta=beta,
        w_s1=w_s1,
        w_s2=w_s2,
        w_c=w_c,
        running_mean=running_mean,
        running_var=running_var,
        lengths=lengths,
        state_x=state_x,
        state_s=state_s,
        inputs=inputs,
        training=training,
        eps=eps,
        bn_groups=bn_groups,
        process_group=group_name,
        elements_per_rank=counts,
    )
    features, strips, mean, var, *_ = ops.refine.refine(*values(args), save, backend)
    if not training:
        return Refined(features, strips, last_state(x, features, lengths))
    if running_mean is not None and running_var is not None:
        count = sum(counts) if counts else x.shape[0] // bn_groups * x.shape[3] * x.shape[4]
        by_frame = momenta(momentum, x.shape[1])
        _update(running_mean, mean[:, 0], by_frame)
        _update(running_var, var[:, 0] * (count / (count - 1)), by_frame)
    return Refined(features, strips, None)


def _may_need_gradients(tensors: Sequence[Tensor | None]) -> bool:
    """Return True if a backward may come.

    One of a traced program may: torch.jit.trace runs what it has traced with gradients once more without, and wants
    the same program of both.
    """
    if torch._C._get_tracing_state() is not None:
        return True
    return torch.is_grad_enabled() and any(v is not None and checks.beneath(v).requires_grad for v in tensors)


def _usable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one from inference mode where a backward may have to save it."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor


@torch.no_grad()
def _update(running: Tensor, steps: Tensor, momenta: Sequence[float]) -> None:
    """running = (1 - momentum) running + momentum step, for each row of steps (T, D) in order."""
    if checks.batched(steps) and not checks.batched(running):
        raise RuntimeError(
            "running_mean, running_var: got the same for every call of vmap, wanted None, or one a call with vmap over "
            "them too: they are updated in place"
        )
    for step, momentum in zip(steps, momenta, strict=True):
        # As written, not by lerp, which makes NaN of an infinite variance.
        running.mul_(1 - momentum).add_(step, alpha=momentum)


def strip_pool(s: Tensor, *, backend: str = "auto") -> Tensor:
    """Average maps over time and width into horizontal strips, eq. 9, where `refine` has not done it already.

    Args:
        s: (B, T, C, H, W), any strides; float64, float32, float16 or bfloat16, summed in float32 at least.
        backend: "auto", or a backend `show_config` lists as available.

    Returns:
        strips (B, C, H), strips[b, c, row] = 1/(T W) sum over t and columns of s.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it wanted.
        RuntimeError: on second-order gradients, forward mode and torch.func.grad (backend="reference" has them).
    """
    checks.check_strip_pool(s)
    if backends.choose(backend, s.device) == "reference":
        return reference.strip_pool(s)
    checks.check_derivatives("rru_fast.strip_pool", s)
    return cast(Tensor, ops.strip_pool.strip_pool(s, backend))


def batch_hard_triplet(
    features: Tensor,
    labels: Tensor,
    *,
    margin: float | Literal["soft"] = 0.3,
    metric: Metric = "euclidean",
    reduction: Reduction = "mean",
    return_indices: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Batch-hard triplet loss, eq. 8, or eq. 10 for G groups (strips) at once: mean of hinge(margin + D_pos - D_neg).

    D_pos is an anchor's distance to its farthest positive, itself included; D_neg to its nearest negative. Ties go to
    the lowest index; an anchor without a negative has loss 0; coincident points have gradient 0. Partners are
    chosen by matrix products, for Euclidean distances after a large vector that most features share is subtracted, so
    that they do not lose its digits; the two distances in the loss are of the features' difference.

    Args:
        features: (N, D) or (G, N, D); float64, float32, float16 or bfloat16, used as they come, not normalised.
        labels: integers (N,), who each feature is.
        margin: a number, or "soft": softplus(D_pos - D_neg).
        metric: "euclidean", sqrt(max(|a - b|^2, 1e-12)), or "cosine", 1 - cos(a, b).
        reduction: "mean" over all anchors and groups, or "none".
        return_indices: also return who the partners were.
        backend: "auto", or a backend `show_config` lists as available.

    Returns:
        The loss, a scalar or of shape (N,) or (G, N), in features' dtype; with `return_indices` also the hardest
        positives and negatives, int64, (N,) or (G, N), -1 where there is no negative.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it wanted.
        RuntimeError: on second-order gradients, forward mode and torch.func.grad (backend="reference" has them).
    """
    checks.check_batch_hard_triplet(features, labels, margin, metric, reduction, return_indices)
    if backends.choose(backend, features.device) == "reference":
        return reference.batch_hard_triplet(
            features, labels, margin=margin, metric=metric, reduction=reduction, return_indices=return_indices
        )
    checks.check_derivatives("rru_fast.batch_hard_triplet", features)
    grouped = features if features.dim() == 3 else features[None]
    if metric == "cosine":
        grouped = F.normalize(grouped.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    number, soft = (0.0, True) if margin == "soft" else (float(margin), False)
    args = BatchHardArguments(grouped, labels, number, soft, metric)
    loss, _, _, positive, negative = ops.batch_hard.batch_hard(*values(args), backend)
    per_anchor = features.shape[:-1]
    loss = (loss.mean() if reduction == "mean" else loss.view(per_anchor)).to(features.dtype)
    return (loss, positive.view(per_anchor), negative.view(per_anchor)) if return_indices else loss
