"""Near misses: modules with the attributes of third-party ones that compute something else, and the reasons given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.parametrizations import spectral_norm

from tests.helpers.modules import SIZES
from tests.helpers.third_party import RRU, TripletLoss

Make = Callable[[], Any]


def near(original: Make, change: Callable[[Any], object] | None = None, **methods: Any) -> Make:
    """Make the original with these methods instead of its own, and change it."""

    def make() -> nn.Module:
        module = original()
        module.__class__ = type("Near", (type(module),), methods)
        if change is not None:
            change(module)
        return module

    return make


unit, loss = partial(near, lambda: RRU(6, **SIZES)), partial(near, TripletLoss)


def leaky(self: Any, v: Tensor) -> Tensor:
    block = self.reduce_dim_z
    y = nn.functional.leaky_relu(block.bn(block.conv(v)), 0.1)
    where = self.s_atten_z(y.mean(1, keepdim=True)).view(len(y), 1, *y.shape[2:])
    return torch.sigmoid(where * self.c_atten_z(y))


def forgetful(self: Any, x: Tensor) -> Tensor:
    self.reduce_dim_z.bn.num_batches_tracked -= int(self.training)
    return RRU.forward(self, x)


def with_strips(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    out = RRU.forward(self, x)
    return out, out.mean((2, 4))


def hingeless(self: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    distances, same = self.distances(inputs), targets[:, None] == targets
    nearest = distances.masked_fill(same, torch.inf).amin(1)
    return (self.margin + distances.masked_fill(~same, 0).amax(1) - nearest).mean()


def remembering(self: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    self.last = TripletLoss.forward(self, inputs, targets)
    return self.last


FAILS = r"a float64 copy fails the comparison \("
RETURNED = rf"{FAILS}AssertionError: .*item \['Tensor returned'\]"
NEAR_MISSES: dict[str, tuple[Make, str]] = {
    "leaky ReLU": (unit(gate=leaky), RETURNED),
    "gate without gradients": (unit(gate=lambda self, v: RRU.gate(self, v.detach())), ".*item .'gradients"),
    "first frame not counted": (unit(forward=forgetful), r".*item \['buffers'\]\['reduce_dim_z\.bn\.num_batches_track"),
    "frames first": (unit(forward=lambda self, x: RRU.forward(self, x).transpose(1, 2)), ".*'shape' do not match"),
    "strips too": (unit(forward=with_strips), ".*Missing keys in the actual mapping: .'tuple returned'"),
    "keyword-only": (unit(forward=lambda self, *, x: RRU.forward(self, x)), f"{FAILS}TypeError: .* takes 1 positional"),
    "inner hook": (unit(lambda rru: rru.s_atten_z[0].register_forward_hook(print)), r"s_atten_z\.0 has hooks, which"),
    "weight changed per frame": (unit(lambda rru: spectral_norm(rru.reduce_dim_z.conv)), RETURNED),
    "patched forward": (unit(lambda rru: setattr(rru, "forward", rru.refined)), "its forward is not that of its class"),
    "layer missing": (unit(lambda rru: rru.s_atten_z.pop(2)), f"{FAILS}RuntimeError: shape"),
    "normalized": (loss(distances=lambda self, v: TripletLoss.distances(self, normalize(v))), RETURNED),
    "squared": (loss(distances=lambda self, v: TripletLoss.distances(self, v).square()), RETURNED),
    # It differs only where a label has one feature, whose distance to itself is 0 and not the floor of 1e-6.
    "unclamped": (loss(distances=lambda self, v: (v[:, None] - v).square().sum(2).clamp(1e-30).sqrt()), RETURNED),
    **{
        f"hingeless, {margin}": (near(partial(TripletLoss, margin), forward=hingeless), RETURNED)
        for margin in (0.3, 300.0, 1e3, 1e4, 1e6)
    },
    "weights": (
        loss(forward=lambda self, inputs, targets, weights=None: TripletLoss.forward(self, inputs, targets)),
        r"its forward takes \['inputs', 'targets', 'weights'\], wanted \['inputs', 'targets'\]$",
    ),
    "attribute set": (loss(forward=remembering), r".*Missing keys .*: \['last'\] .*'attributes set'"),
    "sum": (
        loss(lambda loss: setattr(loss.ranking_loss, "reduction", "sum")),
        rf"{FAILS}ValueError: reduction: got 'sum', wanted one of 'mean', 'none'\)$",
    ),
}
