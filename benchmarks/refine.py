"""`refine` against eager PyTorch and torch.compile, at the paper's shape unless told otherwise.

    python -m benchmarks.refine
    python -m benchmarks.refine --shape 4 8 2048 8 8 --dtype bfloat16 --no-compile

Forward, and forward with backward, in training mode. There are two eager rows. "authors" is the unit as its authors'
code runs it, frames sliced one by one and the blend (1 - Z) S + Z X: what a user comes from. "reference" is this
library's, with frames unbound at once and the blend S + Z (X - S): the same arithmetic, less memory traffic.
Roofline: GEMM FLOPs at this machine's own GEMM rate plus compulsory bytes at its own copy rate, both measured in the
same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

import rru_fast
from benchmarks import measure, parity, table
from rru_fast import config, reference

AUTHORS, REFERENCE = "eager, authors", "eager, reference"
PAPER = (20, 8, 2048, 8, 8)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Options:
    """What to measure."""

    shape: tuple[int, int, int, int, int] = PAPER
    """B T C H W of the maps."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    repeats: int = 7
    """Rounds; each runs every implementation once."""
    compile: bool = True
    """Also measure torch.compile of the eager module (its compilation takes a minute or two)."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    json: Path | None = None
    """Where to write the rows."""


def main(options: Options) -> list[dict[str, Any]]:
    """Check parity, measure, print; returns the rows."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    clips, _, channels, height, width = options.shape
    torch.manual_seed(0)
    eager = reference.RRU(channels, (height, width)).to(device, dtype)
    x = torch.randn(options.shape, device=device).relu().to(dtype).requires_grad_()
    upstream = [torch.randn(options.shape, device=device), torch.randn(clips, channels, height, device=device)]
    upstream = [g.to(dtype) for g in upstream]

    modules: dict[str, Callable[..., rru_fast.Refined]] = {AUTHORS: _twin(eager, Authors), REFERENCE: eager}
    for name, missing in config.BACKENDS.items():
        if missing is None and name != "reference":
            modules[name] = _twin(eager, rru_fast.RRU, backend=name)
    _check(modules, x, upstream, dtype)
    if options.compile:
        modules["torch.compile, reference"] = torch.compile(_twin(eager, reference.RRU))

    def forward(module: Callable[..., rru_fast.Refined]) -> Callable[[], object]:
        def work() -> rru_fast.Refined:
            with torch.no_grad():
                return module(x)

        return work

    def training_step(module: Callable[..., rru_fast.Refined]) -> Callable[[], object]:
        own = [x, *module.parameters()]  # type: ignore[attr-defined]

        def work() -> tuple[Tensor, ...]:
            out = module(x)
            return torch.autograd.grad([out.features, out.strips], own, upstream)

        return work

    forwards = measure.paired({name: forward(module) for name, module in modules.items()}, options.repeats)
    steps = measure.paired({name: training_step(module) for name, module in modules.items()}, options.repeats)
    roofline = _roofline(eager, options.shape, dtype, device)
    rows = []
    for name, module in modules.items():
        free = [x, *module.parameters()]  # type: ignore[attr-defined]
        saved = measure.saved_bytes(lambda module=module: module(x)[:2], free)  # type: ignore[misc]
        rows.append(
            {
                "implementation": name,
                "forward ms": 1e3 * median(forwards[name]),
                "x authors": measure.ratio(forwards[AUTHORS], forwards[name]),
                "x reference": measure.ratio(forwards[REFERENCE], forwards[name]),
                "fwd+bwd ms": 1e3 * median(steps[name]),
                "x authors, fwd+bwd": measure.ratio(steps[AUTHORS], steps[name]),
                "x reference, fwd+bwd": measure.ratio(steps[REFERENCE], steps[name]),
                "% of roofline": 100 * roofline / median(steps[name]),
                # A compiled module's saved tensors stay inside its graph.
                "saved MiB": None if name.startswith("torch.compile") else saved / measure.MIB,
                "peak MiB": measure.peak_bytes(training_step(module)) / measure.MIB,
            }
        )
    environment = measure.environment(device, dtype)
    shape = " x ".join(map(str, options.shape))
    table.show(
        f"refine, {shape} (B x T x C x H x W), training", environment, rows, "; saved: beside x, S and the parameters"
    )
    if options.json is not None:
        measure.write(options.json, {**environment, "op": "refine", "shape": options.shape}, rows)
    return rows


class Authors(reference.RRU):
    """The unit as its authors' code runs it, in this library's signs and names: what a user comes from."""

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, state: rru_fast.State | None = None
    ) -> rru_fast.Refined:
        """x (B, T, C, H, W) to `Refined`, training only."""
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


def _twin(eager: reference.RRU, cls: type[reference.RRU], **settings: str) -> reference.RRU:
    """A module of its own with the eager one's weights."""
    twin = cls(eager.channels, eager.spatial, hidden=eager.transition.out_channels, **settings)  # type: ignore[arg-type]
    twin.to(eager.transition.weight)
    twin.load_state_dict(eager.state_dict())
    return twin


def _check(modules: dict[str, Any], x: Tensor, upstream: list[Tensor], dtype: torch.dtype) -> None:
    """Every implementation about to be timed, at the very shape, against the oracle."""

    def results(module: reference.RRU, x: Tensor, upstream: list[Tensor]) -> dict[str, Tensor]:
        leaf = x.detach().requires_grad_()
        out = module(leaf)
        leaves = {"x": leaf, **dict(module.named_parameters())}
        return parity.gradients([out.features, out.strips], upstream, leaves)

    eager = modules[REFERENCE]
    in_dtype = results(eager, x, upstream)
    oracle = results(_twin(eager, reference.RRU).double(), x.detach().double(), [g.double() for g in upstream])
    for name, module in modules.items():
        if module is not eager:
            parity.demand(name, results(module, x, upstream), in_dtype, oracle)
    for module in modules.values():  # the check must not train the running statistics
        module.transition_norm.reset_running_stats()


def _roofline(eager: reference.RRU, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> float:
    """Seconds that forward and backward cannot beat here, by this machine's own rates."""
    clips, frames, channels, height, width = shape
    hidden, columns, positions = eager.transition.out_channels, eager.transition.in_channels, height * width
    # Forward, weight gradients and input gradients: one product each over T - 1 recurrent steps.
    flops = 3 * 2 * hidden * columns * clips * positions * (frames - 1)
    # Forward reads X and writes S; backward reads X, S and dS and writes dX.
    size = 6 * clips * frames * channels * positions * torch.finfo(dtype).bits // 8
    gemm = measure.gemm_rate(hidden, columns, clips * positions, dtype, device)
    return flops / gemm + size / measure.copy_rate(64 * measure.MIB, device)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
