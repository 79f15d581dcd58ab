"""Backward launches of `refine`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rru_fast.arguments import RefineGradients, RefineNeed, RefineSaved, RefineUpstream
from rru_fast.distributed import Ranks
from rru_fast.triton import _device
from rru_fast.triton._autotune import ALL_REGISTERS, Candidates, KernelConfig, LaunchConfig
from rru_fast.triton._launch import Counter, Launches, Slices, cdiv, next_power_of_2
from rru_fast.triton._precision import block_k, grad_operand_dtype, uses_tensor_cores
from rru_fast.triton._strided import StridedMaps, as_strided_maps, needs_int64, vectorizable
from rru_fast.triton.refine import backward_kernels as kernels
from rru_fast.triton.refine.arguments import AttentionVectors, Call, frame_slices, one_frame
from rru_fast.triton.refine.gate_backward import GateBackward
from rru_fast.triton.refine.weight_gradients import w_gradient


def candidates(call: Call) -> Candidates:
    """Return configs of the backward's kernels."""
    dtype, num_sms = call.args.x.dtype, _device.num_sms(call.args.x)
    _, precision = grad_operand_dtype(dtype)
    operand_dtype = torch.float32 if dtype == torch.float16 else dtype
    tensor_cores = uses_tensor_cores(dtype, precision)
    vectorized = vectorizable(call.x.ptr, 3)
    terms, dw_terms = block_k(operand_dtype, precision), block_k(operand_dtype, precision, vectorized)
    all_positions = next_power_of_2(call.positions)
    block_p = min(64, max(16, all_positions))

    def recurrence(block_c: int, block_k: int, num_warps: int, num_stages: int = 2) -> KernelConfig:
        block_c = min(block_c, max(16, next_power_of_2(call.channels)))
        blocks = {"BLOCK_C": block_c, "BLOCK_P": block_p, "BLOCK_K": block_k}
        config = {**blocks, "num_warps": num_warps, "num_stages": num_stages}
        return config if vectorized and precision != "tf32x3" else {**config, **ALL_REGISTERS}

    def gate(block_d: int, num_warps: int) -> KernelConfig:
        block_d = max(1, min(block_d, next_power_of_2(call.d), 4096 // all_positions))
        block_a = max(1, min(32, next_power_of_2(max(1, call.num_attn)), 4096 // all_positions))
        blocks = {"BLOCK_P": all_positions, "BLOCK_D": block_d, "BLOCK_A": block_a}
        return {**blocks, "num_warps": num_warps, **ALL_REGISTERS}

    def norm(block_d: int, num_warps: int) -> KernelConfig:
        return {"BLOCK_D": min(block_d, next_power_of_2(call.d)), "BLOCK_P": block_p, "num_warps": num_warps}

    def pooled() -> KernelConfig:
        block_b, block_d = (min(32, max(16, next_power_of_2(n))) for n in (call.clips, call.d))
        tiles = cdiv(call.clips, block_b) * cdiv(call.d, block_d)
        split = max(1, min(num_sms // tiles, cdiv(call.channels, 32), 32))
        return {"SPLIT": split, "BLOCK_B": block_b, "BLOCK_D": block_d, "BLOCK_K": 32, "num_warps": 4}

    def dw(block_d: int, block_c: int, block_k: int, waves: int, num_warps: int) -> KernelConfig:
        block_d, block_c = (
            min(block, max(16, next_power_of_2(n))) for block, n in ((block_d, call.d), (block_c, call.channels))
        )
        tiles = cdiv(call.d, block_d) * cdiv(call.channels, block_c) * (1 if call.w_input is None else 2)
        pieces = max(1, call.steps) * call.clips * cdiv(call.positions, block_k)
        split = max(1, min(waves * num_sms // tiles, pieces, 32))
        blocks = {"SPLIT": split, "BLOCK_D": block_d, "BLOCK_C": block_c, "BLOCK_K": block_k}
        return {**blocks, "num_warps": num_warps, "num_stages": 3, **ALL_REGISTERS}

    # Without vector loads a thread computes an address per element, which leaves fewer registers for the tile.
    warps = 8 if not tensor_cores or dtype == torch.float16 or not vectorized else 4
    largest = 128 if tensor_cores else 64
    default = {
        "recurrence": recurrence(64, min(terms, 32), warps),
        "gate": gate(32, 4),
        "norm": norm(32, 4),
        "pooled": pooled(),
        "dw": dw(largest, largest, dw_terms, 1, 8),
        "atb": {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4},
    }
    gates = [gate(16, 4), gate(32, 8), gate(64, 8)]
    if not tensor_cores:
        others = {"recurrence": [recurrence(32, terms, 8)], "gate": gates, "dw": [dw(64, 64, dw_terms, 2, 8)]}
        return Candidates(default, others)
    others = {
        # 128 channels read dU half as often.
        "recurrence": [
            recurrence(64, terms, 8),
            recurrence(128, min(terms, 32), 8),
            recurrence(128, terms, 8),
            recurrence(32, terms, 4),
        ],
        "gate": gates,
        "dw": [dw(128, 128, dw_terms, 2, 8), dw(64, 128, min(dw_terms, 32), 1, 4)],
    }
    if dtype == torch.bfloat16 and vectorized:
        # Three programs per multiprocessor in place of two; TF32 would spill.
        others["recurrence"].append({**recurrence(64, 32, 4), "maxnreg": 168})
    return Candidates(default, others)


class DX(NamedTuple):
    """Gradient of one frame, (B, C, P), P contiguous."""

    ptr: Any
    clip: int


class Following(NamedTuple):
    """Arguments of the recurrence kernel for frame t + 1, which it finishes."""

    du: Any = None
    """dU_{t+1} (B, D, P); None if t + 1 has no gate and receives G alone."""
    du_next: Any = None
    """dU_{t+2}, or None."""
    attention: AttentionVectors = AttentionVectors()
    """z_s and z_c of frame t + 1."""
    d_x: DX | None = None
    """dX_{t+1}, out; None if not needed."""


class Frame(NamedTuple):
    """Arguments of the recurrence kernel for frame t, which it starts."""

    x: StridedMaps | None = None
    """X_t; None if t has no gate."""
    s: StridedMaps | None = None
    """S_{t-1}."""
    attention: AttentionVectors = AttentionVectors()
    """z_s and z_c of frame t."""
    d_features: StridedMaps | None = None
    """Upstream gradient of S_t."""
    d_strips: Tensor | None = None
    """Upstream gradient of the strips over T W, (B, C, H)."""
    d_z_s: Tensor | None = None
    """(B, blocks, P), out: a sum over each block of channels."""
    d_z_c: Any = None
    """(B, C), out."""
    d_x: DX | None = None
    """dX_t, out, in place of G_t; None unless t is the first frame of all."""


class BackwardPass:
    """Gradients of a backward pass, and the launches that compute them."""

    def __init__(
        self,
        call: Call,
        config: LaunchConfig,
        upstream: RefineUpstream,
        saved: RefineSaved,
        need: RefineNeed,
        ranks: Ranks | None,
    ) -> None:
        """Allocate gradients and scratch; ranks: those that share the batch statistics, if any."""
        args = call.args
        self.call, self.config, self.saved, self.need = call, config, saved, need
        self.refined = as_strided_maps(saved.features)
        self.d_features = None if upstream.d_features is None else as_strided_maps(upstream.d_features)
        self.int64_offsets = call.int64_offsets or (self.d_features is not None and needs_int64(self.d_features))
        self.d_strips = None
        if upstream.d_strips is not None:
            frames = call.frames if args.lengths is None else args.lengths.to(call.acc_dtype)[:, None, None]
            self.d_strips = (upstream.d_strips.to(call.acc_dtype) / frames / call.width).contiguous()
        self.d_x = args.x.new_empty(args.x.shape) if need.need_x else None
        self.du = call.empty(call.steps, call.clips, call.d, call.positions)
        self.blocks = cdiv(call.channels, config["recurrence"]["BLOCK_C"])
        self.g = call.empty(call.clips, call.channels, call.positions)
        spatial = args.w_s1 is not None
        self.d_z_s_parts = call.empty(call.clips, self.blocks, call.positions) if spatial else None
        self.gate = GateBackward(call, config, saved, self.d_z_s_parts, self.du, need.need_weights, ranks)

    def run(self) -> RefineGradients:
        """Launch all kernels and return the gradients."""
        call, last = self.call, self.call.steps - 1
        for n in range(last, -1, -1):
            # Bind anew for the last step (no frame t + 1), the one before it (no dU_{t+2}), the next, and a first step
            # that reads a state. All others differ in addresses alone.
            if n >= last - 2 or (n == 0 and call.start == 0):
                recurrence = self._recurrence(n, self._frame(n))
            recurrence(n)
            self.gate.step(n)
        d_state_x = d_state_s = None
        if call.start == 0:
            d_state_x, d_state_s = self._state_gradients()
        elif self.d_x is not None:
            # The first frame has no gate: G is its gradient.
            first = self._frame_upstream()._replace(d_x=self._d_x_slices(self.d_x, first=1))
            self._recurrence(-1, first)(-1)
        return RefineGradients(x=self.d_x, **self._weight_gradients(), state_x=d_state_x, state_s=d_state_s)

    def _state_gradients(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of state_x, which only the first frame's motion reads, and of state_s."""
        call, dtype = self.call, self.call.args.x.dtype
        self._recurrence(-1, Frame())(-1)
        d_state_s = self.g.to(dtype, copy=True)
        self.g.zero_()
        d_state_x = self.g.new_empty(self.g.shape, dtype=dtype)
        self._recurrence(-2, None, DX(d_state_x, call.channels * call.positions))(-2)
        shape = (call.clips, call.channels, call.height, call.width)
        return d_state_x.view(shape), d_state_s.view(shape)

    def _weight_gradients(self) -> dict[str, Tensor | None]:
        """Return the gradients of w, gamma, beta, w_s1, w_s2 and w_c by name."""
        if not self.need.need_weights:
            return {}
        d_w = w_gradient(self.call, self.config["dw"], self.refined, self.du)
        return self.call.args.cast_to_weight_dtypes(w=d_w, **self.gate.weight_gradients(self.config["atb"]))

    def _recurrence(self, n: int, frame: Frame | None, d_state_x: DX | None = None) -> Launches:
        """Return launches that end step n + 1, if there is one, and begin step n.

        frame: slices of step n; None begins nothing. d_state_x: dX of the state's frame, which is step -1.
        """
        call = self.call
        ended = n + 1
        gated, motion = 0 <= ended < call.steps, call.args.inputs == "appearance+motion" and ended + 1 < call.steps
        shared = ended == 0 and gated and call.shares_first
        following = Following(
            du=Slices(self.du, first=1) if gated else None,
            du_next=Slices(self.du, first=2) if motion else None,
            attention=self._attention_slices(1) if gated else AttentionVectors(),
            d_x=self._d_x_slices(self.d_x, first=call.start + 1) if gated and self.d_x is not None else d_state_x,
        )
        operand_dtype, precision = grad_operand_dtype(call.args.x.dtype)
        return Launches(
            kernels.refine_bwd_recurrence_kernel,
            (call.clips, self.blocks),
            g=self.g,
            following=following,
            frame=Frame() if frame is None else frame,
            w_recurrent=call.w_first if shared else call.w_recurrent,
            # With the sum of both halves only the motion that ends at the next frame is left to w_input.
            w_input=None if shared and not motion else call.w_input,
            lengths=call.args.lengths,
            t=Counter(call.start),
            channels=call.channels,
            D=call.d,
            P=call.positions,
            W=call.width,
            HAS_NEXT=ended < call.steps,
            HAS_FRAME=frame is not None,
            RAW=call.args.inputs == "raw",
            SHARED=shared,
            OPERAND_DTYPE=operand_dtype,
            INT64_OFFSETS=self.int64_offsets,
            PRECISION=precision,
            **self.config["recurrence"],
        )

    def _frame(self, n: int) -> Frame:
        """Return the slices of the steps from n down, which have a gate."""
        call = self.call
        past = frame_slices(self.refined, call.start - 1)
        if n == 0 and call.state_s is not None:
            past = one_frame(call.state_s, 0)
        return self._frame_upstream()._replace(
            x=frame_slices(call.x, call.start),
            s=past,
            attention=self._attention_slices(0),
            d_z_s=self.d_z_s_parts,
            d_z_c=None if self.gate.d_z_c is None else Slices(self.gate.d_z_c),
        )

    def _frame_upstream(self) -> Frame:
        """Return a frame without a gate: the gradients that reach it from the outputs."""
        d_features = None if self.d_features is None else frame_slices(self.d_features, self.call.start)
        return Frame(d_features=d_features, d_strips=self.d_strips)

    def _attention_slices(self, first: int) -> AttentionVectors:
        z_s, z_c = (Slices(v, first=first) if len(v) else None for v in (self.saved.z_s, self.saved.z_c))
        return AttentionVectors(z_s=z_s, z_c=z_c)

    def _d_x_slices(self, d_x: Tensor, first: int) -> DX:
        return DX(Slices(d_x, 1, first), d_x.stride(0))
