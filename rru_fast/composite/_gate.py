"""The gate of `refine` after its transition: norm, ReLU and attention, eq. 1-4, forward and closed-form backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rru_fast.arguments import RefineArguments
from rru_fast.distributed import Ranks


class AttentionVectors(NamedTuple):
    """AttentionVectors vectors of one frame; None where the variant has none."""

    h: Tensor | None
    """(B, A), hidden units of eq. 2."""
    z_s: Tensor | None
    """(B, P), eq. 2."""
    z_c: Tensor | None
    """(B, C), eq. 3."""


class Statistics(NamedTuple):
    """Mean and biased variance of each gate channel, (groups, D)."""

    mean: Tensor
    var: Tensor


class Gate:
    """The gate's weights in the accumulation dtype, applied to a transition output u (B, D, P)."""

    def __init__(self, args: RefineArguments, ranks: Ranks | None, acc_dtype: torch.dtype) -> None:
        def cast(weight: Tensor | None) -> Tensor | None:
            return None if weight is None else weight.to(acc_dtype)

        self.w, self.gamma, self.beta = args.w.to(acc_dtype), args.gamma.to(acc_dtype), args.beta.to(acc_dtype)
        self.w_s1, self.w_s2, self.w_c = cast(args.w_s1), cast(args.w_s2), cast(args.w_c)
        self.inputs, self.training, self.eps, self.ranks = args.inputs, args.training, args.eps, ranks
        self.groups = args.groups
        self.w_recurrent, self.w_input = self.split(self.w)

    def split(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Split w (D, 2C) into the columns of the operand that holds S, and of the one that does not."""
        if self.inputs == "appearance":
            return w, w[:, :0]
        first, second = w.chunk(2, 1)
        return (second, first) if self.inputs == "raw" else (first, second)  # raw inputs are (X_t, S_{t-1})

    def statistics(self, u: Tensor) -> Statistics:
        """Compute batch statistics, over all ranks if they share them; `torch.var_mean` is slower."""
        grouped = self.grouped(u)
        mean = grouped.mean((1, 3))
        var = (grouped - mean[:, None, :, None]).square_().mean((1, 3))
        if self.ranks is not None:
            self.ranks.merge_(mean, var)
        return Statistics(mean, var)

    def grouped(self, u: Tensor) -> Tensor:
        """View (B, D, P) as (groups, B / groups, D, P)."""
        return u.view(self.groups, -1, *u.shape[1:])

    def normalize(self, u: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor, Tensor]:
        """Return Uhat (grouped), Y = relu(gamma Uhat + beta), and r = 1 / sqrt(var + eps), (groups, 1, D, 1)."""
        r = (statistics.var + self.eps).rsqrt()[:, None, :, None]
        uhat = (self.grouped(u) - statistics.mean[:, None, :, None]).mul_(r)
        y = (uhat * self.gamma[:, None]).add_(self.beta[:, None]).relu_()
        return uhat, y.view(u.shape), r

    def attention(self, u: Tensor, statistics: Statistics) -> AttentionVectors:
        """Compute the attention vectors, eq. 2 and 3."""
        _, y, _ = self.normalize(u, statistics)
        h = z_s = z_c = None
        if self.w_s1 is not None and self.w_s2 is not None:
            h = (y.mean(1) @ self.w_s1.t()).relu_()
            z_s = h @ self.w_s2.t()
        if self.w_c is not None:
            z_c = y.mean(2) @ self.w_c.t()
        return AttentionVectors(h, z_s, z_c)


def sigmoid_gate(z_s: Tensor | None, z_c: Tensor | None, out: Tensor) -> Tensor:
    """Write Z = sigmoid(z_c z_s^T), eq. 4, to `out` (B, C, P); a missing vector is all ones."""
    if z_s is None and z_c is not None:
        out.copy_(z_c[:, :, None])
    elif z_c is None and z_s is not None:
        out.copy_(z_s[:, None])
    elif z_s is not None and z_c is not None:
        torch.mul(z_c[:, :, None], z_s[:, None], out=out)
    return out.sigmoid_()


class GateGradients:
    """Gradients of the gate's weights, accumulated over frames; None where the variant has no such weight."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.gamma, self.beta = torch.zeros_like(gate.gamma), torch.zeros_like(gate.beta)
        self.w_s1, self.w_s2, self.w_c = (
            None if weight is None else torch.zeros_like(weight) for weight in (gate.w_s1, gate.w_s2, gate.w_c)
        )

    def step(self, dl: Tensor, u: Tensor, statistics: Statistics, attention: AttentionVectors) -> Tensor:
        """Return dU (B, D, P) from dL (B, C, P), the gradient of the logits z_c z_s^T, which is overwritten."""
        gate, (h, z_s, z_c) = self.gate, attention
        uhat, y, r = gate.normalize(u, statistics)
        dy: Tensor | float = 0.0
        if gate.w_c is not None and self.w_c is not None:
            dz_c = dl.sum(2) if z_s is None else torch.bmm(dl, z_s[:, :, None])[..., 0]  # (B, C)
            dy = (dz_c @ gate.w_c).div_(y.shape[2])[:, :, None]
            self.w_c.addmm_(dz_c.t(), y.mean(2))
        if gate.w_s1 is not None and gate.w_s2 is not None:
            assert h is not None and self.w_s1 is not None and self.w_s2 is not None
            # A plain sum: as a product, C terms in a row lose twice the digits.
            dz_s = (dl if z_c is None else dl.mul_(z_c[:, :, None])).sum(1)  # (B, P)
            dh = torch.ops.aten.threshold_backward(dz_s @ gate.w_s2, h, 0)
            dy = dy + (dh @ gate.w_s1).div_(y.shape[1])[:, None]
            self.w_s2.addmm_(dz_s.t(), h)
            self.w_s1.addmm_(dh.t(), y.mean(1))
        return self._norm_backward(gate.grouped(torch.ops.aten.threshold_backward(dy, y, 0)), uhat, r).view(u.shape)

    def _norm_backward(self, dy: Tensor, uhat: Tensor, r: Tensor) -> Tensor:
        """Return dU from dY through the batch norm, (groups, B / groups, D, P); dY and Uhat are overwritten."""
        gate = self.gate
        sum_dy, sum_dy_uhat = dy.sum((1, 3)), (dy * uhat).sum((1, 3))  # (groups, D)
        self.beta += sum_dy.sum(0)
        self.gamma += sum_dy_uhat.sum(0)
        if gate.training:
            count = dy.shape[1] * dy.shape[3]
            if gate.ranks is not None:
                count = gate.ranks.elements
                sum_dy, sum_dy_uhat = gate.ranks.sum_over_ranks(sum_dy, sum_dy_uhat)
            dy -= (sum_dy / count)[:, None, :, None]
            dy -= uhat.mul_((sum_dy_uhat / count)[:, None, :, None])
        return dy.mul_(r * gate.gamma[:, None])
