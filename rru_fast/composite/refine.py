"""`refine` as matrix products over whole frames and in-place passes between them.

Maps are (B, C, P) matrices here, P = H * W. The part of U that does not depend on S is one product over all frames,
taken in blocks of time that bound its scratch memory; what is left a step is one product and a few passes over
buffers that stay warm. Only U, z_s, z_c and h are kept for the backward; Z and A are recomputed.
Arithmetic is float64 for float64 input and float32 otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rru_fast.composite._frames import Frames, Upstream, alive
from rru_fast.composite._gate import Gate, GateGradients, sigmoid_gate
from rru_fast.composite._products import Products
from rru_fast.distributed import ranks_of

# Scratch for the hoisted product, a frame at least: small enough to stay warm, large enough to fill a product.
HOIST_BYTES = 16 * 2**20


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
    dtype = torch.promote_types(x.dtype, torch.float32)
    clips, steps_total, channels, height, width = x.shape
    positions, d = height * width, w.shape[0]
    products, ranks = Products(x), ranks_of(process_group, counts, x.device)
    gate = Gate(w, gamma, beta, w_s1, w_s2, w_c, inputs, eps, bn_groups if training else 1, ranks, dtype)
    frames = Frames(x, state_x, lengths, dtype)
    start = 0 if state_s is not None else 1
    steps = steps_total - start

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    features = x.new_empty(x.shape)
    s_out = features.view(clips, steps_total, channels, positions)
    statistics_shape = (steps_total, bn_groups, d) if training else (0, bn_groups, d)
    mean, var = x.new_zeros(statistics_shape, dtype=dtype), x.new_zeros(statistics_shape, dtype=dtype)
    if not training:
        step_var, step_mean = _running(running_var, dtype), _running(running_mean, dtype)

    u = empty(steps, clips, d, positions)
    kept = steps if save else 0
    saved_z_s = empty(kept if w_s2 is not None else 0, clips, positions)
    saved_z_c = empty(kept if w_c is not None else 0, clips, channels)
    saved_h = empty(kept if w_s1 is not None else 0, clips, 0 if w_s1 is None else w_s1.shape[0])
    shared_first = _shared_first(inputs, start)
    if inputs != "appearance":
        _hoisted(products, gate, frames, start, u, skip=int(shared_first))

    if state_s is not None:
        s = state_s.flatten(2).to(dtype)
        total = torch.zeros_like(s)  # sum of S over time, for the strips
    else:
        s = frames[0]
        s_out[:, 0] = s
        total = s.clone(memory_format=torch.contiguous_format)
        if training and inputs == "raw":  # the gate's one real input at t = 1, for the running statistics
            first = s.contiguous()
            both = products.multiply(empty(clips, d, positions), gate.recurrent + gate.hoisted, first)
            var[0], mean[0] = gate.statistics(both)
    a = empty(clips, channels, positions)
    for n, t in enumerate(range(start, steps_total)):
        torch.sub(frames[t], s, out=a)
        operand = s if inputs == "raw" else a
        if n == 0 and shared_first:
            products.multiply(u[n], gate.recurrent + gate.hoisted, a)
        elif inputs == "appearance":
            products.multiply(u[n], gate.recurrent, a)
        else:
            products.add_product(u[n], gate.recurrent, operand)
        if training:
            step_var, step_mean = gate.statistics(u[n])
            var[t], mean[t] = step_var, step_mean
        h, z_s, z_c = gate.attention(gate.normalise(u[n], step_var, step_mean)[1])
        if save:
            for vectors, vector in ((saved_h, h), (saved_z_s, z_s), (saved_z_c, z_c)):
                if vector is not None:
                    vectors[n] = vector
        # In place where the output has the arithmetic dtype; else the state keeps that dtype and the output rounds it.
        z = sigmoid_gate(z_s, z_c, out=s_out[:, t] if x.dtype == dtype else torch.empty_like(a))
        s = torch.addcmul(s, z, a, out=z)  # eq. 5
        if x.dtype != dtype:
            s_out[:, t] = s
        total += s if lengths is None else s.masked_fill(~alive(lengths, steps_total)[:, t], 0)
    if lengths is not None:
        s_out.masked_fill_(~alive(lengths, steps_total), 0)
    strips = total.view(clips, channels, height, width).mean(3)
    strips = strips / (steps_total if lengths is None else lengths[:, None, None].to(dtype))
    u = u if save else empty(0, clips, d, positions)
    return features, strips.to(x.dtype), mean, var, u, saved_z_s, saved_z_c, saved_h


def backward(
    d_features: Tensor | None,
    d_strips: Tensor | None,
    need_x: bool,
    need_weights: bool,
    features: Tensor,
    mean: Tensor,
    var: Tensor,
    u: Tensor,
    saved_z_s: Tensor,
    saved_z_c: Tensor,
    saved_h: Tensor,
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
    """Gradients of x, w, gamma, beta, w_s1, w_s2, w_c, state_x, state_s, from the last step to the first.

    The arguments are what rru_fast::refine took and gave. A gradient that is not needed, or has no argument to belong
    to, is None.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    clips, steps_total, channels, height, width = x.shape
    positions = height * width
    products, ranks = Products(x), ranks_of(process_group, counts, x.device)
    gate = Gate(w, gamma, beta, w_s1, w_s2, w_c, inputs, eps, bn_groups if training else 1, ranks, dtype)
    gradients = GateGradients(gate)
    frames, refined = Frames(x, state_x, lengths, dtype), Frames(features, state_s, None, dtype)
    upstream = Upstream(d_features, d_strips, lengths, x.shape, dtype)
    recurrent_t, hoisted_t = gate.recurrent.t().contiguous(), gate.hoisted.t().contiguous()
    start = 0 if state_s is not None else 1
    shared_first = _shared_first(inputs, start)
    if not training:
        step_var, step_mean = _running(running_var, dtype), _running(running_mean, dtype)

    dx = x.new_empty(x.shape) if need_x else None
    dx_maps = None if dx is None else dx.view(clips, steps_total, channels, positions)
    # Transposed, (C, D): the product that adds to them is a third faster so.
    d_recurrent, d_hoisted = torch.zeros_like(recurrent_t), torch.zeros_like(hoisted_t)
    carry = x.new_zeros((clips, channels, positions), dtype=dtype)
    a, z, scratch = (torch.empty_like(carry) for _ in range(3))
    du_next: Tensor | None = None
    for t in range(steps_total - 1, start - 1, -1):
        n = t - start
        h, z_s = (saved_h[n], saved_z_s[n]) if w_s1 is not None else (None, None)
        z_c = saved_z_c[n] if w_c is not None else None
        g = upstream.add_to(carry, t)
        torch.sub(frames[t], refined[t - 1], out=a)
        sigmoid_gate(z_s, z_c, out=z)
        dl = torch.mul(g, a, out=scratch)
        torch.ops.aten.sigmoid_backward(dl, z, grad_input=dl)  # dl z (1 - z) in one pass
        zg = z.mul_(g)
        if training:
            step_var, step_mean = var[t], mean[t]
        du = gradients.step(dl, u[n], step_var, step_mean, h, z_s, z_c, training)

        sharing = n == 0 and shared_first
        if need_weights and sharing:
            d_both = products.add_outer(torch.zeros_like(d_hoisted), a, du)
            d_recurrent += d_both
            d_hoisted += d_both
        elif need_weights:
            products.add_outer(d_recurrent, refined[t - 1] if inputs == "raw" else a, du)
            if inputs != "appearance":
                products.add_outer(d_hoisted, frames.hoistable(inputs, t, out=scratch), du)

        # dX_t = Z G + E + (what goes through the hoisted weights); carry = (1 - Z) G - E, or + E for raw inputs.
        if inputs == "raw":
            carry = products.add_product(g.sub_(zg), recurrent_t, du)
        else:
            through_a = recurrent_t + hoisted_t if sharing else recurrent_t
            products.add_product(zg, through_a, du)
            carry = g.sub_(zg)
        if dx_maps is not None:
            du_hoisted = _through_hoisted(inputs, sharing, du, du_next)
            if du_hoisted is not None:
                products.add_product(zg, hoisted_t, du_hoisted)
            dx_maps[:, t] = zg
        du_next = du

    d_state_x = d_state_s = None
    if start == 0:
        # The frame before reaches the first step through S, by `carry`, and through the motion, by its dU.
        maps = (clips, channels, height, width)
        d_state_x, d_state_s = torch.zeros_like(carry), carry.view(maps).to(x.dtype)
        if inputs == "appearance+motion" and du_next is not None:
            products.add_product(d_state_x, hoisted_t, -du_next)
        d_state_x = d_state_x.view(maps).to(x.dtype)
    elif dx_maps is not None:
        dx_maps[:, 0] = upstream.add_to(carry, 0)
    if not need_weights:
        return dx, None, None, None, None, None, None, d_state_x, d_state_s
    d_w = torch.empty_like(gate.w)
    for half, d_half in zip(gate.halves(d_w), (d_recurrent, d_hoisted), strict=True):
        half.copy_(d_half.t())
    d_weights = (d_w, gradients.gamma, gradients.beta, gradients.w_s1, gradients.w_s2, gradients.w_c)
    like = (w, gamma, beta, w_s1, w_s2, w_c)
    cast = [None if d is None or v is None else d.to(v.dtype) for d, v in zip(d_weights, like, strict=True)]
    return dx, *cast, d_state_x, d_state_s


