"""The forward of `refine`: which kernel is launched when, and on what."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rru_fast.ranks import Ranks
from rru_fast.triton import _host as host
from rru_fast.triton import _refine_forward_kernels as kernels
from rru_fast.triton._host import Maps, power_of_2
from rru_fast.triton._plans import Meta, Plan
from rru_fast.triton._refine_call import NO_FRAME, NOTHING, Call


def plans(call: Call) -> tuple[Plan, dict[str, list[Meta]]]:
    """A plan for the forward, and what else might be faster."""
    processors = host.processors(call.x.tensor)
    dtype, how = call.x.tensor.dtype, host.precision(call.x.tensor.dtype)
    block_p = min(64, max(16, power_of_2(call.positions)))
    columns = call.clips * -(-call.positions // block_p)
    block_k, exact = host.depth(dtype, how), how == "ieee" and dtype.itemsize >= 4

    def product(block_d: int, block_k: int, split: int, warps: int, stages: int) -> Meta:
        blocks = {"BLOCK_D": min(block_d, max(16, power_of_2(call.d))), "BLOCK_P": block_p, "BLOCK_K": block_k}
        return {**blocks, "SPLIT": split, "num_warps": warps, "num_stages": stages, **host.ALL_REGISTERS}

    def transition(block_d: int, block_k: int, waves: int, warps: int = 4, stages: int = 3) -> Meta:
        tiles = columns * -(-call.d // block_d)
        split = max(1, min(waves * processors // tiles, -(-call.channels // block_k), 32))
        return product(block_d, block_k, split, warps, stages)

    def gate(programs: int, block_c: int, warps: int) -> Meta:
        q = power_of_2(call.height) * power_of_2(call.width)
        chunk = power_of_2(max(16, min(256, call.channels * call.clips // max(1, programs))))
        return {
            "CHUNK": chunk,
            "BLOCK_C": min(chunk, max(1, min(block_c, 8192 // q))),
            "BLOCK_D": max(1, min(32, power_of_2(call.d), 4096 // q)),
            "BLOCK_A": max(1, min(32, power_of_2(max(1, call.a)), 4096 // q)),
            "num_warps": warps,
            **host.ALL_REGISTERS,
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
        "hoist": [
            product(256, block_k, 1, 8, 3),
            product(128, max(16, block_k // 2), 1, 4, 4),
            product(64, block_k, 1, 4, 3),
        ],
        "transition": [
            transition(64, block_k, 1),
            transition(64, block_k, 2),
            transition(128, block_k, 2),
            transition(256, block_k, 1, 8),
        ],
        "gate": gates,
    }


def run(call: Call, plan: Plan, mean: Tensor, var: Tensor, save: bool, ranks: Ranks | None) -> tuple[Tensor, ...]:
    """features, strips, u, z_s, z_c, h; in training `mean` and `var` are filled, else they are the running ones.

    ranks: who shares the batch statistics. Tuning has none: it runs a call as often as it likes, on each rank another.
    """
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
    state = Maps(
        call.empty(clips, 1, channels, call.height, call.width), channels * call.positions, 0, call.positions, 1
    )

    transition = _Transition(call, plan, ranks)
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

    def __init__(self, call: Call, plan: Plan, ranks: Ranks | None) -> None:
        self.call, self.meta, self.hoist, self.ranks = call, plan["transition"], plan["hoist"], ranks
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
            kernels.transition_kernel,
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
            kernels.transition_kernel,
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
        if self.ranks is not None:
            self.ranks.merge_(mean, var)


class _Gate:
    """Launches of `gate`."""

    def __init__(self, call: Call, plan: Plan, refined: Maps, state: Maps | None, strips: Tensor) -> None:
        self.call, self.meta = call, plan["gate"]
        self.refined, self.strips = refined, strips
        self.state = None if state is None else state.tensor

    def launch(self, t: int, u: Tensor | None, vectors: Any, s: tuple[Any, ...], mean: Tensor, var: Tensor) -> None:
        """S_t and its strips from u (B, D, P) and S_{t-1}; vectors: where h, z_s and z_c go. Without u: S_t = X_t."""
        call = self.call
        host.launch(
            kernels.gate_kernel,
            (call.clips, -(-call.channels // self.meta["CHUNK"])),
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
