"""`refine` as matrix products over whole frames, with in-place passes between them.

Feature maps are matrices (B, C, P) here, P = H * W. The part of U that does not depend on S is one product over all
frames, computed in blocks of frames that bound its scratch memory; each frame then adds one product and a few passes
over buffers that stay in cache. Only U, z_s, z_c and h are saved for the backward; Z and A are recomputed. The
accumulation dtype is float64 for float64 input, and float32 otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rru_fast.arguments import (
    RefineArguments,
    RefineGradients,
    RefineNeed,
    RefineOutputs,
    RefineSaved,
    RefineUpstream,
)
from rru_fast.composite._frames import Frames, UpstreamFrames, length_mask
from rru_fast.composite._gate import AttentionVectors, Gate, GateGradients, Statistics, sigmoid_gate
from rru_fast.composite._products import Products
from rru_fast.distributed import ranks_of

# Scratch of the input projection, at least one frame: small enough to stay in cache, large enough to fill a product.
PROJECTION_BYTES = 16 * 2**20


def forward(args: RefineArguments, save: bool) -> RefineOutputs:
    """Run eq. 1-5 and 9."""
    return _Forward(args, save).run()


def backward(upstream: RefineUpstream, saved: RefineSaved, args: RefineArguments, need: RefineNeed) -> RefineGradients:
    """Run the closed-form backward, from the last frame to the first."""
    return _Backward(upstream, saved, args, need).run()


class _Pass:
    """Sizes, operands and weights of one call, forward or backward."""

    def __init__(self, args: RefineArguments) -> None:
        self.args = args
        self.acc_dtype = torch.promote_types(args.x.dtype, torch.float32)
        self.clips, self.frames, self.channels, self.height, self.width = args.x.shape
        self.positions, self.d = self.height * self.width, args.w.shape[0]
        self.steps = args.steps
        self.start = self.frames - self.steps  # the first frame with a gate
        # At the first gated frame A = M, since S_1 = X_1: one product with the sum of both halves of w serves both.
        self.shares_first = args.inputs == "appearance+motion" and args.state_s is None
        ranks = ranks_of(args.process_group, args.elements_per_rank, args.x.device)
        self.products, self.gate = Products(args.x), Gate(args, ranks, self.acc_dtype)
        self.x = Frames(args.x, args.state_x, args.lengths, self.acc_dtype)
        self.running: Statistics | None = None  # as those of one group, (1, D)
        if args.running_mean is not None and args.running_var is not None:
            self.running = Statistics(
                args.running_mean.to(self.acc_dtype)[None], args.running_var.to(self.acc_dtype)[None]
            )

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialized tensor in the accumulation dtype."""
        return self.args.x.new_empty(shape, dtype=self.acc_dtype)


