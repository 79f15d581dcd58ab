"""Implementations of the unit, each with the same weights and maps, held to the oracle before it is timed.

Two of them are eager PyTorch. "authors" is the unit as its authors' code computes it: frames sliced one by one and the
blend (1 - Z) S + Z X. A user of that code starts from there. "reference" is this library's: frames unbound at once and
the blend S + Z (X - S), the same arithmetic with less memory traffic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import rru_fast
from benchmarks.harness.parity import SEEDS, format_error, report_parity
from benchmarks.harness.shapes import DTYPES, Shape
from rru_fast import backends, reference
from rru_fast.testing import Error, compare, gradients, no_relu_near_zero

AUTHORS, REFERENCE, COMPILED = "eager, authors", "eager, reference", "torch.compile, reference"
LARGE = 2**22  # elements of x from which one draw's errors are already an average
DRAWS = 5  # of smaller x
HIDDEN = (256, 128)  # the paper's D and A


class Authors(reference.RRU):
    """The unit as its authors' code computes it, in this library's signs and names."""

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, state: rru_fast.State | None = None
    ) -> rru_fast.Refined:
        """Refine x (B, T, C, H, W); `lengths` and `state` are ignored."""
        previous = torch.cat((x[:, :1], x[:, :-1]), 1)
        motion, s, out = x - previous, x[:, 0], []
        for t in range(x.shape[1]):
            y = self.transition_norm(self.transition(torch.cat((x[:, t] - s, motion[:, t]), 1))).relu()
            z_s = self.spatial_attention(y.mean(1).flatten(1)).view(-1, 1, *y.shape[2:])
            z = torch.sigmoid(z_s * self.channel_attention(y.mean((2, 3)))[:, :, None, None])
            s = (1 - z) * s + z * x[:, t]
            out.append(s)
        features = torch.stack(out, 1)
        return rru_fast.Refined(features, features.mean((1, 4)), None)


@dataclass(frozen=True)
class Implementation:
    """A module and the tensors it runs on."""

    module: reference.RRU
    x: Tensor  # (B, T, C, H, W)
    upstream: tuple[Tensor, Tensor]
    """Gradients of the features (B, T, C, H, W) and of the strips (B, C, H)."""

    def forward(self) -> rru_fast.Refined:
        """Run a forward without gradients."""
        with torch.no_grad():
            out: rru_fast.Refined = self.module(self.x)
        return out

    def step(self) -> tuple[Tensor, ...]:
        """Run forward and backward; returns the gradients of x and of every parameter."""
        out = self.module(self.x)
        return torch.autograd.grad(out[:2], [self.x, *self.module.parameters()], self.upstream)

    def results(self) -> dict[str, Tensor]:
        """Return the outputs, and the gradients if x requires one, by the names that parity reports."""
        if not self.x.requires_grad:
            features, strips, _ = self.forward()
            return {"features": features, "strips": strips}
        features, strips, _ = self.module(self.x)
        found = gradients([features, strips], self.upstream, {"x": self.x, **dict(self.module.named_parameters())})
        return {"features": features.detach(), "strips": strips.detach(), **found}

    def twin(self, cls: type[reference.RRU], **settings: Any) -> Implementation:
        """Return another implementation on the same maps, with a copy of this one's weights."""
        own = self.module
        settings |= {"hidden": own.transition.out_channels, "spatial_hidden": own.spatial_attention[0].out_features}
        module = cls(own.channels, own.spatial, **settings)
        module.to(own.transition.weight).load_state_dict(own.state_dict())
        return replace(self, module=module.train(own.training))

    def redraw(self) -> Implementation:
        """Return the same module on other maps and upstream gradients of the same shapes and strides."""
        features, strips = self.upstream
        x = torch.randn_like(self.x).relu().requires_grad_(self.x.requires_grad)
        return replace(self, x=x, upstream=(torch.randn_like(features), torch.randn_like(strips)))

    def oracle(self) -> Implementation:
        """Return the reference with the same weights and maps in float64."""
        features, strips = self.upstream
        return Implementation(
            self.twin(reference.RRU).module.double(),
            self.x.detach().double().requires_grad_(self.x.requires_grad),
            (features.double(), strips.double()),
        )


