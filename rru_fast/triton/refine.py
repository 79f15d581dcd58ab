"""`refine` in two launches a frame forward and three backward; everything that need not wait its turn in one each.

Forward: the part of U that does not hold S in one launch over all frames, then a frame at a time `transition`, which
adds the rest and takes the batch statistics, and `gate`, which blends and pools the strips. Backward: the mirror, in
_refine_backward.py. Nothing waits for the host, sums have a fixed order, and the whole captures into a CUDA graph.
Beside 16-bit maps S is carried from frame to frame in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rru_fast.triton import _host as host
from rru_fast.triton import _refine_backward as backward_kernels
from rru_fast.triton import _refine_forward as forward_kernels
from rru_fast.triton._host import Maps, power_of_2
from rru_fast.triton._plans import Meta, Plan, tuned

# What stands for maps, of many frames and of one, that there are not.
NOTHING = (None, 0, 0, 0, 0)
NO_FRAME = (None, 0, 0, 0)


@dataclass
class Call:
    """The arguments of one call as the kernels of both passes take them."""

    x: Maps
    w: Tensor  # (D, C) or (D, 2C), in the maps' dtype
    gamma: Tensor
    beta: Tensor
    w_s1: Tensor | None
    w_s2: Tensor | None
    w_c: Tensor | None
    lengths: Tensor | None
    state_x: Maps | None
    state_s: Maps | None
    inputs: str
    groups: int
    training: bool
    eps: float

    def __post_init__(self) -> None:
        self.clips, self.frames, self.channels, self.height, self.width = self.x.tensor.shape
        self.positions = self.height * self.width
        self.d = self.w.shape[0]
        self.a = 0 if self.w_s1 is None else self.w_s1.shape[0]
        self.start = 0 if self.state_s is not None else 1
        self.steps = self.frames - self.start
        self.sum = torch.promote_types(self.x.tensor.dtype, torch.float32)
        self.keeps_state = self.x.tensor.dtype != self.sum
        self.clips_per_group = self.clips // self.groups
        read = [maps for maps in (self.x, self.state_x, self.state_s) if maps is not None]
        self.wide = self.channels * self.positions >= 2**31 or any(maps.wide for maps in read)
        first, second = (self.w, None) if self.inputs == "appearance" else self.w.chunk(2, 1)
        self.w_s, self.w_x = (second, first) if self.inputs == "raw" else (first, second)

    def empty(self, *shape: int) -> Tensor:
        """Uninitialised, in the type of arithmetic."""
        return self.x.tensor.new_empty(shape, dtype=self.sum)

    def counters(self, count: int) -> Tensor:
        """Where programs count who has arrived."""
        return self.x.tensor.new_zeros(count, dtype=torch.int32)

    def kind(self) -> tuple[Any, ...]:
        """What a plan depends on, beside the dtype."""
        sizes = (self.clips, self.channels, self.height, self.width, self.d, self.a, self.groups)
        layout = "channels-last" if self.x.channel == 1 and self.channels > 1 else "NCHW"
        return *sizes, self.inputs, self.training, layout, host.precision(self.x.tensor.dtype)

    def unlike_s(self) -> list[tuple[int, int, Maps, Maps | None]]:
        """What the weights w_x see at all steps, as runs of (first step, one past the last, maps, subtracted maps)."""
        if self.inputs == "raw":
            return [(0, self.steps, _frames(self.x, self.start), None)]
        runs: list[tuple[int, int, Maps, Maps | None]] = []
        if self.start == 0:
            runs.append((0, 1, self.x, self.state_x))
        if self.frames > 1:
            runs.append((1 - self.start, self.steps, _frames(self.x, 1), self.x))
        return runs


def _frames(maps: Maps, first: int) -> Maps:
    """The frames from `first` on."""
    return maps._replace(tensor=maps.tensor[:, first:])


def make_call(
    x: Tensor,
    w: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w_s1: Tensor | None,
    w_s2: Tensor | None,
    w_c: Tensor | None,
    lengths: Tensor | None,
    state_x: Tensor | None,
    state_s: Tensor | None,
    inputs: str,
    training: bool,
    eps: float,
    bn_groups: int,
) -> Call:
    """Copies of what does not lie as the kernels need it."""
    return Call(
        host.maps(x),
        w.to(x.dtype).contiguous(),
        gamma.contiguous(),
        beta.contiguous(),
        None if w_s1 is None else w_s1.contiguous(),
        None if w_s2 is None else w_s2.contiguous(),
        None if w_c is None else w_c.contiguous(),
        lengths,
        None if state_x is None else host.maps(state_x[:, None]),
        None if state_s is None else host.maps(state_s[:, None]),
        inputs,
        bn_groups if training else 1,
        training,
        eps,
    )


def forward_plans(call: Call) -> tuple[Plan, dict[str, list[Meta]]]:
    """A plan for the forward, and what else might be faster."""
    processors = host.processors(call.x.tensor)
    dtype, how = call.x.tensor.dtype, host.precision(call.x.tensor.dtype)
    block_p = min(64, max(16, power_of_2(call.positions)))
    columns = call.clips * -(-call.positions // block_p)
    block_k, exact = host.depth(dtype, how), how == "ieee" and dtype.itemsize >= 4

    def product(block_d: int, block_k: int, split: int, warps: int, stages: int) -> Meta:
        blocks = {"BLOCK_D": min(block_d, max(16, power_of_2(call.d))), "BLOCK_P": block_p, "BLOCK_K": block_k}
        return {**blocks, "SPLIT": split, "num_warps": warps, "num_stages": stages}

    def transition(block_d: int, block_k: int, waves: int, warps: int = 4, stages: int = 3) -> Meta:
        tiles = columns * -(-call.d // block_d)
        split = max(1, min(waves * processors // tiles, -(-call.channels // block_k), 32))
        return product(block_d, block_k, split, warps, stages)

    def gate(programs: int, block_c: int, warps: int) -> Meta:
        q = power_of_2(call.height) * power_of_2(call.width)
        chunk = power_of_2(max(16, min(256, call.channels * call.clips // programs)))
        return {
            "CHUNK": chunk,
            "BLOCK_C": min(chunk, max(1, min(block_c, 8192 // q))),
            "BLOCK_D": max(1, min(32, power_of_2(call.d), 4096 // q)),
            "BLOCK_A": max(1, min(32, power_of_2(max(1, call.a)), 4096 // q)),
            "num_warps": warps,
        }

    # Without matrix units a tile is what the registers of 8 warps hold.
    most = 64 if exact else 128
    narrow = min(32 if columns * 8 < processors else most, most)
    plan = {
        "hoist": product(most, block_k, 1, 8, 3),
        "transition": transition(narrow, block_k, 1, 8 if exact else 4),
        "gate": gate(processors, 64, 8),
    }
    gates = [gate(2 * processors, 64, 4), gate(2 * processors, 32, 8), gate(processors // 2, 64, 8)]
    if exact:
        return plan, {
            "hoist": [product(32, block_k, 1, 4, 3)],
            "transition": [transition(64, block_k, 2, 8), transition(32, block_k, 1)],
            "gate": gates,
        }
    return plan, {
        "hoist": [product(256, block_k, 1, 8, 3), product(128, block_k // 2, 1, 4, 4), product(64, block_k, 1, 4, 3)],
        "transition": [
            transition(64, block_k, 1),
            transition(64, block_k, 2),
            transition(128, block_k, 2),
            transition(256, block_k, 1, 8),
        ],
        "gate": gates,
    }


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
    with host.on_device(x):
        call = make_call(
            x, w, gamma, beta, w_s1, w_s2, w_c, lengths, state_x, state_s, inputs, training, eps, bn_groups
        )
        if training:
            mean, var = (x.new_zeros((call.frames, bn_groups, call.d), dtype=call.sum) for _ in range(2))
        else:
            assert running_mean is not None and running_var is not None
            mean, var = running_mean.contiguous(), running_var.contiguous()
        plan = tuned(
            "refine", call.kind(), x, *forward_plans(call), lambda plan: _forward(call, plan, mean, var, save)
        )
        outputs = _forward(call, plan, mean, var, save)
        if not training:
            mean, var = call.empty(0, bn_groups, call.d), call.empty(0, bn_groups, call.d)
        return *outputs[:2], mean, var, *outputs[2:]


def _forward(call: Call, plan: Plan, mean: Tensor, var: Tensor, save: bool) -> tuple[Tensor, ...]:
    """features, strips, u, z_s, z_c, h; in training `mean` and `var` are filled, else they are the running ones."""
    x = call.x.tensor
    clips, channels, steps = call.clips, call.channels, call.steps
    features = x.new_empty(x.shape)
    refined = host.maps(features)
    strips = call.empty(clips, channels, call.height)
    u = call.empty(steps, clips, call.d, call.positions)
    kept = steps if save else 0
    h = call.empty(kept if call.w_s1 is not None else 0, clips, call.a)
    z_s = call.empty(kept if call.w_s1 is not None else 0, clips, call.positions)
    # `gate` passes z_c on to itself through memory, so there is always one.
    z_c = call.empty((steps if save else 1) if call.w_c is not None else 0, clips, channels)
    state = Maps(call.empty(clips, 1, channels, call.height, call.width), channels * call.positions, 0, call.positions, 1)

    transition = _Transition(call, plan)
    if call.w_x is not None:
        for first, end, maps, subtracted in call.unlike_s():
            transition.hoisted(u[first:end], maps, subtracted, call.start + first)

    gate = _Gate(call, plan, refined, state if call.keeps_state else None, strips)
    if call.start == 1:
        if call.inputs == "raw" and call.training:  # the gate's one real input at the first frame, for its statistics
            first_u = call.empty(1, clips, call.d, call.positions)
            transition.hoisted(first_u, call.x, None, 0)
            transition.step(first_u[0], 0, call.x.at(0), mean[0], var[0])
        gate.launch(0, None, None, NO_FRAME, mean, var)
    for n in range(steps):
        t = call.start + n
        if t == 0:
            assert call.state_s is not None
            s = call.state_s.at(0)
        else:
            s = state.at(0) if call.keeps_state else refined.at(t - 1)
        step_mean, step_var = (mean[t], var[t]) if call.training else (mean, var)
        transition.step(u[n], t, s, step_mean, step_var)
        vectors = tuple(v[n if save else 0] if len(v) else None for v in (h, z_s, z_c))
        gate.launch(t, u[n], vectors, s, step_mean, step_var)
    if call.lengths is None:
        strips /= call.frames * call.width
    else:
        strips /= (call.lengths * call.width).to(call.sum)[:, None, None]
    none_kept = call.empty(0, clips, call.d, call.positions)
    return features, strips.to(x.dtype), u if save else none_kept, z_s, z_c[:kept], h


class _Transition:
    """Launches of `transition`, with the scratch memory that they share."""

    def __init__(self, call: Call, plan: Plan) -> None:
        self.call, self.meta, self.hoist = call, plan["transition"], plan["hoist"]
        self.d_tiles = -(-call.d // self.meta["BLOCK_D"])
        self.p_tiles = -(-call.positions // self.meta["BLOCK_P"])
        tiles = call.clips * self.p_tiles
        split = self.meta["SPLIT"]
        self.partial = call.empty(tiles * self.d_tiles * split * self.meta["BLOCK_D"] * self.meta["BLOCK_P"])
        self.arrivals = call.counters((tiles + call.groups) * self.d_tiles)
        self.tile_mean, self.tile_square = call.empty(tiles, call.d), call.empty(tiles, call.d)
        self.precision = host.precision(call.x.tensor.dtype)

    def hoisted(self, u: Tensor, maps: Maps, subtracted: Maps | None, first: int) -> None:
        """u (F, B, D, P) = W_x (maps - subtracted), for all frames at once."""
        call, meta = self.call, self.hoist
        assert call.w_x is not None
        tiles = -(-call.d // meta["BLOCK_D"]) * -(-call.positions // meta["BLOCK_P"])
        host.launch(
            forward_kernels.transition_kernel,
            (len(u) * call.clips * tiles, 1),
            u,
            *maps,
            *(NOTHING if subtracted is None else subtracted),
            call.w_x,
            call.w_x.stride(0),
            *[None] * 6,
            call.lengths,
            first,
            call.clips,
            call.channels,
            call.clips_per_group,
            D=call.d,
            P=call.positions,
            ADD=False,
            WIDE=call.wide,
            PRECISION=self.precision,
            **meta,
        )

    def step(self, u: Tensor, t: int, s: tuple[Any, ...], mean: Tensor, var: Tensor) -> None:
        """u (B, D, P) += W_s times S, or X_t - S; in training with the statistics of U, (groups, D)."""
        call, meta = self.call, self.meta
        tensor, clip, channel, position = s
        s_maps = (tensor, clip, 0, channel, position)
        x_t, x_clip, x_channel, x_position = call.x.at(t)
        x_maps = (x_t, x_clip, 0, x_channel, x_position)
        host.launch(
            forward_kernels.transition_kernel,
            (call.clips * self.p_tiles * self.d_tiles, meta["SPLIT"]),
            u,
            *(s_maps if call.inputs == "raw" else x_maps),
            *(NOTHING if call.inputs == "raw" else s_maps),
            call.w_s,
            call.w_s.stride(0),
            self.partial,
            self.arrivals,
            self.tile_mean,
            self.tile_square,
            mean if call.training else None,
            var if call.training else None,
            call.lengths,
            t,
            call.clips,
            call.channels,
            call.clips_per_group,
            D=call.d,
            P=call.positions,
            ADD=call.w_x is not None,
            WIDE=call.wide,
            PRECISION=self.precision,
            **meta,
        )


class _Gate:
    """Launches of `gate`."""

    def __init__(self, call: Call, plan: Plan, refined: Maps, state: Maps | None, strips: Tensor) -> None:
        self.call, self.meta = call, plan["gate"]
        self.refined, self.strips = refined, strips
        self.state = None if state is None else state.tensor

    def launch(
        self, t: int, u: Tensor | None, vectors: Any, s: tuple[Any, ...], mean: Tensor, var: Tensor
    ) -> None:
        """S_t and its strips from u (B, D, P) and S_{t-1}; vectors: where h, z_s and z_c go. Without u: S_t = X_t."""
        call = self.call
        host.launch(
            forward_kernels.gate_kernel,
            (-(-call.channels // self.meta["CHUNK"]), call.clips),
            self.refined.tensor[:, t],
            self.refined.clip,
            self.state,
            self.strips,
            *call.x.at(t),
            *s,
            u,
            call.gamma,
            call.beta,
            mean,
            var,
            call.w_s1,
            call.w_s2,
            call.w_c,
            *((None, None, None) if vectors is None else vectors),
            call.lengths,
            t,
            call.channels,
            call.clips_per_group,
            D=call.d,
            A=call.a,
            H=call.height,
            W=call.width,
            EPS=call.eps,
            FIRST=t == 0,
            WIDE=call.wide,
            BLOCK_H=power_of_2(call.height),
            BLOCK_W=power_of_2(call.width),
            **self.meta,
        )


def backward_plans(call: Call) -> tuple[Plan, dict[str, list[Meta]]]:
    """A plan for the backward, and what else might be faster."""
    processors, dtype = host.processors(call.x.tensor), call.x.tensor.dtype
    _, how = host.factors(dtype)
    exact = how == "ieee" and dtype.itemsize >= 4
    block_k = host.depth(torch.float32 if dtype == torch.float16 else dtype, how)
    all_positions = power_of_2(call.positions)
    block_p = min(64, max(16, all_positions))

    def maps(block_c: int, block_k: int, warps: int, stages: int = 2) -> Meta:
        block_c = min(block_c, max(16, power_of_2(call.channels)))
        return {"BLOCK_C": block_c, "BLOCK_P": block_p, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}

    def gate(block_d: int, warps: int) -> Meta:
        block_d = max(1, min(block_d, power_of_2(call.d), 4096 // all_positions))
        block_a = max(1, min(32, power_of_2(max(1, call.a)), 4096 // all_positions))
        return {"BLOCK_P": all_positions, "BLOCK_D": block_d, "BLOCK_A": block_a, "num_warps": warps}

    def norm(block_d: int, warps: int) -> Meta:
        return {"BLOCK_D": min(block_d, power_of_2(call.d)), "BLOCK_P": block_p, "num_warps": warps}

    def weights(block_d: int, block_c: int, block_k: int, waves: int, warps: int, stages: int) -> Meta:
        block_d, block_c = (min(b, max(16, power_of_2(n))) for b, n in ((block_d, call.d), (block_c, call.channels)))
        tiles = -(-call.d // block_d) * -(-call.channels // block_c) * (1 if call.w_x is None else 2)
        pieces = max(1, call.steps) * call.clips * -(-call.positions // block_k)
        split = max(1, min(waves * processors // tiles, pieces, 32))
        blocks = {"BLOCK_D": block_d, "BLOCK_C": block_c, "BLOCK_K": block_k, "SPLIT": split}
        return {**blocks, "num_warps": warps, "num_stages": stages}

    warps, most = (8, 64) if exact else (4, 128)
    plan = {
        "maps": maps(64, min(block_k, 32), warps),
        "gate": gate(32, 4),
        "norm": norm(32, 4),
        "weights": weights(most, most, block_k, 1, 8, 3),
        "outer": {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4},
    }
    gates = [gate(16, 4), gate(64, 8)]
    if exact:
        return plan, {"maps": [maps(32, block_k, 8)], "gate": gates, "weights": [weights(64, 64, block_k, 2, 8, 3)]}
    return plan, {
        "maps": [maps(64, block_k, 8), maps(128, block_k, 8), maps(32, block_k, 4)],
        "gate": gates,
        "weights": [weights(128, 128, block_k, 2, 8, 3), weights(64, 128, block_k, 1, 4, 3)],
    }


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
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w, gamma, beta, w_s1, w_s2, w_c, state_x, state_s; None where not needed or without an argument."""
    with host.on_device(x):
        call = make_call(
            x, w, gamma, beta, w_s1, w_s2, w_c, lengths, state_x, state_s, inputs, training, eps, bn_groups
        )
        if not training:
            assert running_mean is not None and running_var is not None
            mean, var = running_mean.contiguous(), running_var.contiguous()
        saved = Saved(host.maps(features), mean, var, u, z_s, z_c, h)
        upstream = _upstream(call, d_features, d_strips)
        plan = tuned(
            "refine_backward",
            (*call.kind(), need_x, need_weights),
            x,
            *backward_plans(call),
            lambda plan: _backward(call, plan, saved, upstream, need_x, need_weights),
        )
        d_x, d_weights, d_state = _backward(call, plan, saved, upstream, need_x, need_weights)
        like = (w, gamma, beta, w_s1, w_s2, w_c)
        cast = [None if d is None or v is None else d.to(v.dtype) for d, v in zip(d_weights, like, strict=True)]
        return d_x, *cast, *d_state


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


