"""Launches from dz_s and dz_c to dU: the gate's part of the backward of `refine`."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from rru_fast.arguments import RefineSaved
from rru_fast.distributed import Ranks
from rru_fast.triton._autotune import KernelConfig, LaunchConfig
from rru_fast.triton._launch import Launches, Slices, cdiv
from rru_fast.triton.refine import backward_kernels as kernels
from rru_fast.triton.refine.arguments import AttentionVectors, Call, Statistics
from rru_fast.triton.refine.weight_gradients import atb


class Parts(NamedTuple):
    """Parts of a sum, (B, num_parts, size)."""

    ptr: Tensor
    num_parts: int


class DY(NamedTuple):
    """dY's two parts: a, which depends on the position, and b, which depends on the gate channel."""

    a: Tensor | None
    """(B, P); None without spatial attention."""
    b: Tensor
    """(B, D)."""


class YMeans(NamedTuple):
    """Sums and means of Y that the weights' gradients need, of one frame or as slices per frame."""

    positions: Any
    """(B, d tiles, P), sums over a tile's gate channels; or None."""
    channels: Any
    """(B, D), means over positions; or None."""


class NormSums(NamedTuple):
    """Sums of dY and of dY Uhat over positions."""

    dy: Any = None
    dy_uhat: Any = None


class GateBackward:
    """Launches of the pooled, gate and norm kernels, and the tensors of which the weights' gradients are computed."""

    def __init__(
        self,
        call: Call,
        config: LaunchConfig,
        saved: RefineSaved,
        d_z_s_parts: Tensor | None,
        du: Tensor,
        need_weights: bool,
        ranks: Ranks | None,
    ) -> None:
        """Allocate scratch. d_z_s_parts: sums over blocks of channels, (B, blocks, P); du: output (N, B, D, P)."""
        self.call, self.saved, self.ranks = call, saved, ranks
        steps, clips, d, training = call.steps, call.clips, call.d, call.args.training
        spatial, channel = call.gate.w_s1 is not None, call.gate.w_c is not None
        gate, norm, pooled = config["gate"], config["norm"], config["pooled"]
        d_tiles = cdiv(d, gate["BLOCK_D"])
        self.d_z_s = call.empty(steps, clips, call.positions) if spatial else None
        self.d_h = call.empty(steps, clips, call.num_attn) if spatial else None
        self.d_z_c = call.empty(steps, clips, call.channels) if channel else None
        self.y_positions = call.empty(steps, clips, d_tiles, call.positions) if need_weights else None
        self.y_channels = call.empty(steps, clips, d) if need_weights else None
        self.sums = NormSums(call.empty(steps, clips, d), call.empty(steps, clips, d))
        self.group_sums = NormSums()
        if training:
            self.group_sums = NormSums(call.empty(call.groups, d), call.empty(call.groups, d))
        d_pooled = call.empty(clips, pooled["SPLIT"], d) if channel else None
        d_y = DY(call.empty(clips, call.positions) if spatial else None, call.empty(clips, d))
        own = Statistics(saved.mean, saved.var) if training else call.running_statistics()
        statistics = call.statistics_slices(own, call.start)

        def slices(tensor: Tensor | None) -> Slices | None:
            return None if tensor is None else Slices(tensor)

        self.pooled = None
        if self.d_z_c is not None:
            self.pooled = Launches(
                kernels.refine_bwd_pooled_kernel,
                (cdiv(clips, pooled["BLOCK_B"]) * cdiv(d, pooled["BLOCK_D"]), pooled["SPLIT"]),
                d_pooled=d_pooled,
                d_z_c=Slices(self.d_z_c),
                w_c=call.gate.w_c,
                clips=clips,
                channels=call.channels,
                D=d,
                **pooled,
            )
        self.gate = Launches(
            kernels.refine_bwd_gate_kernel,
            (clips, d_tiles),
            d_z_s_parts=None if d_z_s_parts is None else Parts(d_z_s_parts, d_z_s_parts.shape[1]),
            d_pooled_parts=None if d_pooled is None else Parts(d_pooled, pooled["SPLIT"]),
            u=Slices(saved.u),
            statistics=statistics,
            gate=call.gate,
            h=Slices(saved.h) if spatial else None,
            d_attention=AttentionVectors(h=slices(self.d_h), z_s=slices(self.d_z_s)),
            d_y=d_y,
            y_means=YMeans(slices(self.y_positions), slices(self.y_channels)),
            sums=NormSums(Slices(self.sums.dy), Slices(self.sums.dy_uhat)),
            group_sums=self.group_sums,
            du=None if training else Slices(du),
            arrivals=call.counters(call.groups * d_tiles),
            clips_per_group=call.clips_per_group,
            D=d,
            A=call.num_attn,
            P=call.positions,
            EPS=call.args.eps,
            **gate,
        )
        self.norm = None
        if training:
            self.norm = Launches(
                kernels.refine_bwd_norm_kernel,
                (clips, cdiv(d, norm["BLOCK_D"])),
                du=Slices(du),
                u=Slices(saved.u),
                statistics=statistics,
                gate=call.gate,
                d_y=d_y,
                group_sums=self.group_sums,
                elements=call.clips_per_group * call.positions if ranks is None else ranks.elements,
                clips_per_group=call.clips_per_group,
                D=d,
                P=call.positions,
                EPS=call.args.eps,
                **norm,
            )

    def step(self, n: int) -> None:
        """Compute dU of step n from the parts of dz_s, and from dz_c."""
        if self.pooled is not None:
            self.pooled(n)
        self.gate(n)
        if self.norm is not None:
            if self.ranks is not None:
                for own, total in zip(self.group_sums, self.ranks.sum_over_ranks(*self.group_sums), strict=True):
                    own.copy_(total)
            self.norm(n)

    def weight_gradients(self, config: KernelConfig) -> dict[str, Tensor | None]:
        """Return the gradients of gamma, beta, w_s1, w_s2 and w_c by name."""
        d_w_s1 = d_w_s2 = d_w_c = None
        if self.d_h is not None and self.d_z_s is not None and self.y_positions is not None:
            d_w_s1 = atb(self.d_h, self.y_positions.sum(2) / self.call.d, config)
            d_w_s2 = atb(self.d_z_s, self.saved.h, config)
        if self.d_z_c is not None and self.y_channels is not None:
            d_w_c = atb(self.d_z_c, self.y_channels, config)
        return {
            "gamma": self.sums.dy_uhat.sum((0, 1)),
            "beta": self.sums.dy.sum((0, 1)),
            "w_s1": d_w_s1,
            "w_s2": d_w_s2,
            "w_c": d_w_c,
        }
