"""Everything that runs the unit here, each with the same weights and maps, held to the oracle before it is timed.

There are two eager ones. "authors" is the unit as its authors' code runs it, frames sliced one by one and the blend
(1 - Z) S + Z X: what a user comes from. "reference" is this library's, with frames unbound at once and the blend
S + Z (X - S): the same arithmetic, less memory traffic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import rru_fast
from benchmarks.harness.parity import SEEDS, report_parity
from rru_fast import backends, reference
from rru_fast.testing import Error, compare, gradients, no_relu_near_zero

AUTHORS, REFERENCE, COMPILED = "eager, authors", "eager, reference", "torch.compile, reference"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Elements of x from which one draw's errors are already an average.
LARGE = 2**22
DRAWS = 5  # of smaller ones
Shape = tuple[int, int, int, int, int]  # B, T, C, H, W
HIDDEN = (256, 128)  # the paper's D and A


class Authors(reference.RRU):
    """The unit as its authors' code runs it, in this library's signs and names."""

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, state: rru_fast.State | None = None
    ) -> rru_fast.Refined:
        """x (B, T, C, H, W) to `Refined`; neither lengths nor state."""
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
class Contender:
    """One implementation and what it runs on."""

    module: reference.RRU
    x: Tensor
    upstream: tuple[Tensor, Tensor]
    """Gradients of the features and of the strips."""

    def forward(self) -> rru_fast.Refined:
        """One forward without gradients."""
        with torch.no_grad():
            out: rru_fast.Refined = self.module(self.x)
        return out

    def step(self) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients of x and of every parameter."""
        out = self.module(self.x)
        return torch.autograd.grad(out[:2], [self.x, *self.module.parameters()], self.upstream)

    def results(self) -> dict[str, Tensor]:
        """What parity compares: outputs, and where x asks for its own also gradients."""
        if not self.x.requires_grad:
            features, strips, _ = self.forward()
            return {"features": features, "strips": strips}
        features, strips, _ = self.module(self.x)
        found = gradients([features, strips], self.upstream, {"x": self.x, **dict(self.module.named_parameters())})
        return {"features": features.detach(), "strips": strips.detach(), **found}

    def twin(self, cls: type[reference.RRU], **settings: Any) -> Contender:
        """Another implementation with weights of its own, equal to this one's, on the same maps."""
        own = self.module
        settings |= {"hidden": own.transition.out_channels, "spatial_hidden": own.spatial_attention[0].out_features}
        module = cls(own.channels, own.spatial, **settings)
        module.to(own.transition.weight).load_state_dict(own.state_dict())
        return replace(self, module=module.train(own.training))

    def redrawn(self) -> Contender:
        """The same on other maps and gradients, of the same shapes and strides."""
        features, strips = self.upstream
        x = torch.randn_like(self.x).relu().requires_grad_(self.x.requires_grad)
        return replace(self, x=x, upstream=(torch.randn_like(features), torch.randn_like(strips)))

    def in_double(self) -> Contender:
        """The oracle: the same weights and maps in float64."""
        features, strips = self.upstream
        return Contender(
            self.twin(reference.RRU).module.double(),
            self.x.detach().double().requires_grad_(self.x.requires_grad),
            (features.double(), strips.double()),
        )


def contenders(
    shape: Shape,
    dtype: str,
    device: torch.device,
    *,
    training: bool = True,
    channels_last: bool = False,
    hidden: tuple[int, int] = HIDDEN,
) -> dict[str, Contender]:
    """By name, the two eager ones and every backend that can serve on the device."""
    for seed in SEEDS:
        eager = _drawn(shape, dtype, device, training, channels_last, hidden, seed)
        if not training or no_relu_near_zero(eager.in_double().forward, eager.x.dtype):
            break
    _, *fast = backends.serving(device)
    return {
        AUTHORS: eager.twin(Authors),
        REFERENCE: eager,
        **{name: eager.twin(rru_fast.RRU, backend=name) for name in fast},
    }


def _drawn(
    shape: Shape,
    dtype: str,
    device: torch.device,
    training: bool,
    channels_last: bool,
    hidden: tuple[int, int],
    seed: int,
) -> Contender:
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
    return Contender(module, x.requires_grad_(training), upstream)


def check(field: Mapping[str, Contender]) -> None:
    """Hold every contender to the float64 oracle, on the maps about to be timed, and where they are small on more.

    Raises:
        SystemExit: one is wrong.
    """
    for draws in _draws(field).values():
        report_parity(*draws)


def sifted(field: Mapping[str, Contender], draws: int = DRAWS) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those of the field that run and are right, by `check`; and why another is not among them.

    draws: of maps that are small.
    """
    right, refused = dict(field), {}
    for name, own in field.items():
        try:
            own.results()
        except Exception as error:  # whatever it is, the others can be measured
            refused[name] = f"does not run: {told(error)}"
            del right[name]
    for name, compared in _draws(right, draws).items():
        try:
            report_parity(*compared)
        except SystemExit as refusal:
            refused[name] = str(refusal)
            del right[name]
    for name, why in refused.items():
        print(f"{name} is left out: {why}")
    return right, refused


def told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _draws(field: Mapping[str, Contender], count: int = DRAWS) -> dict[str, tuple[str, list[dict[str, Error]]]]:
    """Arguments of `report_parity` for each contender but the eager reference: a title, and draws.

    count: draws of inputs of fewer elements than `LARGE`.
    """
    eager = field[REFERENCE]
    dtype = str(eager.x.dtype).removeprefix("torch.")
    draws: dict[str, tuple[str, list[dict[str, Error]]]]
    draws = {name: (f"{name}, {dtype}", []) for name in field if name != REFERENCE}
    for turn in range(1 if eager.x.numel() >= LARGE else count):
        drawn = eager if turn == 0 else eager.redrawn()
        in_dtype, oracle = drawn.results(), drawn.in_double().results()
        for name, (_, found) in draws.items():
            own = replace(drawn, module=field[name].module)
            found.append(compare(own.results(), in_dtype, oracle))
    return draws