def _upstream(call: Call, d_features: Tensor | None, d_strips: Tensor | None) -> Upstream:
    if d_strips is not None:
        frames = call.frames if call.lengths is None else call.lengths.to(call.sum)[:, None, None]
        d_strips = (d_strips.to(call.sum) / frames / call.width).contiguous()
    maps = None if d_features is None else host.maps(d_features)
    call.wide = call.wide or (maps is not None and maps.wide)
    return Upstream(maps, d_strips)


def _backward(
    call: Call, plan: Plan, saved: Saved, upstream: Upstream, need_x: bool, need_weights: bool
) -> tuple[Tensor | None, list[Tensor | None], tuple[Tensor | None, Tensor | None]]:
    """Gradients of x; of w, gamma, beta, w_s1, w_s2, w_c; of state_x, state_s."""
    x = call.x.tensor
    clips, channels, start, steps = call.clips, call.channels, call.start, call.steps
    d_x = x.new_empty(x.shape) if need_x else None
    du = call.empty(steps, clips, call.d, call.positions)
    maps = _Maps(call, plan, saved, upstream)
    gate = _GateBackward(call, plan, saved, maps.blocks, need_weights)
    for n in range(steps - 1, -1, -1):
        d_z_s, d_pooled = maps.launch(n, du, d_x, gate.d_z_c)
        gate.launch(n, d_z_s, d_pooled, du[n])
    maps.launch(-1, du, d_x, None)
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
    return d_x, [_w_gradient(call, plan, saved, du), *gate.weight_gradients(plan["outer"])], d_state


