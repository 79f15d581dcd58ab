"""Functional interface: check arguments, choose a backend, update running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rru_fast import backends, checks, ops, reference
from rru_fast.auto import choice, kinds
from rru_fast.distributed import GRAPH_BREAK_ERROR, count_values, spans_ranks
from rru_fast.reference.equations import last_state, momenta
from rru_fast.types import Inputs, Metric, Reduction, Refined, State

_T = TypeVar("_T", Tensor, Tensor | None)


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
    """Run the Refining Recurrent Unit, eq. 1-5, over a batch of videos and pool its strips, eq. 9, in one pass.

    S_1 = X_1 and S_t = S_{t-1} + Z_t (X_t - S_{t-1}). The gate is Z_t = sigmoid(z_c z_s^T) with
    Y_t = relu(norm(W v_t)), z_s = W_s2 relu(W_s1 mean_D(Y_t)) and z_c = W_c mean_P(Y_t).

    Args:
        x: feature maps X, (B, T, C, H, W), any strides; float64, float32, float16 or bfloat16.
        w: transition weights W, (D, 2C) for v_t = (X_t - S_{t-1}, X_t - X_{t-1}); (D, C) for inputs="appearance".
        gamma, beta: affine parameters of the transition's batch norm, (D,).
        w_s1, w_s2: spatial attention weights, (A, P) and (P, A) with P = H * W; both None for channel attention only.
        w_c: channel attention weights, (C, D); None for spatial attention only.
        inputs: gate input v_t: "appearance+motion", "appearance" (X_t - S_{t-1}) or "raw" (X_t, S_{t-1}).
        running_mean, running_var: running statistics, (D,). Used in eval mode; in training updated in place, once per
            frame, as by nn.BatchNorm2d. May be None in training.
        training: if True, normalize each frame by batch statistics over all its clips and positions, otherwise by the
            running statistics.
        momentum: of the running statistics, from 0 to 1; or a list of T, one per frame.
        eps: added to the variance.
        bn_groups: number of consecutive groups of clips, each normalized by its own batch statistics; the running
            statistics follow the first group. Must divide B. Training only.
        lengths: integers (B,) from 1 to T. Frames past a clip's length are ignored and their S is 0. Eval mode only.
            Values are checked if the tensor is on the CPU, except inside torch.compile.
        state: `.state` returned for the video's previous chunk. Eval mode only. Features of the chunks equal those of
            the whole video, up to rounding of the state in 16-bit dtypes; strips are means over the frames of each
            chunk, so average them weighted by the numbers of frames.
        process_group: in training, share batch statistics among its ranks, in forward and backward, as
            nn.SyncBatchNorm does. Ranks may have different numbers of clips, but not of frames. All ranks must call,
            and run the backward, together: one collective per call, and per frame after the first one of 2 D values in
            forward and another in backward. Weight gradients are local to each rank, to be summed over ranks
            (DistributedDataParallel averages them). With None, in eval mode and in a group of one, ranks are
            independent. Excludes `bn_groups`; breaks the graph inside torch.compile.
        backend: "auto", or a backend that `show_config` lists as available.

    Weights have x's dtype; with a 16-bit x they may be float32. Arithmetic is in fp32 at least. On a GPU fp32 products
    of the transition have the precision of the convolution that they replace: TF32 by default, fp32 with
    `torch.backends.cudnn.allow_tf32 = False`.

    Returns:
        `Refined(features, strips, state)`: S (B, T, C, H, W), strips (B, C, H), and in eval mode the state for the next
        chunk.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it wanted.
        RuntimeError: for second-order gradients, forward-mode AD and torch.func.grad (use backend="reference"); if
            a kernel of Triton or CUDA cannot be compiled or launched.
    """
    weights: dict[str, Any] = {"w": w, "gamma": gamma, "beta": beta, "w_s1": w_s1, "w_s2": w_s2, "w_c": w_c}
    options: dict[str, Any] = {
        "inputs": inputs,
        "running_mean": running_mean,
        "running_var": running_var,
        "training": training,
        "momentum": momentum,
        "eps": eps,
        "bn_groups": bn_groups,
        "lengths": lengths,
        "state": state,
        "process_group": process_group,
    }
    checks.check_refine(x, **weights, **options)
    # The schema takes only Python numbers; eval mode has no groups.
    eps, bn_groups = float(eps), int(bn_groups) if training else 1
    if backends.choose(backend, x.device) == "reference":
        _note_reference("refine")
        # F.conv2d and F.linear take weights in x's dtype, F.batch_norm its own four in one dtype.
        norm_dtype = gamma.dtype if running_mean is None else running_mean.dtype
        dtypes = {name: norm_dtype if name in ("gamma", "beta") else x.dtype for name in weights}
        in_dtypes: dict[str, Any] = {name: v if v is None else v.to(dtypes[name]) for name, v in weights.items()}
        return reference.refine(x, **in_dtypes, **options | {"eps": eps, "bn_groups": bn_groups})
    if lengths is not None:
        lengths = _saveable(lengths.to(x.device, torch.int64))
    state_x, state_s = (None, None) if state is None else map(_saveable, state)
    differentiable = (x, *weights.values(), state_x, state_s)
    checks.check_derivatives("rru_fast.refine", *differentiable)
    group_name = ""
    elements_per_rank: list[int] = []
    if training and process_group is not None and spans_ranks(process_group):
        if torch.compiler.is_compiling():
            raise RuntimeError(GRAPH_BREAK_ERROR)
        group_name, elements_per_rank = process_group.group_name, count_values(x, w.shape[0], process_group)
    save = _may_need_gradients(differentiable)
    if backend == "auto" and group_name:
        backend = backends.choose(backend, x.device)  # ranks, whose numbers of clips may differ, have to agree
    # A traced or exported program has "auto" unresolved, and uses the best backend where it runs.
    key = None
    if backend == "auto" and choice.decides(x):
        key = kinds.refine_key(x, w, w_s1, w_c, inputs, training, save)
        backend = choice.choose(key, kinds.RefineKind.from_key)
    try:
        features, strips, mean, var, *_ = ops.refine.refine(
            x,
            **weights,
            # Read in eval mode only; in training they are changed below, which must not invalidate the saved tensors.
            running_mean=None if training else running_mean,
            running_var=None if training else running_var,
            lengths=lengths,
            state_x=state_x,
            state_s=state_s,
            inputs=inputs,
            training=training,
            eps=eps,
            bn_groups=bn_groups,
            process_group=group_name,
            elements_per_rank=elements_per_rank,
            save=save,
            backend=backend,
        )
    except RuntimeError as error:
        if key is None:
            raise
        return refine(x, **weights, **options, backend=choice.demote(key, error))
    if not training:
        return Refined(features, strips, last_state(x, features, lengths))
    if running_mean is not None and running_var is not None:
        count = sum(elements_per_rank) if elements_per_rank else x.shape[0] // bn_groups * x.shape[3] * x.shape[4]
        by_frame = momenta(momentum, x.shape[1])
        with torch.no_grad():
            _update_running(running_mean, mean, by_frame, 1)
            _update_running(running_var, var, by_frame, count / (count - 1))
    return Refined(features, strips, None)


def _note_reference(op: str) -> None:
    """Note that the reference has run an operator; not within torch.compile, which would trace it."""
    if not torch.compiler.is_compiling():
        backends.note_run(op, "reference")


def choose_for_graph(x: Tensor, arguments: dict[str, Any]) -> str:
    """Return the backend of `refine(x, **arguments)`, for which "auto" was asked, as a CUDA graph of a module.

    Raises:
        ValueError, TypeError: an argument does not fit; checked where nothing is known of the call.
    """
    w, w_s1, w_c = (arguments[name] for name in ("w", "w_s1", "w_c"))
    save = _may_need_gradients([x, w, w_s1, w_c, *(arguments[name] for name in ("gamma", "beta", "w_s2"))])

    def kind_of(key: kinds.Key) -> kinds.RefineKind:
        checks.check_refine(x, **{name: value for name, value in arguments.items() if name != "backend"})
        return kinds.RefineKind.from_key(key)

    if not choice.decides(x):
        return backends.choose("auto", x.device)
    key = kinds.refine_key(x, w, w_s1, w_c, arguments["inputs"], arguments["training"], save, graphed=True)
    return choice.choose(key, kind_of)


def _may_need_gradients(tensors: Sequence[Tensor | None]) -> bool:
    """Return True if a backward may follow.

    Always True under torch.jit.trace, which traces a second time without gradients and expects the same program.
    """
    if torch._C._get_tracing_state() is not None:
        return True
    if not torch.is_grad_enabled():
        return False
    unwrap = checks.unwrap_vmap if checks.is_transformed() else lambda tensor: tensor
    return any(v is not None and unwrap(v).requires_grad for v in tensors)


def _saveable(tensor: _T) -> _T:
    """Clone a tensor from inference mode, which autograd cannot save for a backward; return any other unchanged."""
    if tensor is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor


def _update_running(running: Tensor, steps: Tensor, momenta: Sequence[float], factor: float) -> None:
    """Update running = (1 - momentum) running + momentum factor step for each frame of steps (T, groups, D), in order.

    The first group's are used.
    """
    if checks.is_vmapped(steps) and not checks.is_vmapped(running):
        raise RuntimeError(
            "running_mean, running_var: got the same for every call of vmap, wanted None, or one per call with vmap "
            "over them too: they are updated in place"
        )
    # Not by lerp, which turns an infinite variance into NaN. A frame's weight is its momentum times what later frames
    # leave of it.
    left, weights = 1.0, []
    for momentum in reversed(momenta):
        weights.append(left * momentum)
        left *= 1 - momentum
    running.mul_(left)
    for step, weight in zip(steps.unbind(0), reversed(weights), strict=True):
        running.add_(step[0], alpha=weight * factor)


def strip_pool(s: Tensor, *, backend: str = "auto") -> Tensor:
    """Average feature maps over time and width into horizontal strips, eq. 9. `refine` returns its strips already.

    Args:
        s: feature maps, (B, T, C, H, W), any strides; float64, float32, float16 or bfloat16. Summed in fp32 at least.
        backend: "auto", or a backend that `show_config` lists as available.

    Returns:
        strips (B, C, H), strips[b, c, h] = 1/(T W) sum_{t, w} s[b, t, c, h, w].

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it wanted.
        RuntimeError: for second-order gradients, forward-mode AD and torch.func.grad (use backend="reference").
    """
    checks.check_strip_pool(s)
    if backends.choose(backend, s.device) == "reference":
        _note_reference("strip_pool")
        return reference.strip_pool(s)
    checks.check_derivatives("rru_fast.strip_pool", s)
    key = None
    if backend == "auto" and choice.decides(s):
        key = kinds.strip_pool_key(s.device, s.dtype, s.shape, s.stride(), _may_need_gradients((s,)))
        backend = choice.choose(key, kinds.StripPoolKind.from_key)
    try:
        return cast(Tensor, ops.strip_pool.strip_pool(s, backend))
    except RuntimeError as error:
        if key is None:
            raise
        return strip_pool(s, backend=choice.demote(key, error))


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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Batch-hard triplet loss, eq. 8, or eq. 10 for G groups (strips) at once: mean of relu(margin + D_pos - D_neg).

    D_pos is an anchor's distance to its farthest positive, D_neg to its nearest negative, both among the features, the
    anchor itself included, or in a gallery. An anchor without a positive, which takes a gallery, or without a negative
    has loss 0; coincident points have gradient 0. Ties go to the lowest index; "composite" and "reference" may break a
    tie of equal candidates by the rounding of their matrix products.

    Hardest positives and negatives are selected by matrix products, up to rounding. Before Euclidean ones a large
    vector common to most candidates is subtracted, which would cancel their digits; cosine distances that differ by
    less than the rounding of 1, 1e-7 in fp32, may select one partner for the other. The two distances in the loss are
    computed from differences, for "cosine" of unit vectors, so that small ones keep their digits.

    Args:
        features: anchors, (N, D) or (G, N, D); float64, float32, float16 or bfloat16. Not normalized before use.
        labels: identity of each feature, integers (N,).
        gallery: features among which positives and negatives are mined, (M, D) or (G, M, D) as features, with their
            dtype; for example a memory bank. None for the features themselves. Gradients of both, each only if needed.
        gallery_labels: identity of each feature of the gallery, integers (M,); with the gallery or not at all.
        margin: a number, or "soft" for softplus(D_pos - D_neg).
        metric: "euclidean", sqrt(max(|a - b|^2, 1e-12)), or "cosine", 1 - cos(a, b).
        reduction: "mean" or "sum" over all anchors and groups, or "none".
        return_indices: if True, also return the indices of the hardest positives and negatives.
        return_distances: if True, also return D_pos and D_neg, with gradients.
        backend: "auto", or a backend that `show_config` lists as available.

    Memory grows with N + M, not with N M.

    Returns:
        The loss, a scalar or of shape (N,) or (G, N), in features' dtype. After it, with `return_distances`, D_pos and
        D_neg, in features' dtype, (N,) or (G, N); D_pos is -inf where there is no positive, D_neg inf where there is no
        negative. After them, with `return_indices`, the indices of the hardest positives and negatives, among the
        features or in the gallery, int64, (N,) or (G, N); -1 where there is none.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it wanted.
        RuntimeError: for second-order gradients, forward-mode AD and torch.func.grad (use backend="reference").
    """
    checks.check_batch_hard_triplet(features, labels, gallery, gallery_labels, margin, metric, reduction)
    checks.check_flags(return_indices=return_indices, return_distances=return_distances)
    if backends.choose(backend, features.device) == "reference":
        _note_reference("batch_hard")
        return reference.batch_hard_triplet(
            features,
            labels,
            gallery=gallery,
            gallery_labels=gallery_labels,
            margin=margin,
            metric=metric,
            reduction=reduction,
            return_indices=return_indices,
            return_distances=return_distances,
        )
    loss, d_pos, d_neg, positive, negative = _batch_hard(
        features, labels, gallery, gallery_labels, margin, metric, reduction, backend
    )
    if not return_distances:
        return (loss, positive, negative) if return_indices else loss
    if d_pos.dtype != features.dtype:
        d_pos, d_neg = d_pos.to(features.dtype), d_neg.to(features.dtype)
    return (loss, d_pos, d_neg, positive, negative) if return_indices else (loss, d_pos, d_neg)