def _running(statistic: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A running statistic (D,) as that of one group, (1, D)."""
    assert statistic is not None
    return statistic.to(dtype)[None]


def _shared_first(inputs: str, start: int) -> bool:
    """Whether A = M at the first step, so that one product serves both: its past is X_1 itself, S_1 = X_1."""
    return inputs == "appearance+motion" and start == 1


def _through_hoisted(inputs: str, sharing: bool, du: Tensor, du_next: Tensor | None) -> Tensor | None:
    """What reaches frame t through the hoisted weights, if anything: dU_t, less dU_{t+1} whose motion begins there."""
    if inputs == "appearance":
        return None
    if inputs == "raw" or du_next is None:
        return None if sharing else du
    return -du_next if sharing else du - du_next


def _hoisted(products: Products, gate: Gate, frames: Frames, start: int, u: Tensor, skip: int) -> None:
    """u[n] = hoisted weights times what they multiply at frame start + n, for all steps but the first `skip`."""
    steps, clips = u.shape[:2]
    channels, positions = frames.maps.shape[2:]
    block = max(1, HOIST_BYTES // (clips * channels * positions * u.element_size()))
    scratch = u.new_empty(min(block, steps), clips, channels, positions)
    for n0 in range(skip, steps, block):
        n1 = min(n0 + block, steps)
        for n in range(n0, n1):
            frames.hoistable(gate.inputs, start + n, scratch[n - n0])
        products.multiply(u[n0:n1].flatten(0, 1), gate.hoisted, scratch[: n1 - n0].flatten(0, 1))