class _Maps:
    """Launches of `maps`, and the gradient that they pass from frame to frame."""

    def __init__(self, call: Call, plan: Plan, saved: Saved, upstream: Upstream) -> None:
        self.call, self.meta, self.saved, self.upstream = call, plan["maps"], saved, upstream
        self.blocks = -(-call.channels // self.meta["BLOCK_C"])
        self.g = call.empty(call.clips, call.channels, call.positions)
        self.d_z_s = call.empty(call.clips, self.blocks, call.positions) if call.w_s1 is not None else None
        self.d_pooled = call.empty(call.clips, self.blocks, call.d) if call.w_c is not None else None

    def launch(
        self, n: int, du: Tensor, d_x: Tensor | None, d_z_c: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """End step n + 1, begin step n; step -1 is the frame before the first gate."""
        call, t = self.call, self.call.start + n
        gated = n >= 0
        s: tuple[Any, ...] = NO_FRAME
        if gated:
            s = call.state_s.at(0) if t == 0 and call.state_s is not None else self.saved.refined.at(t - 1)
        self._launch(
            *self._ended(n + 1, du),
            None if d_x is None or n + 1 == call.steps else d_x[:, t + 1],
            call.frames * call.channels * call.positions,
            (
                *self.upstream.at(t),
                *(call.x.at(t) if gated else NO_FRAME),
                *s,
                *self._vectors(n),
                call.w_c if gated else None,
                *((self.d_z_s, None if d_z_c is None else d_z_c[n], self.d_pooled) if gated else [None] * 3),
            ),
            t,
            n + 1 < call.steps,
        )
        return self.d_z_s, self.d_pooled

    def end(self, t: int, du: Tensor, d_x: Tensor, d_x_clip: int) -> None:
        """dX_t of the frame before the first gate: G_t, and what the motion from it brings."""
        self._launch(*self._ended(-1, du), d_x, d_x_clip, None, t, True)

    def _ended(self, n: int, du: Tensor) -> tuple[Any, ...]:
        """du, du_next, z_s and z_c of step n."""
        steps = self.call.steps
        motion = self.call.inputs == "appearance+motion" and n + 1 < steps
        return du[n] if 0 <= n < steps else None, du[n + 1] if motion else None, *self._vectors(n)

    def _vectors(self, n: int) -> tuple[Tensor | None, Tensor | None]:
        if not 0 <= n < self.call.steps:
            return None, None
        z_s, z_c = self.saved.z_s, self.saved.z_c
        return z_s[n] if len(z_s) else None, z_c[n] if len(z_c) else None

    def _launch(
        self,
        du: Tensor | None,
        du_next: Tensor | None,
        done_z_s: Tensor | None,
        done_z_c: Tensor | None,
        d_x: Tensor | None,
        d_x_clip: int,
        begun: tuple[Any, ...] | None,
        t: int,
        ends: bool,
    ) -> None:
        call = self.call
        factor, how = host.factors(call.x.tensor.dtype)
        host.launch(
            backward_kernels.maps_kernel,
            (self.blocks, call.clips),
            self.g,
            d_x,
            d_x_clip,
            du,
            du_next,
            call.w_s,
            call.w_s.stride(0),
            call.w_x,
            0 if call.w_x is None else call.w_x.stride(0),
            done_z_s,
            done_z_c,
            *([None] * 19 if begun is None else begun),
            call.lengths,
            t,
            call.channels,
            D=call.d,
            P=call.positions,
            W=call.width,
            END=ends,
            BEGIN=begun is not None,
            RAW=call.inputs == "raw",
            DOT=factor,
            WIDE=call.wide,
            PRECISION=how,
            **self.meta,
        )


class _GateBackward:
    """Launches of `gate_backward` and `norm_backward`, and what they leave for the weights' gradients."""

    def __init__(self, call: Call, plan: Plan, saved: Saved, blocks: int, need_weights: bool) -> None:
        self.call, self.saved, self.blocks = call, saved, blocks
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
        self.group_dy, self.group_dy_uhat = (
            call.empty(call.groups, d) if call.training else None for _ in range(2)
        )
        self.arrivals = call.counters(call.groups * self.tiles)

    def launch(self, n: int, d_z_s: Tensor | None, d_pooled: Tensor | None, du: Tensor) -> None:
        """du (B, D, P) of step n from the blocks' sums of dz_s and of W_c^T dz_c."""
        call, saved = self.call, self.saved
        mean, var = (v[call.start + n] if call.training else v for v in (saved.mean, saved.var))
        norm = (call.gamma, call.beta, mean, var)

        def at_step(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[n]

        host.launch(
            backward_kernels.gate_backward_kernel,
            (self.tiles, call.clips),
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
            host.launch(
                backward_kernels.norm_backward_kernel,
                (-(-call.d // self.norm["BLOCK_D"]), call.clips),
                du,
                saved.u[n],
                *norm,
                self.a,
                self.b,
                self.group_dy,
                self.group_dy_uhat,
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
            d_s1 = _outer(self.d_h, self.y_positions.sum(2) / call.d, meta)
            d_s2 = _outer(self.d_z_s, self.saved.h, meta)
        if self.d_z_c is not None and self.y_channels is not None:
            d_c = _outer(self.d_z_c, self.y_channels, meta)
        return [self.dy_uhat.sum((0, 1)), self.dy.sum((0, 1)), d_s1, d_s2, d_c]


def _outer(left: Tensor, right: Tensor, meta: Meta) -> Tensor:
    """left^T right, (M, N), of (N steps, B, M) and (N steps, B, N), summed over steps and clips."""
    m, n = left.shape[2], right.shape[2]
    out = left.new_empty(m, n)
    grid = (-(-m // meta["BLOCK_M"]), -(-n // meta["BLOCK_N"]))
    host.launch(
        backward_kernels.outer_kernel, grid, out, left, right, left.shape[0] * left.shape[1], m, n, **meta
    )
    return out


def _w_gradient(call: Call, plan: Plan, saved: Saved, du: Tensor) -> Tensor:
    """The gradient of w (D, C) or (D, 2C)."""
    d_w = call.empty(*call.w.shape)
    first, second = (d_w, None) if call.inputs == "appearance" else d_w.chunk(2, 1)
    d_w_s, d_w_x = (second, first) if call.inputs == "raw" else (first, second)
    like_s: list[tuple[int, int, Maps, Maps | None]] = []
    if call.state_s is not None:
        like_s.append((0, 1, call.x, call.state_s))
    if call.frames > 1:
        like_s.append((1 - call.start, call.steps, _frames(call.x, 1), saved.refined))
    if call.inputs == "raw":
        like_s = [(begin, end, s, None) for begin, end, _, s in like_s]  # type: ignore[misc]
    for out, runs in ((d_w_s, like_s), (d_w_x, call.unlike_s())):
        if out is not None:
            parts = [_w_gradient_run(call, plan["weights"], du, *run) for run in runs if run[1] > run[0]]
            out.copy_(torch.cat(parts).sum(0) if parts else torch.zeros_like(out))
    return d_w


def _w_gradient_run(
    call: Call, meta: Meta, du: Tensor, begin: int, end: int, maps: Maps, subtracted: Maps | None
) -> Tensor:
    """dU times (maps - subtracted)^T of steps begin to end, (SPLIT, D, C), to be summed."""
    factor, how = host.factors(call.x.tensor.dtype)
    parts = call.empty(meta["SPLIT"], call.d, call.channels)
    tiles = -(-call.d // meta["BLOCK_D"]) * -(-call.channels // meta["BLOCK_C"])
    host.launch(
        backward_kernels.weight_gradient_kernel,
        (tiles, meta["SPLIT"]),
        parts,
        du[begin:end],
        *maps,
        *(NOTHING if subtracted is None else subtracted),
        call.lengths,
        call.start + begin,
        end - begin,
        call.clips,
        call.channels,
        D=call.d,
        P=call.positions,
        DOT=factor,
        WIDE=call.wide,
        PRECISION=how,
        **meta,
    )
    return parts