def hardest_distances(
    features: Tensor,
    labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    *,
    margin: float | Literal["soft"],
    metric: Metric,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return D_pos and D_neg of `batch_hard_triplet` in the arithmetic dtype, fp32 at least."""
    checks.check_batch_hard_triplet(features, labels, gallery, gallery_labels, margin, metric, "none")
    if backends.choose(backend, features.device) == "reference":
        _note_reference("batch_hard")
        return reference.hardest_distances(features, labels, gallery, gallery_labels, metric=metric)
    _, d_pos, d_neg, _, _ = _batch_hard(features, labels, gallery, gallery_labels, margin, metric, "none", backend)
    return d_pos, d_neg


def _batch_hard(
    features: Tensor,
    labels: Tensor,
    gallery: Tensor | None,
    gallery_labels: Tensor | None,
    margin: float | Literal["soft"],
    metric: Metric,
    reduction: Reduction,
    backend: str,
) -> tuple[Tensor, ...]:
    """Call the operator: the loss, D_pos, D_neg and their indices."""
    checks.check_derivatives("rru_fast.batch_hard_triplet", features, gallery)
    if gallery_labels is not None and gallery_labels.dtype != labels.dtype:
        labels, gallery_labels = labels.long(), gallery_labels.long()
    labels, gallery, gallery_labels = _saveable(labels), _saveable(gallery), _saveable(gallery_labels)
    key = None
    if backend == "auto" and choice.decides(features):
        key = kinds.batch_hard_key(features, gallery, metric, _may_need_gradients((features, gallery)))
        backend = choice.choose(key, kinds.BatchHardKind.from_key)
    number, soft = (0.0, True) if margin == "soft" else (float(margin), False)
    arguments = (features, labels, gallery, gallery_labels, number, soft, metric, reduction)
    found: tuple[Tensor, ...]
    try:
        found = ops.batch_hard.batch_hard(*arguments, backend)
    except RuntimeError as error:
        if key is None:
            raise
        found = ops.batch_hard.batch_hard(*arguments, choice.demote(key, error))
    return found
