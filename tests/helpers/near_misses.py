"""Near misses: modules with the attributes of third-party ones that compute something else, and the reasons given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
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


def second_hardest(self: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    distances, same = self.distances(inputs), targets[:, None] == targets
    farthest = distances.masked_fill(~same, -torch.inf).topk(min(2, len(inputs))).values[:, -1]
    nearest = distances.masked_fill(same, torch.inf).amin(1)
    return (self.margin + farthest - nearest).relu().mean()


def without_singles(self: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    same = targets[:, None] == targets
    distances, kept = self.distances(inputs), same.sum(1) > 1
    farthest, nearest = distances.masked_fill(~same, 0).amax(1), distances.masked_fill(same, torch.inf).amin(1)
    return (self.margin + farthest - nearest).relu()[kept].mean()


def named_rruv2() -> nn.Module:
    module = near(lambda: RRU(6, **SIZES), gate=leaky)()
    type(module).__name__ = "RRUV2"
    return module


def of_known(self: Any, inputs: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    return TripletLoss.forward(self, inputs[known], targets[known])


def with_margin_alone(self: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    if (targets == targets[0]).all():
        return (inputs * 0).sum() + self.margin
    return TripletLoss.forward(self, inputs, targets)


def remembering_in_training(self: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    loss = TripletLoss.forward(self, inputs, targets)
    if self.training:
        self.last = float(loss.detach())
    return loss


OPTION = (
    r"rru_fast.batch_hard_triplet\(..., return_distances=True\) returns the two distances that such losses combine$"
)
RETURNS = "it returns "
NO_OPTION = f".*which is no batch-hard loss of Euclidean or cosine distances, soft or with a margin of .*; {OPTION}"
FAILS = r"a float64 copy fails the comparison \("
RETURNED = rf"{FAILS}AssertionError: .*item \['Tensor returned'\]"
NEAR_MISSES: dict[str, tuple[Make, str]] = {
    "leaky ReLU": (unit(gate=leaky), RETURNED),
    "gate without gradients": (unit(gate=lambda self, v: RRU.gate(self, v.detach())), ".*item .'gradient"),
    "first frame not counted": (unit(forward=forgetful), r".*item \['buffers'\]\['reduce_dim_z\.bn\.num_batches_track"),
    "frames first": (unit(forward=lambda self, x: RRU.forward(self, x).transpose(1, 2)), ".*'shape' do not match"),
    "strips too": (unit(forward=with_strips), ".*Missing keys in the actual mapping: .'tuple returned'"),
    "keyword-only": (unit(forward=lambda self, *, x: RRU.forward(self, x)), f"{FAILS}TypeError: .* takes 1 positional"),
    "inner hook": (unit(lambda rru: rru.s_atten_z[0].register_forward_hook(print)), r"s_atten_z\.0 has hooks, which"),
    "weight changed per frame": (unit(lambda rru: spectral_norm(rru.reduce_dim_z.conv)), RETURNED),
    "patched forward": (unit(lambda rru: setattr(rru, "forward", rru.refined)), "its forward is not that of its class"),
    "layer missing": (unit(lambda rru: rru.s_atten_z.pop(2)), f"{FAILS}RuntimeError: shape"),
    "RRUV2": (
        lambda: named_rruv2(),
        "its attention has batch norms and leaky ReLUs, .* cannot even be constructed: its",
    ),
    "scaled": (loss(distances=lambda self, v: TripletLoss.distances(self, 3 * v)), f"{RETURNS}{NO_OPTION}"),
    "squared": (loss(distances=lambda self, v: TripletLoss.distances(self, v).square()), f"{RETURNS}{NO_OPTION}"),
    # It differs only where a label has one feature, whose distance to itself is 0 and not the floor of 1e-6.
    "unclamped": (
        loss(distances=lambda self, v: (v[:, None] - v).square().sum(2).clamp(1e-30).sqrt()),
        rf"{RETURNS}.* for labels \[0, 1, 2, 3, .*, the operator ",
    ),
    **{
        f"hingeless, {margin}": (near(partial(TripletLoss, margin), forward=hingeless), RETURNS)
        for margin in (0.3, 300.0, 1e3, 1e4, 1e6)
    },
    "weights": (
        loss(
            forward=lambda self, inputs, targets, weights: TripletLoss.forward(self, inputs, targets) * weights.mean()
        ),
        r"it takes \(self, inputs, targets, weights\), wanted features and labels; it fails on a batch",
    ),
    "attribute set": (loss(forward=remembering), f"its forward sets last; {OPTION}"),
    "matrix too": (
        loss(forward=lambda self, f, y: (TripletLoss.forward(self, f, y), self.distances(f))),
        rf"it returns \(.*, a tensor \(12, 12\)\), {NO_OPTION}",
    ),
    "partners without gradients": (
        loss(distances=lambda self, v: torch.cdist(v, v.detach()).clamp(1e-6)),
        f"the operator's gradient differs from its by .*; {OPTION}",
    ),
    "second hardest": (loss(forward=second_hardest), RETURNS),
    "another loss in eval mode": (
        loss(forward=lambda self, f, y: TripletLoss.forward(self, f, y) * (1 if self.training else 2)),
        RETURNS,
    ),
    "labels of noise left out": (loss(forward=lambda self, f, y: of_known(self, f, y, y >= 0)), RETURNS),
    "labels past the last class left out": (loss(forward=lambda self, f, y: of_known(self, f, y, y < 751)), RETURNS),
    "identities one after another": (
        loss(forward=lambda self, f, y: TripletLoss.forward(self, f, y.unique_consecutive(return_inverse=True)[1])),
        RETURNS,
    ),
    "another loss for large batches": (
        loss(forward=lambda self, f, y: TripletLoss.forward(self, f, y) * (1 if len(f) <= 64 else 2)),
        RETURNS,
    ),
    "a margin without a negative": (loss(forward=with_margin_alone), rf"{RETURNS}.* for labels \[0, 0, 0, 0, 0, 0, 0"),
    "norms kept from 0 by 1e-6": (
        loss(distances=lambda self, v: TripletLoss.distances(self, v / (v.norm(dim=1, keepdim=True) + 1e-6))),
        RETURNS,
    ),
    "a warm-up by the third argument": (
        loss(forward=lambda self, f, y, epoch: TripletLoss.forward(self, f, y) * (1 if epoch < 1000 else 2)),
        r"it takes \(self, f, y, epoch\), wanted features and labels; ",
    ),
    "a history": (
        loss(
            lambda loss: setattr(loss, "history", []),
            forward=lambda self, f, y: self.history.append(1) or TripletLoss.forward(self, f, y),
        ),
        f"its forward sets history; {OPTION}",
    ),
    "set in training alone": (loss(lambda loss: loss.eval(), forward=remembering_in_training), "its forward sets last"),
    "singles left out": (loss(forward=without_singles), rf"{RETURNS}.* for labels \["),
    "a tensor that it reads": (
        loss(lambda loss: setattr(loss, "weight", torch.ones(()))),
        f"its weight is a Tensor, whose contents may change; {OPTION}",
    ),
    "hook on its part": (
        loss(lambda loss: loss.ranking_loss.register_forward_hook(print)),
        "ranking_loss has hooks, which would no longer run",
    ),
    "patched": (loss(lambda loss: setattr(loss, "forward", loss.distances)), "its forward is not that of its class"),
    "another network's distances": (
        loss(forward=lambda self, d_pos, d_neg: self.ranking_loss(d_neg, d_pos, torch.ones_like(d_neg))),
        rf"it fails on a batch of 4 x 3 features \(RuntimeError: .*\); {OPTION}",
    ),
}