def implementations(
    shape: Shape,
    dtype: str,
    device: torch.device,
    *,
    training: bool = True,
    channels_last: bool = False,
    hidden: tuple[int, int] = HIDDEN,
) -> dict[str, Implementation]:
    """Return both eager implementations and every backend that serves the device, by name."""
    for seed in SEEDS:
        eager = _draw(shape, dtype, device, training, channels_last, hidden, seed)
        if not training or no_relu_near_zero(eager.oracle().forward, eager.x.dtype):
            break
    sizes = {"channels": shape[2], "positions": shape[3] * shape[4], "hidden": hidden[0], "spatial_hidden": hidden[1]}
    _, *fast = backends.serving(device, "refine", dtype=dtype, **sizes)
    return {
        AUTHORS: eager.twin(Authors),
        REFERENCE: eager,
        **{name: eager.twin(rru_fast.RRU, backend=name) for name in fast},
    }


def _draw(
    shape: Shape,
    dtype: str,
    device: torch.device,
    training: bool,
    channels_last: bool,
    hidden: tuple[int, int],
    seed: int,
) -> Implementation:
    torch.manual_seed(seed)
    clips, _, channels, height, width = shape
    x = torch.randn(shape, device=device).relu().to(DTYPES[dtype])
    if channels_last:
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    upstream = (torch.randn(shape, device=device).to(x), torch.randn(clips, channels, height, device=device).to(x))
    module = reference.RRU(channels, (height, width), hidden=hidden[0], spatial_hidden=hidden[1]).to(x)
    if not training:
        module(x[:, :8])  # running statistics other than the initial ones
        module.eval()
    return Implementation(module, x.requires_grad_(training), upstream)


def check(impls: Mapping[str, Implementation]) -> None:
    """Hold every implementation to the float64 oracle on its maps, and on more draws if they are small.

    Raises:
        SystemExit: one is wrong.
    """
    for name, errors in _errors(impls).items():
        report_parity(_title(name, impls), errors)


def filter_valid(
    impls: Mapping[str, Implementation], draws: int = DRAWS
) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Return the implementations that run and pass `check`, and the reason for each that is left out.

    draws: number of draws of small maps.
    """
    valid, refused = dict(impls), {}
    for name, impl in impls.items():
        try:
            impl.results()
        except Exception as error:  # any error: the others can still be measured
            refused[name] = f"does not run: {format_error(error)}"
            del valid[name]
    for name, errors in _errors(valid, draws).items():
        try:
            report_parity(_title(name, impls), errors)
        except SystemExit as refusal:
            refused[name] = str(refusal)
            del valid[name]
    for name, why in refused.items():
        print(f"{name} is left out: {why}")
    return valid, refused


def _title(name: str, impls: Mapping[str, Implementation]) -> str:
    return f"{name}, {str(impls[REFERENCE].x.dtype).removeprefix('torch.')}"


def _errors(impls: Mapping[str, Implementation], draws: int = DRAWS) -> dict[str, list[dict[str, Error]]]:
    """Return the errors of each draw, by name, of each implementation but the eager reference.

    draws: number of draws of x of fewer than `LARGE` elements.
    """
    eager = impls[REFERENCE]
    found: dict[str, list[dict[str, Error]]] = {name: [] for name in impls if name != REFERENCE}
    for draw in range(1 if eager.x.numel() >= LARGE else draws):
        drawn = eager if draw == 0 else eager.redraw()
        in_dtype, oracle = drawn.results(), drawn.oracle().results()
        for name, errors in found.items():
            errors.append(compare(replace(drawn, module=impls[name].module).results(), in_dtype, oracle))
    return found
