"""The gate of `refine` after its transition: norm, ReLU and attention, eq. 1-4, forward and in closed form backward."""

from __future__ import annotations

import torch
from torch import Tensor

from rru_fast.distributed import Ranks


class Gate:
    """The gate's weights in the arithmetic dtype, and what they compute of a transition output u (B, D, P)."""

    def __init__(
        self,
        w: Tensor,
        gamma: Tensor,
        beta: Tensor,
        w_s1: Tensor | None,
        w_s2: Tensor | None,
        w_c: Tensor | None,
        inputs: str,
        eps: float,
        groups: int,
        ranks: Ranks | None,
        dtype: torch.dtype,
    ) -> None:
        self.w, self.gamma, self.beta = w.to(dtype), gamma.to(dtype), beta.to(dtype)
        self.w_s1 = None if w_s1 is None else w_s1.to(dtype)
        self.w_s2 = None if w_s2 is None else w_s2.to(dtype)
        self.w_c = None if w_c is None else w_c.to(dtype)
        self.inputs, self.eps, self.groups, self.ranks = inputs, eps, groups, ranks
        self.recurrent, self.hoisted = self.halves(self.w)

    def halves(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of w (D, 2C) that multiply what holds S, and those that multiply what does not."""
        half = w.shape[1] if self.inputs == "appearance" else w.shape[1] // 2
        first, second = w[:, :half], w[:, half:]
        return (second, first) if self.inputs == "raw" else (first, second)  # raw inputs are (X_t, S_{t-1})

    def statistics(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Biased variance and mean of each group, (groups, D), or of all ranks'; `torch.var_mean` is slower."""
        grouped = self.grouped(u)
        mean = grouped.mean((1, 3))
        var = (grouped - mean[:, None, :, None]).square_().mean((1, 3))
        if self.ranks is not None:
            self.ranks.merge_(mean, var)
        return var, mean

    def grouped(self, u: Tensor) -> Tensor:
        """(B, D, P) as (groups, B / groups, D, P)."""
        return u.view(self.groups, -1, *u.shape[1:])

    def normalise(self, u: Tensor, var: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Uhat (grouped), Y = relu(gamma Uhat + beta), and r = 1 / sqrt(var + eps), (groups, 1, D, 1)."""
        r = (var + self.eps).rsqrt()[:, None, :, None]
        uhat = (self.grouped(u) - mean[:, None, :, None]).mul_(r)
        y = (uhat * self.gamma[:, None]).add_(self.beta[:, None]).relu_()
        return uhat, y.view(u.shape), r

    def attention(self, y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """h (B, A) and z_s (B, P) of eq. 2, z_c (B, C) of eq. 3; None where the variant has none."""
        h = z_s = z_c = None
        if self.w_s1 is not None and self.w_s2 is not None:
            h = (y.mean(1) @ self.w_s1.t()).relu_()
            z_s = h @ self.w_s2.t()
        if self.w_c is not None:
            z_c = y.mean(2) @ self.w_c.t()
        return h, z_s, z_c


def sigmoid_gate(z_s: Tensor | None, z_c: Tensor | None, out: Tensor) -> Tensor:
    """Z = sigmoid(z_c z_s^T) into `out` (B, C, P), eq. 4; a missing vector is all ones."""
    if z_s is None and z_c is not None:
        out.copy_(z_c[:, :, None])
    elif z_c is None and z_s is not None:
        out.copy_(z_s[:, None])
    elif z_s is not None and z_c is not None:
        torch.mul(z_c[:, :, None], z_s[:, None], out=out)
    return out.sigmoid_()


class GateGradients:
    """Gradients of the gate's weights, summed step by step; None where the variant has no such weight."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.gamma, self.beta = torch.zeros_like(gate.gamma), torch.zeros_like(gate.beta)
        self.w_s1, self.w_s2, self.w_c = (
            None if weight is None else torch.zeros_like(weight) for weight in (gate.w_s1, gate.w_s2, gate.w_c)
        )

    def step(
        self,
        dl: Tensor,
        u: Tensor,
        var: Tensor,
        mean: Tensor,
        h: Tensor | None,
        z_s: Tensor | None,
        z_c: Tensor | None,
        training: bool,
    ) -> Tensor:
        """Gradient of u (B, D, P) from dl (B, C, P), that of the logits z_c z_s^T, which is overwritten."""
        gate = self.gate
        uhat, y, r = gate.normalise(u, var, mean)
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
        dy = gate.grouped(torch.ops.aten.threshold_backward(dy, y, 0))
        sum_dy, sum_dy_uhat = dy.sum((1, 3)), (dy * uhat).sum((1, 3))  # (groups, D)
        self.beta += sum_dy.sum(0)
        self.gamma += sum_dy_uhat.sum(0)
        if training:
            count = dy.shape[1] * dy.shape[3]
            if gate.ranks is not None:
                count = gate.ranks.elements
                sum_dy, sum_dy_uhat = gate.ranks.total(sum_dy, sum_dy_uhat)
            dy -= (sum_dy / count)[:, None, :, None]
            dy -= uhat.mul_((sum_dy_uhat / count)[:, None, :, None])
        return dy.mul_(r * gate.gamma[:, None]).view(u.shape)
