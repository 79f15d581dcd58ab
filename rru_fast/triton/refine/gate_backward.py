"""From dz_s and dz_c to dU: the gate's part of the backward of `refine`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rru_fast.distributed import Ranks
from rru_fast.triton._autotune import KernelConfig, LaunchConfig
from rru_fast.triton._launch import Launches, Slices
from rru_fast.triton.refine import backward_kernels as kernels
from rru_fast.triton.refine.arguments import Call, Saved
from rru_fast.triton.refine.weight_gradients import outer


class GateBackward:
    """Launches of `pooled_backward`, `gate_backward` and `norm_backward`, and their sums for the weights' gradients."""

    def __init__(
        self,
        call: Call,
        config: LaunchConfig,
        saved: Saved,
        d_z_s_blocks: Tensor | None,
        blocks: int,
        du: Tensor,
        need_weights: bool,
        ranks: Ranks | None,
    ) -> None:
        self.call, self.saved, self.ranks = call, saved, ranks
        gate, norm, pooled = config["gate"], config["norm"], config["pooled"]
        steps, clips, d = call.steps, call.clips, call.d
        tiles = -(-d // gate["BLOCK_D"])
        spatial, channel = call.w_s1 is not None, call.w_c is not None
        a, b = call.empty(clips, call.positions) if spatial else None, call.empty(clips, d)
        d_pooled = call.empty(clips, pooled["SPLIT"], d) if channel else None
        self.group_dy, self.group_dy_uhat = (call.empty(call.groups, d) if call.training else None for _ in range(2))
        d_z_s = call.empty(steps, clips, call.positions) if spatial else None
        d_h = call.empty(steps, clips, call.a) if spatial else None
        d_z_c = call.empty(steps, clips, call.channels) if channel else None
        y_positions = call.empty(steps, clips, tiles, call.positions) if need_weights else None
        y_channels = call.empty(steps, clips, d) if need_weights else None
        dy, dy_uhat = call.empty(steps, clips, d), call.empty(steps, clips, d)
        self.sums = (dy_uhat, dy, d_h, d_z_s, d_z_c, y_positions, y_channels)
        self.du, self.u, self.h = Slices(du), Slices(saved.u), Slices(saved.h) if len(saved.h) else None
        self.statistics = (Slices(saved.mean), Slices(saved.var)) if call.training else ()
        self.d_z_c = None if d_z_c is None else Slices(d_z_c)
        self.outputs = [None if v is None else Slices(v) for v in (d_z_s, d_h, y_positions, y_channels, dy, dy_uhat)]
        means = ("mean", "var") if call.training else ()
        shared: dict[str, Any] = {
            **({} if call.training else {"mean": saved.mean, "var": saved.var}),
            "group_dy": self.group_dy,
            "group_dy_uhat": self.group_dy_uhat,
            "gamma": call.gamma,
            "beta": call.beta,
            "a": a,
            "b": b,
            "clips_per_group": call.clips_per_group,
            "D": d,
            "P": call.positions,
            "EPS": call.eps,
        }
        self.pooled_launches = Launches(
            kernels.pooled_backward_kernel,
            (-(-clips // pooled["BLOCK_B"]) * -(-d // pooled["BLOCK_D"]), pooled["SPLIT"]),
            ("d_z_c",),
            None,
            d_pooled=d_pooled,
            w_c=call.w_c,
            clips=clips,
            channels=call.channels,
            D=d,
            **pooled,
        )
        self.gate_launches = Launches(
            kernels.gate_backward_kernel,
            (clips, tiles),
            ("u", "h", "d_z_s", "d_h", "y_positions", "y_channels", "sum_dy", "sum_dy_uhat", "du", *means),
            None,
            d_z_s_blocks=d_z_s_blocks,
            blocks=blocks,
            d_pooled_parts=d_pooled,
            parts=pooled["SPLIT"],
            w_s1=call.w_s1,
            w_s2=call.w_s2,
            arrivals=call.counters(call.groups * tiles),
            A=call.a,
            **shared,
            **gate,
        )
        self.norm_launches = Launches(
            kernels.norm_backward_kernel,
            (clips, -(-d // norm["BLOCK_D"])),
            ("du", "u", *means),
            None,
            elements=call.clips_per_group * call.positions if ranks is None else ranks.elements,
            **shared,
            **norm,
        )

    def step(self, n: int) -> None:
        """dU of step n from the blocks' sums of dz_s, and from dz_c."""
        call = self.call
        u, statistics = self.u[n], [v[call.start + n] for v in self.statistics]
        if self.d_z_c is not None:
            self.pooled_launches(self.d_z_c[n])
        self.gate_launches(
            u,
            None if self.h is None else self.h[n],
            *[None if v is None else v[n] for v in self.outputs],
            None if call.training else self.du[n],
            *statistics,
        )
        if self.group_dy is not None and self.group_dy_uhat is not None:
            if self.ranks is not None:
                sums = self.group_dy, self.group_dy_uhat
                for own, total in zip(sums, self.ranks.total(*sums), strict=True):
                    own.copy_(total)
            self.norm_launches(self.du[n], u, *statistics)

    def weight_gradients(self, config: KernelConfig) -> list[Tensor | None]:
        """Of gamma, beta, w_s1, w_s2, w_c."""
        dy_uhat, dy, d_h, d_z_s, d_z_c, y_positions, y_channels = self.sums
        d_s1 = d_s2 = d_c = None
        if d_h is not None and d_z_s is not None and y_positions is not None:
            d_s1 = outer(d_h, y_positions.sum(2) / self.call.d, config)
            d_s2 = outer(d_z_s, self.saved.h, config)
        if d_z_c is not None and y_channels is not None:
            d_c = outer(d_z_c, y_channels, config)
        return [dy_uhat.sum((0, 1)), dy.sum((0, 1)), d_s1, d_s2, d_c]
