"""`refine` in two launches per frame forward and four backward, and one for each sum over all frames.

Forward: the part of U that does not hold S in one launch over all frames, then a frame at a time `transition`, which
adds the rest and takes the batch statistics, and `gate`, which blends and pools the strips. Backward: the mirror, in
_refine_backward_kernels.py. Nothing waits for the host, sums have a fixed order, and the whole captures into a CUDA
graph. Beside 16-bit maps S is carried from frame to frame in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rru_fast.distributed import ranks_of
from rru_fast.triton import _host as host
from rru_fast.triton._autotune import autotune
from rru_fast.triton.refine import backward as backward_pass
from rru_fast.triton.refine import forward as forward_pass
from rru_fast.triton.refine.arguments import Saved, make_call


def forward(
    x: Tensor,
    w: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w_s1: Tensor | None,
    w_s2: Tensor | None,
    w_c: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    lengths: Tensor | None,
    state_x: Tensor | None,
    state_s: Tensor | None,
    inputs: str,
    training: bool,
    eps: float,
    bn_groups: int,
    process_group: str,
    counts: Sequence[int],
    save: bool,
) -> tuple[Tensor, ...]:
    """The outputs of rru_fast::refine: features, strips, mean, var, u, z_s, z_c, h."""
    with host.on_device(x):
        call = make_call(
            x, w, gamma, beta, w_s1, w_s2, w_c, lengths, state_x, state_s, inputs, training, eps, bn_groups
        )
        if training:
            mean, var = (x.new_zeros((call.frames, bn_groups, call.d), dtype=call.sum) for _ in range(2))
        else:
            assert running_mean is not None and running_var is not None
            mean, var = running_mean.contiguous(), running_var.contiguous()
        config = autotune(
            "refine",
            call.kind(),
            x,
            lambda: forward_pass.candidates(call),
            lambda config: forward_pass.run(call, config, mean, var, save, None),
        )
        ranks = ranks_of(process_group, counts, x.device)
        outputs = forward_pass.run(call, config, mean, var, save, ranks)
        if not training:
            mean, var = call.empty(0, bn_groups, call.d), call.empty(0, bn_groups, call.d)
        return *outputs[:2], mean, var, *outputs[2:]


def backward(
    d_features: Tensor | None,
    d_strips: Tensor | None,
    need_x: bool,
    need_weights: bool,
    features: Tensor,
    mean: Tensor,
    var: Tensor,
    u: Tensor,
    z_s: Tensor,
    z_c: Tensor,
    h: Tensor,
    x: Tensor,
    w: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w_s1: Tensor | None,
    w_s2: Tensor | None,
    w_c: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    lengths: Tensor | None,
    state_x: Tensor | None,
    state_s: Tensor | None,
    inputs: str,
    training: bool,
    eps: float,
    bn_groups: int,
    process_group: str,
    counts: Sequence[int],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w, gamma, beta, w_s1, w_s2, w_c, state_x, state_s; None where not needed or no argument."""
    with host.on_device(x):
        call = make_call(
            x, w, gamma, beta, w_s1, w_s2, w_c, lengths, state_x, state_s, inputs, training, eps, bn_groups
        )
        if not training:
            assert running_mean is not None and running_var is not None
            mean, var = running_mean.contiguous(), running_var.contiguous()
        saved = Saved(host.maps(features), mean, var, u, z_s, z_c, h)
        upstream = backward_pass.upstream_of(call, d_features, d_strips)
        config = autotune(
            "refine_backward",
            # The number of frames decides into how many parts the weights' gradients are split.
            (*call.kind(), min(8, host.power_of_2(call.frames)), need_x, need_weights),
            x,
            lambda: backward_pass.candidates(call),
            lambda config: backward_pass.run(call, config, saved, upstream, need_x, need_weights, None),
        )
        ranks = ranks_of(process_group, counts, x.device)
        d_x, d_weights, d_state = backward_pass.run(call, config, saved, upstream, need_x, need_weights, ranks)
        like = (w, gamma, beta, w_s1, w_s2, w_c)
        cast = [None if d is None or v is None else d.to(v.dtype) for d, v in zip(d_weights, like, strict=True)]
        return d_x, *cast, *d_state
