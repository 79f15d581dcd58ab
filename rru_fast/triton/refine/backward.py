"""The backward of `refine`: which kernel is launched when, and on what."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rru_fast.distributed import Ranks
from rru_fast.triton import _host as host
from rru_fast.triton._autotune import Candidates, KernelConfig, LaunchConfig
from rru_fast.triton._host import Maps, frame_strides, power_of_2
from rru_fast.triton._launch import Launches, Slice, Slices
from rru_fast.triton.refine import backward_kernels as kernels
from rru_fast.triton.refine.arguments import Call, Saved
from rru_fast.triton.refine.gate_backward import GateBackward
from rru_fast.triton.refine.weight_gradients import w_gradient


def candidates(call: Call) -> Candidates:
    """Configs of the backward's kernels."""
    processors, dtype = host.processors(call.x.tensor), call.x.tensor.dtype
    _, how = host.grad_operand_dtype(dtype)
    exact = how == "ieee" and dtype.itemsize >= 4
    factor = torch.float32 if dtype == torch.float16 else dtype
    even = host.even(call.x.tensor, 3)
    block_k, depth = host.depth(factor, how), host.depth(factor, how, even)
    all_positions = power_of_2(call.positions)
    block_p = min(64, max(16, all_positions))

    def maps(block_c: int, block_k: int, warps: int, stages: int = 2) -> KernelConfig:
        block_c = min(block_c, max(16, power_of_2(call.channels)))
        blocks = {"BLOCK_C": block_c, "BLOCK_P": block_p, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}
        return blocks if even and how != "tf32x3" else {**blocks, **host.ALL_REGISTERS}

    def gate(block_d: int, warps: int) -> KernelConfig:
        block_d = max(1, min(block_d, power_of_2(call.d), 4096 // all_positions))
        block_a = max(1, min(32, power_of_2(max(1, call.a)), 4096 // all_positions))
        blocks = {"BLOCK_P": all_positions, "BLOCK_D": block_d, "BLOCK_A": block_a}
        return {**blocks, "num_warps": warps, **host.ALL_REGISTERS}

    def norm(block_d: int, warps: int) -> KernelConfig:
        return {"BLOCK_D": min(block_d, power_of_2(call.d)), "BLOCK_P": block_p, "num_warps": warps}

    def pooled() -> KernelConfig:
        block_b, block_d = (min(32, max(16, power_of_2(n))) for n in (call.clips, call.d))
        tiles = -(-call.clips // block_b) * -(-call.d // block_d)
        split = max(1, min(processors // tiles, -(-call.channels // 32), 32))
        return {"BLOCK_B": block_b, "BLOCK_D": block_d, "BLOCK_K": 32, "SPLIT": split, "num_warps": 4}

    def weights(block_d: int, block_c: int, block_k: int, waves: int, warps: int, stages: int) -> KernelConfig:
        block_d, block_c = (min(b, max(16, power_of_2(n))) for b, n in ((block_d, call.d), (block_c, call.channels)))
        tiles = -(-call.d // block_d) * -(-call.channels // block_c) * (1 if call.w_x is None else 2)
        pieces = max(1, call.steps) * call.clips * -(-call.positions // block_k)
        split = max(1, min(waves * processors // tiles, pieces, 32))
        blocks = {"BLOCK_D": block_d, "BLOCK_C": block_c, "BLOCK_K": block_k, "SPLIT": split}
        return {**blocks, "num_warps": warps, "num_stages": stages, **host.ALL_REGISTERS}

    # A thread that takes an address for each element has fewer registers left for the tile.
    warps, most = 8 if exact or dtype == torch.float16 or not even else 4, 64 if exact else 128
    default = {
        "maps": maps(64, min(block_k, 32), warps),
        "gate": gate(32, 4),
        "norm": norm(32, 4),
        "pooled": pooled(),
        "weights": weights(most, most, depth, 1, 8, 3),
        "outer": {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4},
    }
    gates = [gate(16, 4), gate(32, 8), gate(64, 8)]
    if exact:
        others = {"maps": [maps(32, block_k, 8)], "gate": gates, "weights": [weights(64, 64, depth, 2, 8, 3)]}
        return Candidates(default, others)
    others = {
        # 128 channels read dU half as often.
        "maps": [maps(64, block_k, 8), maps(128, min(block_k, 32), 8), maps(128, block_k, 8), maps(32, block_k, 4)],
        "gate": gates,
        "weights": [weights(128, 128, depth, 2, 8, 3), weights(64, 128, min(depth, 32), 1, 4, 3)],
    }
    if dtype == torch.bfloat16 and even:
        # Three programs per multiprocessor in place of two; TF32 would spill.
        others["maps"].append({**maps(64, 32, 4), "maxnreg": 168})
    return Candidates(default, others)


class Upstream(NamedTuple):
    """The outputs' gradients: features' as maps, strips' (B, C, H) over T W."""

    features: Maps | None
    strips: Tensor | None


def upstream_of(call: Call, d_features: Tensor | None, d_strips: Tensor | None) -> Upstream:
    if d_strips is not None:
        frames = call.frames if call.lengths is None else call.lengths.to(call.sum)[:, None, None]
        d_strips = (d_strips.to(call.sum) / frames / call.width).contiguous()
    maps = None if d_features is None else host.maps(d_features)
    call.wide = call.wide or (maps is not None and maps.wide)
    return Upstream(maps, d_strips)


def run(
    call: Call,
    config: LaunchConfig,
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
    maps = _Maps(call, config, saved, upstream, du, d_x)
    gate = GateBackward(call, config, saved, maps.d_z_s, maps.blocks, du, need_weights, ranks)
    for n in range(steps - 1, -1, -1):
        maps.step(n, gate.d_z_c)
        gate.step(n)
    d_state: tuple[Tensor | None, Tensor | None] = (None, None)
    if start == 0:
        maps.before_first()
        d_state_s = maps.g.to(x.dtype, copy=True)
        maps.g.zero_()
        shape = (clips, channels, call.height, call.width)
        d_state = maps.of_state_x().view(shape), d_state_s.view(shape)
    elif d_x is not None:
        maps.first_frame()
    if not need_weights:
        return d_x, [None] * 6, d_state
    return (
        d_x,
        [w_gradient(call, config["weights"], saved.refined, du), *gate.weight_gradients(config["outer"])],
        d_state,
    )


class _Maps:
    """Launches of `maps`, and the gradient that they pass from frame to frame."""

    def __init__(
        self, call: Call, config: LaunchConfig, saved: Saved, upstream: Upstream, du: Tensor, d_x: Tensor | None
    ) -> None:
        self.call, self.saved, self.upstream = call, saved, upstream
        own = config["maps"]
        self.blocks = -(-call.channels // own["BLOCK_C"])
        self.g = call.empty(call.clips, call.channels, call.positions)
        self.d_z_s = call.empty(call.clips, self.blocks, call.positions) if call.w_s1 is not None else None
        self.x, self.refined, self.du = Slices(call.x.tensor, 1), Slices(saved.refined.tensor, 1), Slices(du)
        self.d_x = None if d_x is None else Slices(d_x, 1)
        self.d_features = None if upstream.features is None else Slices(upstream.features.tensor, 1)
        self.vectors = [Slices(v) if len(v) else None for v in (saved.z_s, saved.z_c)]
        factor, how = host.grad_operand_dtype(call.x.tensor.dtype)
        self.shared: dict[str, Any] = {
            "g": self.g,
            "lengths": call.lengths,
            "channels": call.channels,
            "D": call.d,
            "P": call.positions,
            "W": call.width,
            "RAW": call.inputs == "raw",
            "DOT": factor,
            "WIDE": call.wide,
            "PRECISION": how,
            **own,
        }
        self.launches: dict[tuple[Any, ...], Launches] = {}

    def step(self, n: int, d_z_c: Slices | None) -> None:
        """dX of step n + 1, and of step n the gradient that reaches its S, dz_s and dz_c."""
        t = self.call.start + n
        if t == 0 and self.call.state_s is not None:
            s, s_maps = Slices(self.call.state_s.tensor, 1)[0], self.call.state_s
        else:
            s, s_maps = self.refined[t - 1], self.saved.refined
        z_s, z_c = (None if v is None else v[n] for v in self.vectors)
        own = (self.x[t], s, z_s, z_c, None if d_z_c is None else d_z_c[n])
        self._launch(n + 1, t, own, s_maps)

    def first_frame(self) -> None:
        """dX of the first step, and of the frame before it, the first of the video."""
        assert self.d_x is not None
        self._launch(0, 0, NO_GATE, first=self.d_x[0])

    def before_first(self) -> None:
        """dX of the first step, and G of the state before it."""
        self._launch(0, -1, NO_GATE)

    def of_state_x(self) -> Tensor:
        """The gradient of the state's frame, which only the first step's motion reads; g is zero."""
        d_state_x = self.g.new_empty(self.g.shape, dtype=self.call.x.tensor.dtype)
        self._launch(-1, -1, NO_GATE, d_state_x=Slices(d_state_x[None])[0])
        return d_state_x

    def _launch(
        self,
        ended: int,
        t: int,
        own: tuple[Slice | None, ...],
        s_maps: Maps | None = None,
        first: Slice | None = None,
        d_state_x: Slice | None = None,
    ) -> None:
        """End step `ended`, if there is one, and begin frame t with its `own` slices.

        first: dX of frame t in place of G; d_state_x: dX of the state, which ends and begins nothing.
        """
        call = self.call
        ends, gated = ended < call.steps, 0 <= ended < call.steps
        shared = ended == 0 and gated and call.shares_first
        motion = call.inputs == "appearance+motion" and ended + 1 < call.steps
        d_x = self.d_x[call.start + ended] if gated and self.d_x is not None else d_state_x
        done = (v[ended] if gated and v is not None else None for v in self.vectors)
        d_features = self.d_features[t] if t >= 0 and self.d_features is not None else None
        kind = ends, gated, motion, shared, t < 0, t == 0, own is NO_GATE, d_state_x is None
        if kind not in self.launches:
            self.launches[kind] = self._launches(ends, motion, shared, t, own, s_maps, d_state_x is None)
        self.launches[kind](
            d_x,
            first,
            self.du[ended] if gated else None,
            self.du[ended + 1] if motion else None,
            *done,
            d_features,
            *own,
            integer=t,
        )

    def _launches(
        self,
        ends: bool,
        motion: bool,
        shared: bool,
        t: int,
        own: tuple[Slice | None, ...],
        s_maps: Maps | None,
        begins: bool,
    ) -> Launches:
        call = self.call
        w_s = call.w_first if shared else call.w_s
        # With the sum of both halves only the motion that ends at the next frame is left to the second.
        w_x = None if shared and not motion else call.w_x
        assert w_s is not None
        gated = own is not NO_GATE
        return Launches(
            kernels.maps_kernel,
            (call.clips, self.blocks),
            (
                "d_x",
                "d_x_first",
                "du",
                "du_next",
                "done_z_s",
                "done_z_c",
                "d_features",
                "x",
                "s",
                "z_s",
                "z_c",
                "d_z_c",
            ),
            "t",
            d_x_clip=call.channels * call.positions * (call.frames if begins else 1),
            w_s=w_s,
            w_s_gate=w_s.stride(0),
            w_x=w_x,
            w_x_gate=0 if w_x is None else w_x.stride(0),
            **frame_strides("d_features", self.upstream.features if t >= 0 else None),
            d_strips=self.upstream.strips if t >= 0 else None,
            **frame_strides("x", call.x if gated else None),
            **frame_strides("s", s_maps),
            d_z_s=self.d_z_s if gated else None,
            END=ends,
            BEGIN=begins,
            SHARED=shared,
            **self.shared,
        )


OF_GATE = ("x", "s", "z_s", "z_c", "d_z_c")
"""Slices of a frame with a gate."""
NO_GATE: tuple[Slice | None, ...] = (None,) * len(OF_GATE)
