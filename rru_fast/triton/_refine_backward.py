"""The backward of `refine`: which kernel is launched when, and on what."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rru_fast.ranks import Ranks
from rru_fast.triton import _host as host
from rru_fast.triton import _refine_backward_kernels as kernels
from rru_fast.triton._host import Maps, power_of_2
from rru_fast.triton._plans import Meta, Plan
from rru_fast.triton._refine_call import NO_FRAME, Call
from rru_fast.triton._refine_weights import outer, w_gradient


def plans(call: Call) -> tuple[Plan, dict[str, list[Meta]]]:
    """A plan for the backward, and what else might be faster."""
    processors, dtype = host.processors(call.x.tensor), call.x.tensor.dtype
    _, how = host.factors(dtype)
    exact = how == "ieee" and dtype.itemsize >= 4
    factor = torch.float32 if dtype == torch.float16 else dtype
    even = host.even(call.x.tensor, 3)
    block_k, depth = host.depth(factor, how), host.depth(factor, how, even)
    all_positions = power_of_2(call.positions)
    block_p = min(64, max(16, all_positions))

    def maps(block_c: int, block_k: int, warps: int, stages: int = 2) -> Meta:
        block_c = min(block_c, max(16, power_of_2(call.channels)))
        blocks = {"BLOCK_C": block_c, "BLOCK_P": block_p, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}
        return blocks if even else {**blocks, **host.ALL_REGISTERS}

    def gate(block_d: int, warps: int) -> Meta:
        block_d = max(1, min(block_d, power_of_2(call.d), 4096 // all_positions))
        block_a = max(1, min(32, power_of_2(max(1, call.a)), 4096 // all_positions))
        blocks = {"BLOCK_P": all_positions, "BLOCK_D": block_d, "BLOCK_A": block_a}
        return {**blocks, "num_warps": warps, **host.ALL_REGISTERS}

    def norm(block_d: int, warps: int) -> Meta:
        return {"BLOCK_D": min(block_d, power_of_2(call.d)), "BLOCK_P": block_p, "num_warps": warps}

    def weights(block_d: int, block_c: int, block_k: int, waves: int, warps: int, stages: int) -> Meta:
        block_d, block_c = (min(b, max(16, power_of_2(n))) for b, n in ((block_d, call.d), (block_c, call.channels)))
        tiles = -(-call.d // block_d) * -(-call.channels // block_c) * (1 if call.w_x is None else 2)
        pieces = max(1, call.steps) * call.clips * -(-call.positions // block_k)
        split = max(1, min(waves * processors // tiles, pieces, 32))
        blocks = {"BLOCK_D": block_d, "BLOCK_C": block_c, "BLOCK_K": block_k, "SPLIT": split}
        return {**blocks, "num_warps": warps, "num_stages": stages, **host.ALL_REGISTERS}

    # A thread that takes an address for each element has fewer registers left for the tile.
    warps, most = 8 if exact or dtype == torch.float16 or not even else 4, 64 if exact else 128
    plan = {
        "maps": maps(64, min(block_k, 32), warps),
        "gate": gate(32, 4),
        "norm": norm(32, 4),
        "weights": weights(most, most, depth, 1, 8, 3),
        "outer": {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4},
    }
    gates = [gate(16, 4), gate(32, 8), gate(64, 8)]
    if exact:
        return plan, {"maps": [maps(32, block_k, 8)], "gate": gates, "weights": [weights(64, 64, depth, 2, 8, 3)]}
    return plan, {
        # Of float32 a tile of 128 channels does not fit the registers.
        "maps": [maps(block_c, block_k, 8) for block_c in ((64, 128) if dtype.itemsize == 2 else (64,))]
        + [maps(32, block_k, 4)],
        "gate": gates,
        "weights": [weights(128, 128, depth, 2, 8, 3), weights(64, 128, min(depth, 32), 1, 4, 3)],
    }


class Saved(NamedTuple):
    """What the forward left; shapes as in rru_fast::refine."""

    refined: Maps
    mean: Tensor
    var: Tensor
    u: Tensor
    z_s: Tensor
    z_c: Tensor
    h: Tensor


class Upstream(NamedTuple):
    """The outputs' gradients: features' as maps, strips' (B, C, H) over T W."""

    features: Maps | None
    strips: Tensor | None

    def at(self, t: int) -> tuple[Any, ...]:
        """What reaches frame t; nothing at t = -1, the frame of a state."""
        if t < 0:
            return *NO_FRAME, None
        return *(NO_FRAME if self.features is None else self.features.at(t)), self.strips


