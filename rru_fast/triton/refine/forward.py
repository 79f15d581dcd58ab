"""Forward launches of `refine`."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from rru_fast.arguments import RefineOutputs
from rru_fast.distributed import Ranks
from rru_fast.precision import conv_precision
from rru_fast.triton import _device
from rru_fast.triton._autotune import ALL_REGISTERS, Candidates, KernelConfig, LaunchConfig
from rru_fast.triton._launch import Counter, Launches, Slices, cdiv, launch_cached, next_power_of_2
from rru_fast.triton._precision import block_k, uses_tensor_cores
from rru_fast.triton._strided import StridedMaps, StridedMatrix, as_strided_maps
from rru_fast.triton.refine import forward_kernels as kernels
from rru_fast.triton.refine.arguments import AttentionVectors, Call, Operand, Statistics, frame_slices, one_frame


def candidates(call: Call) -> Candidates:
    """Return configs of the forward's kernels."""
    dtype, num_sms = call.args.x.dtype, _device.num_sms(call.args.x)
    precision = conv_precision(dtype)
    tensor_cores, terms = uses_tensor_cores(dtype, precision), block_k(dtype, precision)
    block_p = min(64, max(16, next_power_of_2(call.positions)))
    p_tiles = call.clips * cdiv(call.positions, block_p)

    def product(block_d: int, block_k: int, split: int, num_warps: int, num_stages: int) -> KernelConfig:
        block_d = min(block_d, max(16, next_power_of_2(call.d)))
        blocks = {"SPLIT": split, "BLOCK_D": block_d, "BLOCK_P": block_p, "BLOCK_K": block_k}
        return {**blocks, "num_warps": num_warps, "num_stages": num_stages, **ALL_REGISTERS}

    def transition(block_d: int, waves: int, num_warps: int = 4) -> KernelConfig:
        tiles = p_tiles * cdiv(call.d, block_d)
        split = max(1, min(waves * num_sms // tiles, cdiv(call.channels, terms), 32))
        return product(block_d, terms, split, num_warps, 3)

    def gate(chunk: int, block_c: int, num_warps: int) -> KernelConfig:
        positions = next_power_of_2(call.height) * next_power_of_2(call.width)
        chunk = max(16, min(chunk, next_power_of_2(call.channels)))
        return {
            "BLOCK_D": max(1, min(32, next_power_of_2(call.d), 4096 // positions)),
            "BLOCK_A": max(1, min(32, next_power_of_2(max(1, call.num_attn)), 4096 // positions)),
            "BLOCK_C": min(chunk, max(1, min(block_c, 8192 // positions))),
            "CHUNK": chunk,
            "num_warps": num_warps,
            **ALL_REGISTERS,
        }

    # Without tensor cores a tile has as many elements as the registers of 8 warps hold.
    largest = 128 if tensor_cores else 64
    narrow = min(32 if p_tiles * 8 < num_sms else largest, largest)
    chunk = next_power_of_2(max(16, min(256, call.channels * call.clips // num_sms)))
    default = {
        "input_projection": product(largest, terms, 1, 8, 3),
        "transition": transition(narrow, 1, 4 if tensor_cores else 8),
        "gate": gate(chunk, 64, 8),
    }
    # U is read once per chunk: fewer chunks read less, more of them fill the GPU.
    gates = [gate(chunk, 64, 4), gate(chunk, 32, 8), gate(chunk // 2, 64, 8), gate(chunk // 4, 32, 4)]
    gates.append(gate(2 * chunk, 64, 8))
    if not tensor_cores:
        others = {
            "input_projection": [product(32, terms, 1, 4, 3)],
            "transition": [transition(64, 2, 8), transition(32, 1)],
            "gate": gates,
        }
        return Candidates(default, others)
    others = {
        "input_projection": [
            product(256, terms, 1, 8, 3),
            product(128, max(16, terms // 2), 1, 4, 4),
            product(64, terms, 1, 4, 3),
        ],
        "transition": [transition(64, 1), transition(64, 2), transition(128, 2), transition(256, 1, 8)],
        "gate": gates,
    }
    return Candidates(default, others)


def project_inputs(call: Call, config: KernelConfig, u: Tensor, operand: Operand, t_first: int) -> None:
    """Set u (F, B, D, P) to w_input times the operand of F frames from t_first."""
    assert call.w_input is not None
    tiles = cdiv(call.d, config["BLOCK_D"]) * cdiv(call.positions, config["BLOCK_P"])
    launch_cached(
        kernels.refine_fwd_transition_kernel,
        (len(u) * call.clips * tiles, 1),
        u=u,
        x=operand.x,
        subtracted=operand.subtracted,
        w=call.w_input,
        partials=None,
        arrivals=None,
        tile_statistics=None,
        statistics=Statistics(),
        lengths=call.args.lengths,
        t_first=t_first,
        **transition_sizes(call, accumulate=False),
        **config,
    )


def transition_sizes(call: Call, accumulate: bool) -> dict[str, Any]:
    """Return the sizes and flags of the transition's kernel; accumulate: add to u."""
    return {
        "clips": call.clips,
        "channels": call.channels,
        "clips_per_group": call.clips_per_group,
        "D": call.d,
        "P": call.positions,
        "ACCUMULATE": accumulate,
        "INT64_OFFSETS": call.int64_offsets,
        "PRECISION": conv_precision(call.args.x.dtype),
    }


class TileStatistics(NamedTuple):
    """Statistics of a tile of U, (B * p tiles, D): its mean, and the sum of squared differences from that mean."""

    mean: Tensor
    square: Tensor


class ForwardPass:
    """Outputs of a forward pass, and the launches that fill them."""

    def __init__(self, call: Call, config: LaunchConfig, save: bool, ranks: Ranks | None) -> None:
        """Allocate outputs and scratch; ranks: those that share the batch statistics, if any."""
        args, clips, channels = call.args, call.clips, call.channels
        self.call, self.config, self.ranks, self.save = call, config, ranks, save
        self.features = args.x.new_empty(args.x.shape)
        self.strips = call.empty(clips, channels, call.height)
        self.u = call.empty(call.steps, clips, call.d, call.positions)
        if args.training:
            shape = (call.frames, call.groups, call.d)
            self.statistics = Statistics(*(args.x.new_zeros(shape, dtype=call.acc_dtype) for _ in range(2)))
        else:
            self.statistics = call.running_statistics()
        spatial, channel = args.w_s1 is not None, args.w_c is not None
        saved = call.steps if save else 0
        # z_c is always allocated: threads of the gate kernel exchange it through global memory.
        self.attention = AttentionVectors(
            h=call.empty(saved if spatial else 0, clips, call.num_attn),
            z_s=call.empty(saved if spatial else 0, clips, call.positions),
            z_c=call.empty((call.steps if save else 1) if channel else 0, clips, channels),
        )
        self.fp32_state = None
        if call.keeps_fp32_state:
            self.fp32_state = as_strided_maps(call.empty(clips, 1, channels, call.height, call.width))
        own = config["transition"]
        d_tiles, p_tiles = cdiv(call.d, own["BLOCK_D"]), clips * cdiv(call.positions, own["BLOCK_P"])
        self.transition_grid = p_tiles * d_tiles, own["SPLIT"]
        self.partials = call.empty(p_tiles * d_tiles * own["SPLIT"] * own["BLOCK_D"] * own["BLOCK_P"])
        self.arrivals = call.counters((p_tiles + call.groups) * d_tiles)
        self.tile_statistics = TileStatistics(call.empty(p_tiles, call.d), call.empty(p_tiles, call.d))

    def run(self) -> RefineOutputs:
        """Launch all kernels and return the outputs."""
        call, args = self.call, self.call.args
        for first, end, operand in call.input_segments(int(call.shares_first)) if call.w_input is not None else ():
            project_inputs(call, self.config["input_projection"], self.u[first:end], operand, call.start + first)
        if call.start == 1:
            self._first_frame()
        for n in range(call.steps):
            if n <= 1:  # the first step may read a state, or share its product
                transition, gate = self._step_launches(n)
            transition(n)
            self._share_statistics(call.start + n)
            gate(n)
        if args.lengths is None:
            self.strips /= call.frames * call.width
        else:
            self.strips /= (args.lengths * call.width).to(call.acc_dtype)[:, None, None]
        h, z_s, z_c = self.attention
        none = (call.empty(0, args.bn_groups, call.d) for _ in range(2))  # two: outputs may not alias
        mean, var = self.statistics if args.training else none
        return RefineOutputs(
            features=self.features,
            strips=self.strips.to(args.x.dtype),
            mean=mean,
            var=var,
            u=self.u if self.save else call.empty(0, call.clips, call.d, call.positions),
            z_s=z_s,
            z_c=z_c if self.save else z_c[:0],
            h=h,
        )

    def _share_statistics(self, t: int) -> None:
        if self.ranks is not None:
            self.ranks.merge_(self.statistics.mean[t], self.statistics.var[t])

    def _past(self, n: int) -> StridedMaps:
        """Return S_{t-1} of the steps from n."""
        call = self.call
        if n == 0 and call.state_s is not None:
            return one_frame(call.state_s, 0)
        if self.fp32_state is not None:
            return one_frame(self.fp32_state, 0)
        return frame_slices(as_strided_maps(self.features), call.start - 1)

    def _first_frame(self) -> None:
        """Set S_1 = X_1, and its strips."""
        call = self.call
        if call.args.inputs == "raw" and call.args.training:
            # The gate's input (X_1, X_1) is not zero: only its statistics are needed, for the running ones.
            u = call.empty(1, call.clips, call.d, call.positions)
            project_inputs(call, self.config["input_projection"], u, Operand(call.x, None), 0)
            self._transition(u, one_frame(call.x, 0), call.w_recurrent, accumulate=True, start=0)(0)
            self._share_statistics(0)
        self._gate(None, first=True, start=0)(0)

    def _step_launches(self, n: int) -> tuple[Launches, Launches]:
        """Return the launches of the two kernels for the steps from n."""
        call, past = self.call, self._past(n)
        w = call.w_first if n == 0 and call.w_first is not None else call.w_recurrent
        accumulate = call.w_input is not None and w is not call.w_first
        transition = self._transition(self.u, past, w, accumulate, call.start)
        return transition, self._gate(past, first=call.start + n == 0, start=call.start)

    def _transition(self, u: Tensor, past: StridedMaps, w: StridedMatrix, accumulate: bool, start: int) -> Launches:
        """Return launches that compute w times the operand that holds S into u[n], and in training its statistics.

        past: S_{t-1}; accumulate: add to u[n]; start: the frame of launch 0.
        """
        call = self.call
        return Launches(
            kernels.refine_fwd_transition_kernel,
            self.transition_grid,
            u=Slices(u),
            x=past if call.args.inputs == "raw" else frame_slices(call.x, start),
            subtracted=None if call.args.inputs == "raw" else past,
            w=w,
            partials=self.partials,
            arrivals=self.arrivals,
            tile_statistics=self.tile_statistics,
            statistics=call.statistics_slices(self.statistics, start) if call.args.training else Statistics(),
            lengths=call.args.lengths,
            t_first=Counter(start),
            **transition_sizes(call, accumulate),
            **self.config["transition"],
        )

    def _gate(self, past: StridedMaps | None, first: bool, start: int) -> Launches:
        """Return launches that compute S_t and add it to the strips.

        past: S_{t-1}, None for S_1; first: t = 0; start: the frame of launch 0.
        """
        call, config = self.call, self.config["gate"]
        attention, statistics = AttentionVectors(), Statistics()
        if past is not None:
            statistics = call.statistics_slices(self.statistics, start)
            attention = self._attention_slices()
        return Launches(
            kernels.refine_fwd_gate_kernel,
            (call.clips, cdiv(call.channels, config["CHUNK"])),
            out=frame_slices(as_strided_maps(self.features), start),
            state=None if self.fp32_state is None else self.fp32_state.ptr,
            strips=self.strips,
            x=frame_slices(call.x, start),
            s=past,
            u=None if past is None else Slices(self.u),
            statistics=statistics,
            gate=call.gate,
            attention=attention,
            lengths=call.args.lengths,
            t=Counter(start),
            channels=call.channels,
            clips_per_group=call.clips_per_group,
            D=call.d,
            A=call.num_attn,
            H=call.height,
            W=call.width,
            EPS=call.args.eps,
            FIRST=first,
            INT64_OFFSETS=call.int64_offsets,
            **config,
        )

    def _attention_slices(self) -> AttentionVectors:
        """Return the attention vectors to be stored per step; without saving, z_c alone, in the same memory."""
        h, z_s, z_c = self.attention
        if not self.save:
            return AttentionVectors(z_c=z_c[0] if len(z_c) else None)
        return AttentionVectors(*(Slices(v) if len(v) else None for v in (h, z_s, z_c)))