class _Forward(_Pass):
    """Buffers of a forward pass."""

    def __init__(self, args: RefineArguments, save: bool) -> None:
        super().__init__(args)
        self.save = save
        self.features = args.x.new_empty(args.x.shape)
        self.s_out = self.features.view(self.clips, self.frames, self.channels, self.positions)
        statistics = (self.frames if args.training else 0, args.bn_groups, self.d)
        self.mean, self.var = (args.x.new_zeros(statistics, dtype=self.acc_dtype) for _ in range(2))
        self.u = self.empty(self.steps, self.clips, self.d, self.positions)
        saved, num_attn = self.steps if save else 0, 0 if args.w_s1 is None else args.w_s1.shape[0]
        self.z_s = self.empty(saved if args.w_s1 is not None else 0, self.clips, self.positions)
        self.z_c = self.empty(saved if args.w_c is not None else 0, self.clips, self.channels)
        self.h = self.empty(saved if args.w_s1 is not None else 0, self.clips, num_attn)

    def run(self) -> RefineOutputs:
        """Return the outputs."""
        args = self.args
        if args.inputs != "appearance":
            self._project_inputs()
        if args.state_s is not None:
            s = args.state_s.flatten(2).to(self.acc_dtype)
            total = torch.zeros_like(s)  # sum of S over time, for the strips
        else:
            s = self._first_frame()
            total = s.clone(memory_format=torch.contiguous_format)
        a = self.empty(self.clips, self.channels, self.positions)
        for n in range(self.steps):
            t = self.start + n
            torch.sub(self.x[t], s, out=a)
            s = self._blend(t, s, a, self._attention(n, s, a))
            total += s if args.lengths is None else s.masked_fill(~length_mask(args.lengths, self.frames)[:, t], 0)
        if args.lengths is not None:
            self.s_out.masked_fill_(~length_mask(args.lengths, self.frames), 0)
        strips = total.view(self.clips, self.channels, self.height, self.width).mean(3)
        strips = strips / (self.frames if args.lengths is None else args.lengths[:, None, None].to(self.acc_dtype))
        return RefineOutputs(
            features=self.features,
            strips=strips.to(args.x.dtype),
            mean=self.mean,
            var=self.var,
            u=self.u if self.save else self.empty(0, self.clips, self.d, self.positions),
            z_s=self.z_s,
            z_c=self.z_c,
            h=self.h,
        )

    def _project_inputs(self) -> None:
        """Set u[n] to w_input times its operand, for all frames in a few products."""
        frame_bytes = self.clips * self.channels * self.positions * self.u.element_size()
        block = max(1, PROJECTION_BYTES // frame_bytes)
        operand = self.empty(min(block, self.steps), self.clips, self.channels, self.positions)
        for n0 in range(int(self.shares_first), self.steps, block):
            n1 = min(n0 + block, self.steps)
            for n in range(n0, n1):
                self.x.input_operand(self.args.inputs, self.start + n, operand[n - n0])
            self.products.multiply(self.u[n0:n1].flatten(0, 1), self.gate.w_input, operand[: n1 - n0].flatten(0, 1))

    def _first_frame(self) -> Tensor:
        """Return S_1 = X_1."""
        s = self.x[0]
        self.s_out[:, 0] = s
        if self.args.training and self.args.inputs == "raw":
            # The gate's input (X_1, X_1) is not zero: only its statistics are needed, for the running ones.
            u = self.empty(self.clips, self.d, self.positions)
            self.products.multiply(u, self.gate.w_recurrent + self.gate.w_input, s.contiguous())
            self.mean[0], self.var[0] = self.gate.statistics(u)
        return s

    def _attention(self, n: int, s: Tensor, a: Tensor) -> AttentionVectors:
        """Return the attention vectors of step n, from S_{t-1} and A_t, and save what the backward needs."""
        gate, u = self.gate, self.u[n]
        if n == 0 and self.shares_first:
            self.products.multiply(u, gate.w_recurrent + gate.w_input, a)
        elif self.args.inputs == "appearance":
            self.products.multiply(u, gate.w_recurrent, a)
        else:
            self.products.add_product(u, gate.w_recurrent, s if self.args.inputs == "raw" else a)
        if self.args.training:
            statistics = gate.statistics(u)
            self.mean[self.start + n], self.var[self.start + n] = statistics
        else:
            assert self.running is not None
            statistics = self.running
        attention = gate.attention(u, statistics)
        if self.save:
            for saved, vector in zip((self.h, self.z_s, self.z_c), attention, strict=True):
                if vector is not None:
                    saved[n] = vector
        return attention

    def _blend(self, t: int, s: Tensor, a: Tensor, attention: AttentionVectors) -> Tensor:
        """Write and return S_t = S_{t-1} + Z_t A_t, eq. 5.

        In place if the output has the accumulation dtype; else the state keeps that dtype and the output rounds it.
        """
        in_place = self.args.x.dtype == self.acc_dtype
        z = sigmoid_gate(attention.z_s, attention.z_c, out=self.s_out[:, t] if in_place else torch.empty_like(a))
        s = torch.addcmul(s, z, a, out=z)
        if not in_place:
            self.s_out[:, t] = s
        return s


class _Backward(_Pass):
    """Buffers and accumulated gradients of a backward pass."""

    def __init__(self, upstream: RefineUpstream, saved: RefineSaved, args: RefineArguments, need: RefineNeed) -> None:
        super().__init__(args)
        self.saved, self.need = saved, need
        self.s = Frames(saved.features, args.state_s, None, self.acc_dtype)
        self.upstream = UpstreamFrames(upstream, args.lengths, args.x.shape, self.acc_dtype)
        self.gradients = GateGradients(self.gate)
        self.w_recurrent_t = self.gate.w_recurrent.t().contiguous()
        self.w_input_t = self.gate.w_input.t().contiguous()
        # Transposed, (C, D): the product that accumulates into them takes two thirds of the time.
        self.d_w_recurrent_t, self.d_w_input_t = torch.zeros_like(self.w_recurrent_t), torch.zeros_like(self.w_input_t)
        self.d_x = args.x.new_empty(args.x.shape) if need.need_x else None
        self.a, self.z, self.scratch = (self.empty(self.clips, self.channels, self.positions) for _ in range(3))

    def run(self) -> RefineGradients:
        """Return the gradients."""
        carry = torch.zeros_like(self.a)  # gradient that step t + 1 sends to S_t
        du_next: Tensor | None = None
        for t in range(self.frames - 1, self.start - 1, -1):
            g = self.upstream.add_to(carry, t)
            zg, du = self._gate(t, g)
            if self.need.need_weights:
                self._add_weight_gradients(t, du)
            carry = self._propagate(t, g, zg, du, du_next)
            du_next = du
        d_state_x = d_state_s = None
        if self.start == 0:
            d_state_x, d_state_s = self._state_gradients(carry, du_next)
        elif self.d_x is not None:
            self._frame(self.d_x, 0).copy_(self.upstream.add_to(carry, 0))
        return RefineGradients(x=self.d_x, **self._weight_gradients(), state_x=d_state_x, state_s=d_state_s)

    def _gate(self, t: int, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return Z_t G_t and dU_t; leave A_t in self.a."""
        n, args, saved = t - self.start, self.args, self.saved
        attention = AttentionVectors(
            h=saved.h[n] if args.w_s1 is not None else None,
            z_s=saved.z_s[n] if args.w_s1 is not None else None,
            z_c=saved.z_c[n] if args.w_c is not None else None,
        )
        torch.sub(self.x[t], self.s[t - 1], out=self.a)
        sigmoid_gate(attention.z_s, attention.z_c, out=self.z)
        dl = torch.mul(g, self.a, out=self.scratch)
        torch.ops.aten.sigmoid_backward(dl, self.z, grad_input=dl)  # dl z (1 - z) in one pass
        zg = self.z.mul_(g)
        statistics = Statistics(saved.mean[t], saved.var[t]) if args.training else self.running
        assert statistics is not None
        return zg, self.gradients.step(dl, saved.u[n], statistics, attention)

    def _add_weight_gradients(self, t: int, du: Tensor) -> None:
        """Accumulate dU_t V_t^T into the gradients of w's two halves."""
        inputs = self.args.inputs
        if t == self.start and self.shares_first:
            d_both = self.products.add_outer(torch.zeros_like(self.d_w_input_t), self.a, du)
            self.d_w_recurrent_t += d_both
            self.d_w_input_t += d_both
            return
        self.products.add_outer(self.d_w_recurrent_t, self.s[t - 1] if inputs == "raw" else self.a, du)
        if inputs != "appearance":
            self.products.add_outer(self.d_w_input_t, self.x.input_operand(inputs, t, out=self.scratch), du)

    def _propagate(self, t: int, g: Tensor, zg: Tensor, du: Tensor, du_next: Tensor | None) -> Tensor:
        """Write dX_t and return the carry.

        dX_t = Z G + E + (the part through w_input); carry = (1 - Z) G - E, or + E for raw inputs, E = w_recurrent^T dU.
        """
        shared = t == self.start and self.shares_first
        if self.args.inputs == "raw":
            carry = self.products.add_product(g.sub_(zg), self.w_recurrent_t, du)
        else:
            through_a = self.w_recurrent_t + self.w_input_t if shared else self.w_recurrent_t
            self.products.add_product(zg, through_a, du)
            carry = g.sub_(zg)
        if self.d_x is not None:
            du_input = _du_input(self.args.inputs, shared, du, du_next)
            if du_input is not None:
                self.products.add_product(zg, self.w_input_t, du_input)
            self._frame(self.d_x, t).copy_(zg)
        return carry

    def _state_gradients(self, carry: Tensor, du_first: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the gradients of state_x, which enters the first frame's motion, and of state_s, the carry."""
        d_state_x = torch.zeros_like(carry)
        if self.args.inputs == "appearance+motion" and du_first is not None:
            self.products.add_product(d_state_x, self.w_input_t, -du_first)
        shape, dtype = (self.clips, self.channels, self.height, self.width), self.args.x.dtype
        return d_state_x.view(shape).to(dtype), carry.view(shape).to(dtype)

    def _weight_gradients(self) -> dict[str, Tensor | None]:
        """Return the gradients of w, gamma, beta, w_s1, w_s2 and w_c by name."""
        if not self.need.need_weights:
            return {}
        own, d_w = self.gradients, torch.empty_like(self.gate.w)
        for half, d_half_t in zip(self.gate.split(d_w), (self.d_w_recurrent_t, self.d_w_input_t), strict=True):
            half.copy_(d_half_t.t())
        return self.args.cast_to_weight_dtypes(
            w=d_w, gamma=own.gamma, beta=own.beta, w_s1=own.w_s1, w_s2=own.w_s2, w_c=own.w_c
        )

    def _frame(self, maps: Tensor, t: int) -> Tensor:
        return maps.view(self.clips, self.frames, self.channels, self.positions)[:, t]


def _du_input(inputs: str, shared: bool, du: Tensor, du_next: Tensor | None) -> Tensor | None:
    """Return the gradient of w_input's product that reaches X_t: dU_t, less dU_{t+1}, whose motion subtracts X_t."""
    if inputs == "appearance":
        return None
    if inputs == "raw" or du_next is None:
        return None if shared else du
    return -du_next if shared else du - du_next