def upstream_of(call: Call, d_features: Tensor | None, d_strips: Tensor | None) -> Upstream:
    if d_strips is not None:
        frames = call.frames if call.lengths is None else call.lengths.to(call.sum)[:, None, None]
        d_strips = (d_strips.to(call.sum) / frames / call.width).contiguous()
    maps = None if d_features is None else host.maps(d_features)
    call.wide = call.wide or (maps is not None and maps.wide)
    return Upstream(maps, d_strips)


def run(
    call: Call,
    plan: Plan,
    saved: Saved,
    upstream: Upstream,
    need_x: bool,
    need_weights: bool,
    ranks: Ranks | None,
) -> tuple[Tensor | None, list[Tensor | None], tuple[Tensor | None, Tensor | None]]:
    """Gradients of x; of w, gamma, beta, w_s1, w_s2, w_c; of state_x, state_s. ranks: as in the forward."""
    x = call.x.tensor
    clips, channels, start, steps = call.clips, call.channels, call.start, call.steps
    d_x = x.new_empty(x.shape) if need_x else None
    du = call.empty(steps, clips, call.d, call.positions)
    maps = _Maps(call, plan, saved, upstream)
    gate = _GateBackward(call, plan, saved, maps.blocks, need_weights, ranks)
    for n in range(steps - 1, -1, -1):
        maps.step(n, du, d_x, gate.d_z_c)
        gate.step(n, maps.d_z_s, maps.d_pooled, du[n])
    maps.step(-1, du, d_x, None)
    d_state: tuple[Tensor | None, Tensor | None] = (None, None)
    if start == 1:
        if d_x is not None:
            maps.end(0, du, d_x[:, 0], call.frames * channels * call.positions)
    else:
        d_state_s = maps.g.to(x.dtype, copy=True)
        d_state_x = torch.empty_like(d_state_s)
        maps.g.zero_()
        maps.end(-1, du, d_state_x, channels * call.positions)
        shape = (clips, channels, call.height, call.width)
        d_state = d_state_x.view(shape), d_state_s.view(shape)
    if not need_weights:
        return d_x, [None] * 6, d_state
    return d_x, [w_gradient(call, plan["weights"], saved.refined, du), *gate.weight_gradients(plan["outer"])], d_state


