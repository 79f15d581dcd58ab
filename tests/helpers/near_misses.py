"""Modules that look like other people's and compute something else, each with how the line begins that says so."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.helpers import third_party
from tests.helpers.modules import SIZES


class Leaky(third_party.RRU):
    def gate(self, v: Tensor) -> Tensor:
        block = self.reduce_dim_z
        y = nn.functional.leaky_relu(block.bn(block.conv(v)), 0.1)
        where = self.s_atten_z(y.mean(1, keepdim=True)).view(len(y), 1, *y.shape[2:])
        return torch.sigmoid(where * self.c_atten_z(y))


class Truncated(third_party.RRU):
    """Its outputs are the same, its gradients are not."""

    def gate(self, v: Tensor) -> Tensor:
        return super().gate(v.detach())


class ForgetsFirst(third_party.RRU):
    """The same but for what the norm remembers: its first frame goes uncounted."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.training:
            self.reduce_dim_z.bn.num_batches_tracked -= 1
        return out


class FramesFirst(third_party.RRU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(1, 2)


class WithStrips(third_party.RRU):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = super().forward(x)
        return out, out.mean((2, 4))


class Normalised(third_party.TripletLoss):
    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return super().forward(nn.functional.normalize(inputs), targets)


class Squared(third_party.TripletLoss):
    def distances(self, inputs: Tensor) -> Tensor:
        return super().distances(inputs).square()


class Unclamped(third_party.TripletLoss):
    """Differs only for a person who is seen once: 0 where the floor is 1e-6."""

    def distances(self, inputs: Tensor) -> Tensor:
        return (inputs[:, None] - inputs).square().sum(2).clamp(min=1e-30).sqrt()


class Weighted(third_party.TripletLoss):
    def forward(self, inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        return super().forward(inputs, targets)


class Remembers(third_party.TripletLoss):
    """The same but for what it keeps of a call."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.last = super().forward(inputs, targets)
        return self.last


class NamedOnly(third_party.RRU):
    def forward(self, *, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Hingeless(third_party.TripletLoss):
    """The same where every anchor is active."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        distances, same = self.distances(inputs), targets[:, None] == targets
        farthest = distances.masked_fill(~same, 0).amax(1)
        nearest = distances.masked_fill(same, torch.inf).amin(1)
        return (self.margin + farthest - nearest).mean()


def _parametrized() -> nn.Module:
    module = third_party.TripletLoss()
    module.weight = nn.Parameter(torch.ones(2))
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Softplus())
    return module


def _hooked() -> nn.Module:
    module = third_party.RRU(6, **SIZES)
    module.s_atten_z[0].register_forward_hook(lambda *call: None)
    return module


def _spectral_normed() -> nn.Module:
    module = third_party.RRU(6, **SIZES)
    nn.utils.parametrizations.spectral_norm(module.reduce_dim_z.conv)  # a step of its iteration a frame
    return module


def _patched() -> nn.Module:
    module = third_party.RRU(6, **SIZES)
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def _summed() -> nn.Module:
    loss = third_party.TripletLoss()
    loss.ranking_loss.reduction = "sum"
    return loss


def _shallow() -> nn.Module:
    module = third_party.RRU(6, **SIZES)
    module.s_atten_z = module.s_atten_z[:2]
    return module


HINGES = (0.3, 300.0, 1e3, 1e4, 1e6)
LOOK_ALIKES: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: Leaky(6, **SIZES), r"its output 0 is off by .* of its size \(example 0, training mode\)"),
    (lambda: Truncated(6, **SIZES), "its gradient of input 0 is off by"),
    (lambda: ForgetsFirst(6, **SIZES), r"its buffer reduce_dim_z\.bn\.num_batches_tracked is off by"),
    (lambda: FramesFirst(6, **SIZES), r"it returns Tensor \(2, 3, 6, 4, 4\), wanted Tensor \(2, 6, 3, 4, 4\)"),
    (
        lambda: WithStrips(6, **SIZES),
        r"it returns tuple of Tensor \(2, 6, 3, 4, 4\), Tensor \(2, 6, 4\), wanted Tensor",
    ),
    (_hooked, r"s_atten_z\.0 has hooks, which would no longer run"),
    (_spectral_normed, "its output 0 is off by"),
    (_patched, "its forward is not that of its class"),
    (Weighted, r"its forward takes \(self, .*weights: .*\), wanted \(self: "),
    (_shallow, r"it cannot be run as one \(RuntimeError: "),
    *((lambda margin=margin: Hingeless(margin), r"its output 0 is off by .* \(example 1") for margin in HINGES),
    (Remembers, "its forward sets 'last', which would no longer be set"),
    (lambda: NamedOnly(6, **SIZES), r"its forward takes \(self, \*, x: .*\), wanted \(self: .*, x: "),
    (_parametrized, "a parameter of its own is parametrized, which makes it another class"),
    (Normalised, "its output 0 is off by"),
    (Squared, "its output 0 is off by"),
    (Unclamped, r"its output 0 is off by .* \(example 2, training mode\)"),
    (_summed, r"it cannot be run as one \(ValueError: reduction: got 'sum', wanted one of 'mean', 'none'\)$"),
]
