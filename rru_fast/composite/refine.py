"""`refine` as matrix products over whole frames and in-place passes between them.

Maps are (B, C, P) matrices here, P = H * W. The part of U that does not depend on S is one product over all frames,
taken in blocks of time that bound its scratch memory; what is left a step is one product and a few passes over
buffers that stay warm. Only U, z_s, z_c and h are kept for the backward; Z and A are recomputed.
Arithmetic is float64 for float64 input and float32 otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Scratch for the hoisted product, a frame at least: small enough to stay warm, large enough to fill a product.
HOIST_BYTES = 16 * 2**20


class _Gate:
    """The gate's weights in the arithmetic dtype, and its two halves that the recurrence shares: norm and attention."""

    def __init__(
        self,
        w: Tensor,
        gamma: Tensor,
        beta: Tensor,
        w_s1: Tensor | None,
        w_s2: Tensor | None,
        w_c: Tensor | None,
        inputs: str,
        eps: float,
        groups: int,
        dtype: torch.dtype,
    ) -> None:
        self.w = w.to(dtype)
        half = w.shape[1] if inputs == "appearance" else w.shape[1] // 2
        # `recurrent` multiplies what holds S, `hoisted` what does not; raw inputs put X first, (X_t, S).
        first, second = self.w[:, :half], self.w[:, half:]
        self.recurrent, self.hoisted = (second, first) if inputs == "raw" else (first, second)
        self.gamma, self.beta = gamma.to(dtype), beta.to(dtype)
        self.w_s1 = None if w_s1 is None else w_s1.to(dtype)
        self.w_s2 = None if w_s2 is None else w_s2.to(dtype)
        self.w_c = None if w_c is None else w_c.to(dtype)
        self.inputs, self.eps, self.groups = inputs, eps, groups

    def statistics(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Biased variance and mean, (groups, D), of u (B, D, P)."""
        return torch.var_mean(self.grouped(u), (1, 3), correction=0)

    def grouped(self, u: Tensor) -> Tensor:
        return u.view(self.groups, -1, *u.shape[1:])

    def uhat(self, u: Tensor, var: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised u, (groups, B / groups, D, P), and r = 1 / sqrt(var + eps), (groups, 1, D, 1)."""
        r = (var + self.eps).rsqrt()[:, None, :, None]
        return (self.grouped(u) - mean[:, None, :, None]).mul_(r), r

    def y(self, uhat: Tensor) -> Tensor:
        """relu(gamma uhat + beta), (B, D, P)."""
        scaled = (uhat * self.gamma[:, None]).add_(self.beta[:, None]).relu_()
        return scaled.view(-1, *scaled.shape[2:])

    def attention(self, y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """h (B, A), z_s (B, P) and z_c (B, C) of y (B, D, P); None where the variant has none."""
        h = z_s = z_c = None
        if self.w_s1 is not None and self.w_s2 is not None:
            h = (y.mean(1) @ self.w_s1.t()).relu_()
            z_s = h @ self.w_s2.t()
        if self.w_c is not None:
            z_c = y.mean(2) @ self.w_c.t()
        return h, z_s, z_c


def _sigmoid_gate(z_s: Tensor | None, z_c: Tensor | None, out: Tensor) -> Tensor:
    """Z = sigmoid(z_c z_s^T) into `out` (B, C, P), eq. 4; a missing vector is all ones."""
    if z_s is None and z_c is not None:
        out.copy_(z_c[:, :, None])
    elif z_c is None and z_s is not None:
        out.copy_(z_s[:, None])
    elif z_s is not None and z_c is not None:
        torch.mul(z_c[:, :, None], z_s[:, None], out=out)
    return out.sigmoid_()


def _running(statistic: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A running statistic (D,) as that of one group, (1, D)."""
    assert statistic is not None
    return statistic.to(dtype)[None]


def _product(weight: Tensor, maps: Tensor) -> Tensor:
    """weight (M, K) as the left factor of every clip of `maps` (B, K, P)."""
    return weight.expand(len(maps), *weight.shape)


def _alive(lengths: Tensor, frames: int) -> Tensor:
    """(B, T, 1, 1), true where a clip has a frame."""
    return (torch.arange(frames, device=lengths.device) < lengths[:, None])[:, :, None, None]


class _Frames:
    """X as (B, T, C, P), frame by frame in the arithmetic dtype, with the frame before the first at index -1."""

    def __init__(self, x: Tensor, before: Tensor | None, lengths: Tensor | None, dtype: torch.dtype) -> None:
        self.maps = x.flatten(3)
        if lengths is not None:  # padding may hold anything
            self.maps = self.maps.masked_fill(~_alive(lengths, x.shape[1]), 0)
        self.before = None if before is None else before.flatten(2)
        self.dtype = dtype

    def __getitem__(self, t: int) -> Tensor:
        frame = self.before if t < 0 else self.maps[:, t]
        assert frame is not None
        return frame.to(self.dtype)

    def hoistable(self, inputs: str, t: int, out: Tensor) -> Tensor:
        """What `hoisted` multiplies at frame t: X_t for raw inputs, else the motion X_t - X_{t-1} in full precision."""
        if inputs == "raw":
            return out.copy_(self[t])
        return torch.sub(self[t], self[t - 1], out=out)


def _hoisted(gate: _Gate, frames: _Frames, start: int, u: Tensor) -> None:
    """u[n] = hoisted weights times what they multiply at frame start + n, for all steps."""
    steps, clips = u.shape[:2]
    channels, positions = frames.maps.shape[2:]
    block = max(1, HOIST_BYTES // (clips * channels * positions * u.element_size()))
    scratch = u.new_empty(min(block, steps), clips, channels, positions)
    for n0 in range(0, steps, block):
        n1 = min(n0 + block, steps)
        for n in range(n0, n1):
            frames.hoistable(gate.inputs, start + n, scratch[n - n0])
        operand = scratch[: n1 - n0].flatten(0, 1)
        torch.bmm(_product(gate.hoisted, operand), operand, out=u[n0:n1].flatten(0, 1))


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
    save: bool,
) -> tuple[Tensor, ...]:
    """The outputs of rru_fast::refine: features, strips, mean, var, u, z_s, z_c, h."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    clips, steps_total, channels, height, width = x.shape
    positions, d = height * width, w.shape[0]
    gate = _Gate(w, gamma, beta, w_s1, w_s2, w_c, inputs, eps, bn_groups if training else 1, dtype)
    frames = _Frames(x, state_x, lengths, dtype)
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
    if inputs != "appearance":
        _hoisted(gate, frames, start, u)

    if state_s is not None:
        s = state_s.flatten(2).to(dtype)
        total = torch.zeros_like(s)  # sum of S over time, for the strips
    else:
        s = frames[0]
        s_out[:, 0] = s
        total = s.clone(memory_format=torch.contiguous_format)
        if training and inputs == "raw":  # the gate's one real input at t = 1, for the running statistics
            first = s.contiguous()
            var[0], mean[0] = gate.statistics(torch.bmm(_product(gate.recurrent + gate.hoisted, first), first))
    a, z = empty(clips, channels, positions), empty(clips, channels, positions)
    for n, t in enumerate(range(start, steps_total)):
        torch.sub(frames[t], s, out=a)
        operand = s if inputs == "raw" else a
        weight = _product(gate.recurrent, operand)
        if inputs == "appearance":
            torch.bmm(weight, operand, out=u[n])
        else:
            u[n].baddbmm_(weight, operand)
        if training:
            step_var, step_mean = gate.statistics(u[n])
            var[t], mean[t] = step_var, step_mean
        h, z_s, z_c = gate.attention(gate.y(gate.uhat(u[n], step_var, step_mean)[0]))
        if save:
            for vectors, vector in ((saved_h, h), (saved_z_s, z_s), (saved_z_c, z_c)):
                if vector is not None:
                    vectors[n] = vector
        _sigmoid_gate(z_s, z_c, out=z)
        if dtype == x.dtype:
            s = torch.addcmul(s, z, a, out=s_out[:, t])  # eq. 5
        else:  # the state keeps the arithmetic dtype, the output rounds it
            s = torch.addcmul(s, z, a)
            s_out[:, t] = s
        total += s if lengths is None else s.masked_fill(~_alive(lengths, steps_total)[:, t], 0)
    if lengths is not None:
        s_out.masked_fill_(~_alive(lengths, steps_total), 0)
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
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w, gamma, beta, w_s1, w_s2, w_c, state_x, state_s, from the last step to the first.

    The arguments are what rru_fast::refine took and gave. A gradient that is not needed, or has no argument to belong
    to, is None.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    clips, steps_total, channels, height, width = x.shape
    positions, d = height * width, w.shape[0]
    gate = _Gate(w, gamma, beta, w_s1, w_s2, w_c, inputs, eps, bn_groups if training else 1, dtype)
    frames = _Frames(x, state_x, lengths, dtype)
    refined = _Frames(features, state_s, None, dtype)
    recurrent_t, hoisted_t = gate.recurrent.t().contiguous(), gate.hoisted.t().contiguous()
    start = 0 if state_s is not None else 1
    per_group = clips // gate.groups * positions
    if not training:
        step_var, step_mean = _running(running_var, dtype), _running(running_mean, dtype)

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    ds = None if d_features is None else d_features.flatten(3)
    if ds is not None and lengths is not None:
        ds = ds.masked_fill(~_alive(lengths, steps_total), 0)
    strip_share = None  # (B, C, P), what each frame's S gets from the strips
    if d_strips is not None:
        count = steps_total if lengths is None else lengths[:, None, None].to(dtype)
        share = d_strips.to(dtype) / count / width
        strip_share = share[..., None].expand(-1, -1, -1, width).reshape(clips, channels, positions)

    def add_upstream(g: Tensor, t: int) -> None:
        if ds is not None:
            g += ds[:, t]
        if strip_share is not None:
            g += strip_share if lengths is None else strip_share.masked_fill(~_alive(lengths, steps_total)[:, t], 0)

    dx_out = x.new_empty(x.shape).view(clips, steps_total, channels, positions) if need_x else None
    d_w = torch.zeros_like(gate.w)
    half = gate.recurrent.shape[1]
    d_recurrent, d_hoisted = (d_w[:, half:], d_w[:, :half]) if inputs == "raw" else (d_w[:, :half], d_w[:, half:])
    d_gamma, d_beta = torch.zeros_like(gate.gamma), torch.zeros_like(gate.beta)
    d_w_s1, d_w_s2, d_w_c = (None if v is None else torch.zeros_like(v) for v in (gate.w_s1, gate.w_s2, gate.w_c))

    carry = x.new_zeros((clips, channels, positions), dtype=dtype)
    a, z, scratch = (empty(clips, channels, positions) for _ in range(3))
    du_next: Tensor | None = None
    for t in range(steps_total - 1, start - 1, -1):
        n = t - start
        z_s = saved_z_s[n] if gate.w_s2 is not None else None
        z_c = saved_z_c[n] if gate.w_c is not None else None
        g = carry
        add_upstream(g, t)
        torch.sub(frames[t], refined[t - 1], out=a)
        _sigmoid_gate(z_s, z_c, out=z)
        dl = torch.sub(1, z, out=scratch)
        z *= g
        zg, dl = z, dl.mul_(a).mul_(z)

        if training:
            step_var, step_mean = var[t], mean[t]
        uhat, r = gate.uhat(u[n], step_var, step_mean)
        y = gate.y(uhat)
        dy = torch.zeros_like(y)
        if z_s is not None and gate.w_s1 is not None and gate.w_s2 is not None:
            dz_s = dl.sum(1) if z_c is None else torch.bmm(z_c[:, None], dl)[:, 0]  # (B, P)
            h = saved_h[n]
            dh = (dz_s @ gate.w_s2).mul_(h > 0)
            dy += (dh @ gate.w_s1).div_(d)[:, None]
            if need_weights and d_w_s1 is not None and d_w_s2 is not None:
                d_w_s2.addmm_(dz_s.t(), h)
                d_w_s1.addmm_(dh.t(), y.mean(1))
        if z_c is not None and gate.w_c is not None:
            dz_c = dl.sum(2) if z_s is None else torch.bmm(dl, z_s[:, :, None])[..., 0]  # (B, C)
            dy += (dz_c @ gate.w_c).div_(positions)[:, :, None]
            if need_weights and d_w_c is not None:
                d_w_c.addmm_(dz_c.t(), y.mean(2))
        dy = gate.grouped(dy.mul_(y > 0))
        sum_dy, sum_dy_uhat = dy.sum((1, 3)), (dy * uhat).sum((1, 3))  # (groups, D)
        d_beta += sum_dy.sum(0)
        d_gamma += sum_dy_uhat.sum(0)
        if training:
            dy -= (sum_dy / per_group)[:, None, :, None]
            dy -= uhat.mul_((sum_dy_uhat / per_group)[:, None, :, None])
        du = dy.mul_(r * gate.gamma[:, None]).view(clips, d, positions)

        if need_weights:
            operand = refined[t - 1] if inputs == "raw" else a
            d_recurrent.addbmm_(du, operand.mT)
            if inputs != "appearance":
                d_hoisted.addbmm_(du, frames.hoistable(inputs, t, out=scratch).mT)
        if inputs == "raw":
            carry = g.sub_(zg).baddbmm_(_product(recurrent_t, du), du)
        else:
            zg.baddbmm_(_product(recurrent_t, du), du)
            carry = g.sub_(zg)
        if dx_out is not None:
            if inputs != "appearance":
                motion = du if inputs == "raw" or du_next is None else du - du_next
                zg.baddbmm_(_product(hoisted_t, motion), motion)
            dx_out[:, t] = zg
        du_next = du
    return_state = inputs == "appearance+motion" and du_next is not None
    d_motion = torch.bmm(_product(hoisted_t, du_next), du_next).neg_() if return_state and du_next is not None else None
    d_state_x = d_state_s = None
    if start == 0:
        maps = (clips, channels, height, width)
        d_state_s = carry.view(maps).to(x.dtype)
        d_state_x = (torch.zeros_like(carry) if d_motion is None else d_motion).view(maps).to(x.dtype)
    elif dx_out is not None:
        add_upstream(carry, 0)
        dx_out[:, 0] = carry if d_motion is None else carry.add_(d_motion)
    dx = None if dx_out is None else dx_out.view(x.shape)
    if not need_weights:
        return dx, None, None, None, None, None, None, d_state_x, d_state_s
    weights = [
        None if grad is None or like is None else grad.to(like.dtype)
        for grad, like in ((d_w, w), (d_gamma, gamma), (d_beta, beta), (d_w_s1, w_s1), (d_w_s2, w_s2), (d_w_c, w_c))
    ]
    return dx, *weights, d_state_x, d_state_s