class _Maps:
    """Launches of `maps`, and the gradient that they pass from frame to frame."""

    def __init__(self, call: Call, plan: Plan, saved: Saved, upstream: Upstream) -> None:
        self.call, self.meta, self.saved, self.upstream = call, plan["maps"], saved, upstream
        self.blocks = -(-call.channels // self.meta["BLOCK_C"])
        self.g = call.empty(call.clips, call.channels, call.positions)
        self.d_z_s = call.empty(call.clips, self.blocks, call.positions) if call.w_s1 is not None else None
        self.d_pooled = call.empty(call.clips, self.blocks, call.d) if call.w_c is not None else None

    def step(self, n: int, du: Tensor, d_x: Tensor | None, d_z_c: Tensor | None) -> None:
        """End step n + 1 with its dX, begin step n; step -1 is the frame before the first gate."""
        call, t = self.call, self.call.start + n
        begun = (*self.upstream.at(t), *[None] * 14)
        if n >= 0:
            s = call.state_s.at(0) if t == 0 and call.state_s is not None else self.saved.refined.at(t - 1)
            sums = (self.d_z_s, None if d_z_c is None else d_z_c[n], self.d_pooled)
            begun = (*self.upstream.at(t), *call.x.at(t), *s, *self._vectors(n), call.w_c, *sums)
        ends = n + 1 < call.steps
        ended = d_x[:, t + 1] if d_x is not None and ends else None
        self._launch(n + 1, du, ended, call.frames * call.channels * call.positions, begun, t)

    def end(self, t: int, du: Tensor, d_x: Tensor, d_x_clip: int) -> None:
        """dX_t of the frame before the first gate: G_t, and what the motion from it brings."""
        self._launch(-1, du, d_x, d_x_clip, None, t)

    def _vectors(self, n: int) -> tuple[Tensor | None, Tensor | None]:
        """z_s and z_c of a step."""
        if not 0 <= n < self.call.steps:
            return None, None
        z_s, z_c = self.saved.z_s, self.saved.z_c
        return z_s[n] if len(z_s) else None, z_c[n] if len(z_c) else None

    def _launch(
        self, ended: int, du: Tensor, d_x: Tensor | None, d_x_clip: int, begun: tuple[Any, ...] | None, t: int
    ) -> None:
        """End step `ended`, if there is one, and begin frame t with what is `begun`, if anything."""
        call = self.call
        motion = call.inputs == "appearance+motion" and ended + 1 < call.steps
        factor, how = host.factors(call.x.tensor.dtype)
        host.launch(
            kernels.maps_kernel,
            (call.clips, self.blocks),
            self.g,
            d_x,
            d_x_clip,
            du[ended] if 0 <= ended < call.steps else None,
            du[ended + 1] if motion else None,
            call.w_s,
            call.w_s.stride(0),
            call.w_x,
            0 if call.w_x is None else call.w_x.stride(0),
            *self._vectors(ended),
            *([None] * 19 if begun is None else begun),
            call.lengths,
            t,
            call.channels,
            D=call.d,
            P=call.positions,
            W=call.width,
            END=ended < call.steps,
            BEGIN=begun is not None,
            RAW=call.inputs == "raw",
            DOT=factor,
            WIDE=call.wide,
            PRECISION=how,
            **self.meta,
        )


class _GateBackward:
    """Launches of `gate_backward` and `norm_backward`, and what they leave for the weights' gradients."""

    def __init__(
        self, call: Call, plan: Plan, saved: Saved, blocks: int, need_weights: bool, ranks: Ranks | None
    ) -> None:
        self.call, self.saved, self.blocks, self.ranks = call, saved, blocks, ranks
        self.elements = call.clips_per_group * call.positions if ranks is None else ranks.elements
        self.gate, self.norm = plan["gate"], plan["norm"]
        steps, clips, d = call.steps, call.clips, call.d
        self.tiles = -(-d // self.gate["BLOCK_D"])
        spatial = call.w_s1 is not None
        self.a = call.empty(clips, call.positions) if spatial else None
        self.b = call.empty(clips, d)
        self.d_z_s = call.empty(steps, clips, call.positions) if spatial else None
        self.d_h = call.empty(steps, clips, call.a) if spatial else None
        self.d_z_c = call.empty(steps, clips, call.channels) if call.w_c is not None else None
        self.y_positions = call.empty(steps, clips, self.tiles, call.positions) if need_weights else None
        self.y_channels = call.empty(steps, clips, d) if need_weights else None
        self.dy, self.dy_uhat = call.empty(steps, clips, d), call.empty(steps, clips, d)
        self.group_dy, self.group_dy_uhat = (call.empty(call.groups, d) if call.training else None for _ in range(2))
        self.arrivals = call.counters(call.groups * self.tiles)

    def step(self, n: int, d_z_s: Tensor | None, d_pooled: Tensor | None, du: Tensor) -> None:
        """du (B, D, P) of step n from the blocks' sums of dz_s and of W_c^T dz_c."""
        call, saved = self.call, self.saved
        mean, var = (v[call.start + n] if call.training else v for v in (saved.mean, saved.var))
        norm = (call.gamma, call.beta, mean, var)

        def at_step(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[n]

        host.launch(
            kernels.gate_backward_kernel,
            (call.clips, self.tiles),
            d_z_s,
            d_pooled,
            self.blocks,
            saved.u[n],
            *norm,
            call.w_s1,
            call.w_s2,
            saved.h[n] if len(saved.h) else None,
            self.a,
            self.b,
            at_step(self.d_z_s),
            at_step(self.d_h),
            at_step(self.y_positions),
            at_step(self.y_channels),
            self.dy[n],
            self.dy_uhat[n],
            self.group_dy,
            self.group_dy_uhat,
            None if call.training else du,
            self.arrivals,
            call.clips_per_group,
            D=call.d,
            A=call.a,
            P=call.positions,
            EPS=call.eps,
            **self.gate,
        )
        if call.training:
            assert self.group_dy is not None and self.group_dy_uhat is not None
            sums: tuple[Tensor, ...] = (self.group_dy, self.group_dy_uhat)
            if self.ranks is not None:
                sums = self.ranks.total(*sums)
            host.launch(
                kernels.norm_backward_kernel,
                (call.clips, -(-call.d // self.norm["BLOCK_D"])),
                du,
                saved.u[n],
                *norm,
                self.a,
                self.b,
                *sums,
                self.elements,
                call.clips_per_group,
                D=call.d,
                P=call.positions,
                EPS=call.eps,
                **self.norm,
            )

    def weight_gradients(self, meta: Meta) -> list[Tensor | None]:
        """Of gamma, beta, w_s1, w_s2, w_c."""
        call = self.call
        d_s1 = d_s2 = d_c = None
        if self.d_h is not None and self.d_z_s is not None and self.y_positions is not None:
            d_s1 = outer(self.d_h, self.y_positions.sum(2) / call.d, meta)
            d_s2 = outer(self.d_z_s, self.saved.h, meta)
        if self.d_z_c is not None and self.y_channels is not None:
            d_c = outer(self.d_z_c, self.y_channels, meta)
        return [self.dy_uhat.sum((0, 1)), self.dy.sum((0, 1)), d_s1, d_s2, d_c]
