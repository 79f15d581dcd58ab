"""The forward of `refine`: which kernel is launched when, and on what."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rru_fast.distributed import Ranks
from rru_fast.triton import _host as host
from rru_fast.triton._autotune import Candidates, KernelConfig, LaunchConfig
from rru_fast.triton._host import Maps, all_frames, frame_strides, power_of_2
from rru_fast.triton._launch import Launches, Slice, Slices, launch_again
from rru_fast.triton.refine import forward_kernels as kernels
from rru_fast.triton.refine.arguments import Call, Segment


def candidates(call: Call) -> Candidates:
    """Configs of the forward's kernels."""
    processors = host.processors(call.x.tensor)
    dtype, how = call.x.tensor.dtype, host.conv_precision(call.x.tensor.dtype)
    block_p = min(64, max(16, power_of_2(call.positions)))
    columns = call.clips * -(-call.positions // block_p)
    block_k, exact = host.depth(dtype, how), how == "ieee" and dtype.itemsize >= 4

    def product(block_d: int, block_k: int, split: int, warps: int, stages: int) -> KernelConfig:
        blocks = {"BLOCK_D": min(block_d, max(16, power_of_2(call.d))), "BLOCK_P": block_p, "BLOCK_K": block_k}
        return {**blocks, "SPLIT": split, "num_warps": warps, "num_stages": stages, **host.ALL_REGISTERS}

    def transition(block_d: int, block_k: int, waves: int, warps: int = 4, stages: int = 3) -> KernelConfig:
        tiles = columns * -(-call.d // block_d)
        split = max(1, min(waves * processors // tiles, -(-call.channels // block_k), 32))
        return product(block_d, block_k, split, warps, stages)

    def gate(chunk: int, block_c: int, warps: int) -> KernelConfig:
        q = power_of_2(call.height) * power_of_2(call.width)
        chunk = max(16, min(chunk, power_of_2(call.channels)))
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
    chunk = power_of_2(max(16, min(256, call.channels * call.clips // processors)))
    default = {
        "hoist": product(most, block_k, 1, 8, 3),
        "transition": transition(narrow, block_k, 1, 8 if exact else 4),
        "gate": gate(chunk, 64, 8),
    }
    # U is read once a chunk: fewer chunks read less, more of them fill the GPU.
    gates = [gate(chunk, 64, 4), gate(chunk, 32, 8), gate(chunk // 2, 64, 8), gate(chunk // 4, 32, 4)]
    gates.append(gate(2 * chunk, 64, 8))
    if exact:
        others = {
            "hoist": [product(32, block_k, 1, 4, 3)],
            "transition": [transition(64, block_k, 2, 8), transition(32, block_k, 1)],
            "gate": gates,
        }
        return Candidates(default, others)
    others = {
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
    return Candidates(default, others)


def run(
    call: Call, config: LaunchConfig, mean: Tensor, var: Tensor, save: bool, ranks: Ranks | None
) -> tuple[Tensor, ...]:
    """features, strips, u, z_s, z_c, h; in training `mean` and `var` are filled, else they are the running ones.

    ranks: those that share the batch statistics. Autotuning passes none: each rank repeats its calls a different number
    of times.
    """
    x = call.x.tensor
    clips, channels, steps = call.clips, call.channels, call.steps
    features = x.new_empty(x.shape)
    refined = host.maps(features)
    strips = call.empty(clips, channels, call.height)
    u = call.empty(steps, clips, call.d, call.positions)
    saved = steps if save else 0
    h = call.empty(saved if call.w_s1 is not None else 0, clips, call.a)
    z_s = call.empty(saved if call.w_s1 is not None else 0, clips, call.positions)
    # `gate` passes z_c on to itself through memory, so there is always one.
    z_c = call.empty((steps if save else 1) if call.w_c is not None else 0, clips, channels)
    state = Maps(
        call.empty(clips, 1, channels, call.height, call.width), channels * call.positions, 0, call.positions, 1
    )

    transition = _Transition(call, config, ranks, mean, var)
    if call.w_x is not None:
        for segment in call.input_segments(int(call.shares_first)):
            transition.project_inputs(u[segment.first : segment.end], segment, call.start + segment.first)
    if call.start == 1 and call.inputs == "raw" and call.training:
        # The gate's input at the first frame is (X_1, X_1): only its statistics are needed.
        first_u = call.empty(1, clips, call.d, call.positions)
        transition.project_inputs(first_u, Segment(0, 1, call.x, None), 0)
        transition.step(Slices(first_u), 0, 0, Slices(x, 1)[0], call.x)

    gate = _Gate(call, config, refined, state if call.keeps_state else None, strips, mean, var)
    vectors = [Slices(v) if len(v) else None for v in (h, z_s, z_c)]
    u_steps, s_steps = Slices(u), Slices(state.tensor if call.keeps_state else features, 1)
    if call.start == 1:
        gate.first()
    for n in range(steps):
        t = call.start + n
        s, s_maps = s_steps[0 if call.keeps_state else t - 1], state if call.keeps_state else refined
        if t == 0:
            assert call.state_s is not None
            s, s_maps = Slices(call.state_s.tensor, 1)[0], call.state_s
        transition.step(u_steps, n, t, s, s_maps)
        gate.step(t, u_steps[n], [None if v is None else v[n if save else 0] for v in vectors], s, s_maps)
    if call.lengths is None:
        strips /= call.frames * call.width
    else:
        strips /= (call.lengths * call.width).to(call.sum)[:, None, None]
    none_saved = call.empty(0, clips, call.d, call.positions)
    return features, strips.to(x.dtype), u if save else none_saved, z_s, z_c[:saved], h


class _Transition:
    """Launches of `transition`, with the scratch memory that they share."""

    def __init__(self, call: Call, config: LaunchConfig, ranks: Ranks | None, mean: Tensor, var: Tensor) -> None:
        self.call, self.hoist, self.ranks, self.mean, self.var = call, config["hoist"], ranks, mean, var
        own = config["transition"]
        d_tiles = -(-call.d // own["BLOCK_D"])
        tiles = call.clips * -(-call.positions // own["BLOCK_P"])
        self.shared: dict[str, Any] = {
            "lengths": call.lengths,
            "clips": call.clips,
            "channels": call.channels,
            "clips_per_group": call.clips_per_group,
            "D": call.d,
            "P": call.positions,
            "WIDE": call.wide,
            "PRECISION": host.conv_precision(call.x.tensor.dtype),
        }
        self.x = Slices(call.x.tensor, 1)
        self.statistics = (Slices(mean), Slices(var)) if call.training else None
        self.grid = tiles * d_tiles, own["SPLIT"]
        self.of_step: dict[str, Any] = {
            "x_frame": 0,
            "y_frame": 0,
            "partial": call.empty(tiles * d_tiles * own["SPLIT"] * own["BLOCK_D"] * own["BLOCK_P"]),
            "arrivals": call.counters((tiles + call.groups) * d_tiles),
            "tile_mean": call.empty(tiles, call.d),
            "tile_square": call.empty(tiles, call.d),
            **own,
        }
        self.launches: dict[tuple[bool, bool], Launches] = {}

    def project_inputs(self, u: Tensor, segment: Segment, t: int) -> None:
        """u (F, B, D, P) = W_x times the operand of all F frames of a segment, which begins with frame t."""
        call, own = self.call, self.hoist
        assert call.w_x is not None
        tiles = -(-call.d // own["BLOCK_D"]) * -(-call.positions // own["BLOCK_P"])
        launch_again(
            kernels.transition_kernel,
            (len(u) * call.clips * tiles, 1),
            u=u,
            **all_frames("x", segment.maps),
            **all_frames("y", segment.subtracted),
            w=call.w_x,
            w_gate=call.w_x.stride(0),
            partial=None,
            arrivals=None,
            tile_mean=None,
            tile_square=None,
            mean=None,
            var=None,
            first=t,
            ADD=False,
            **self.shared,
            **own,
        )

    def step(self, u: Slices, n: int, t: int, s: Slice, s_maps: Maps) -> None:
        """u[n] (B, D, P) += W_s times S_{t-1}, or times X_t - S_{t-1}; in training also the statistics of U."""
        call = self.call
        first = n == 0 and call.w_first is not None
        kind = first, t == 0
        if kind not in self.launches:
            self.launches[kind] = self._launches(first, s_maps)
        x = self.x[t]
        mean, var = (None, None) if self.statistics is None else (v[t] for v in self.statistics)
        self.launches[kind](u[n], *((s, None) if call.inputs == "raw" else (x, s)), mean, var, integer=t)
        if self.ranks is not None:
            self.ranks.merge_(self.mean[t], self.var[t])

    def _launches(self, first: bool, s_maps: Maps) -> Launches:
        call = self.call
        w = call.w_first if first else call.w_s
        assert w is not None
        x, y = (s_maps, None) if call.inputs == "raw" else (call.x, s_maps)
        return Launches(
            kernels.transition_kernel,
            self.grid,
            ("u", "x", "y", "mean", "var"),
            "first",
            **frame_strides("x", x),
            **frame_strides("y", y),
            w=w,
            w_gate=w.stride(0),
            ADD=call.w_x is not None and not first,
            **self.shared,
            **self.of_step,
        )


class _Gate:
    """Launches of `gate`."""

    def __init__(
        self,
        call: Call,
        config: LaunchConfig,
        refined: Maps,
        state: Maps | None,
        strips: Tensor,
        mean: Tensor,
        var: Tensor,
    ) -> None:
        self.call, self.config, self.state = call, config["gate"], state
        self.x, self.out, self.strips = Slices(call.x.tensor, 1), Slices(refined.tensor, 1), strips
        self.out_clip = refined.clip
        self.statistics = (Slices(mean), Slices(var)) if call.training else None
        self.running: dict[str, Tensor] = {} if call.training else {"mean": mean, "var": var}
        self.launches: dict[tuple[bool, bool], Launches] = {}

    def first(self) -> None:
        """S_1 = X_1 and its strips."""
        self.step(0, None, [None] * 3, None, None)

    def step(self, t: int, u: Slice | None, vectors: list[Slice | None], s: Slice | None, s_maps: Maps | None) -> None:
        """S_t and its strips from U_t (B, D, P) and S_{t-1}; vectors: outputs for h, z_s and z_c."""
        kind = u is None, t == 0
        if kind not in self.launches:
            self.launches[kind] = self._launches(t, s_maps)
        statistics = () if self.statistics is None else (v[t] for v in self.statistics)
        self.launches[kind](self.out[t], self.x[t], s, u, *vectors, *statistics, integer=t)

    def _launches(self, t: int, s_maps: Maps | None) -> Launches:
        call = self.call
        return Launches(
            kernels.gate_kernel,
            (call.clips, -(-call.channels // self.config["CHUNK"])),
            ("out", "x", "s", "u", "h", "z_s", "z_c", *(() if self.running else ("mean", "var"))),
            "t",
            out_clip=self.out_clip,
            state=None if self.state is None else self.state.tensor,
            strips=self.strips,
            **frame_strides("x", call.x),
            **frame_strides("s", s_maps),
            **self.running,
            gamma=call.gamma,
            beta=call.beta,
            w_s1=call.w_s1,
            w_s2=call.w_s2,
            w_c=call.w_c,
            lengths=call.lengths,
            channels=call.channels,
            clips_per_group=call.clips_per_group,
            D=call.d,
            A=call.a,
            H=call.height,
            W=call.width,
            EPS=call.eps,
            FIRST=t == 0,
            WIDE=call.wide,
            BLOCK_H=power_of_2(call.height),
            BLOCK_W=power_of_2(call.width),
            **self.config,
        )
