"""Calls of `refine` that hold a backend to the float64 oracle by `rru_fast.testing.assert_parity`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

import rru_fast
from benchmarks.harness.parity import SEEDS
from rru_fast import backends, triton
from rru_fast.arguments import RefineArguments
from rru_fast.reference import RRU
from rru_fast.testing import assert_parity, gradients, no_relu_near_zero, poisoned_memory
from rru_fast.types import State

_, *BACKENDS = backends.serving(torch.device("cpu"))
# Backends for large calls: Triton's interpreter takes seconds for a small one, and CUDA kernels on a CPU are emulated.
COMPILED = [name for name in BACKENDS if name != "cuda" and not (name == "triton" and triton.interpreted())]
# For claims that hardly depend on the backend: only those of a GPU and the default one outside make test-all.
_FIRST = ("triton", "cuda", backends.choose("auto", torch.device("cpu")))
DEFAULT_FIRST = [pytest.param(name, marks=() if name in _FIRST else pytest.mark.exhaustive) for name in BACKENDS]
# Relative error of the gate in fp32 from a GPU's approximate functions, maxima that the PTX ISA documents: ex2.approx
# 2^-22, of an argument that was rounded after its product with log2(e), 2^-24 for logits of size 1; div.full 2 ulp;
# rsqrt.approx 2^-22.9. PyTorch's kernels use exact functions, so twice their error leaves no room for it where sums are
# too short to have an error of their own.
APPROXIMATE = 2**-22 + 2**-24 + 2 * 2**-23 + 2**-22.9

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A call of `refine`."""

    shape: tuple[int, int, int, int, int] = (3, 4, 6, 3, 2)
    hidden: int = 5
    spatial_hidden: int = 4
    attention: str = "both"
    inputs: str = "appearance+motion"
    mode: str = "train"  # train, eval, ragged (lengths) or continued (state)
    bn_groups: int = 1

    @property
    def x_numel(self) -> int:
        return prod(self.shape)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.inputs}-{self.attention}-{self.mode}-g{self.bn_groups}-{shape}-d{self.hidden}"


VARIANTS = [
    Case(attention=attention, inputs=inputs, mode=mode)
    for inputs in ("appearance+motion", "appearance", "raw")
    for attention in ("both", "spatial", "channel")
    for mode in ("train", "eval", "ragged", "continued")
]
GROUPS = [
    Case((6, 3, 5, 2, 2), inputs=inputs, bn_groups=groups)
    for inputs in ("appearance+motion", "raw")
    for groups in (2, 3)
]
ODD_SHAPES = [
    Case(shape, hidden=hidden, mode=mode)
    for shape, hidden in (
        ((2, 3, 7, 1, 1), 3),  # one position
        ((3, 1, 5, 2, 3), 4),  # one frame
        ((1, 4, 9, 3, 5), 2),  # one clip
        ((2, 2, 1, 4, 1), 1),  # one channel, one gate channel
        ((2, 5, 37, 5, 3), 17),
        ((1, 33, 130, 2, 2), 65),
        ((3, 3, 70, 9, 8), 70),  # more positions, channels and gate channels than a kernel takes at a time
        ((5, 2, 600, 4, 4), 66),
        ((2, 3, 20, 2, 70), 8),  # more positions in a single row of a map
    )
    for mode in ("train", "eval")
]


@dataclass
class Call:
    """The tensors of one call, in one dtype."""

    x: Tensor
    weights: dict[str, Tensor]
    buffers: tuple[Tensor, Tensor]
    lengths: Tensor | None
    state: State | None
    d_features: Tensor
    d_strips: Tensor

    def map(self, f: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every floating tensor passed through f."""
        return replace(
            self,
            x=f(self.x),
            weights={name: f(weight) for name, weight in self.weights.items()},
            buffers=(f(self.buffers[0]), f(self.buffers[1])),
            state=None if self.state is None else State(f(self.state.x), f(self.state.s)),
            d_features=f(self.d_features),
            d_strips=f(self.d_strips),
        )


def make_call(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Call:
    """Random tensors for a case, exactly representable in `dtype`, as float64."""
    g = torch.Generator().manual_seed(seed)
    clips, frames, channels, height, width = case.shape
    module = RRU(
        channels,
        (height, width),
        hidden=case.hidden,
        spatial_hidden=case.spatial_hidden,
        attention=case.attention,  # type: ignore[arg-type]
        inputs=case.inputs,  # type: ignore[arg-type]
    )
    names = {
        "transition.weight": "w",
        "transition_norm.weight": "gamma",
        "transition_norm.bias": "beta",
        "spatial_attention.0.weight": "w_s1",
        "spatial_attention.2.weight": "w_s2",
        "channel_attention.weight": "w_c",
    }

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def weight(parameter: Tensor) -> Tensor:
        if parameter.dim() == 1:
            return random(*parameter.shape) * 0.5 + 1
        matrix = random(*parameter.shape).flatten(1)
        return matrix / matrix.shape[1] ** 0.5  # unit gain: the recurrence must not amplify rounding by itself

    weights = {names[name]: weight(parameter) for name, parameter in module.named_parameters()}
    lengths = torch.randint(1, frames + 1, (clips,), generator=g) if case.mode == "ragged" else None
    maps = (clips, channels, height, width)
    state = State(random(*maps), random(*maps)) if case.mode == "continued" else None
    buffers = (random(case.hidden), random(case.hidden).square() + 0.5)
    call = Call(
        random(*case.shape), weights, buffers, lengths, state, random(*case.shape), random(clips, channels, height)
    )
    return call.map(lambda v: v.to(dtype).double())


def operator_arguments(case: Case, call: Call) -> RefineArguments:
    """Return the arguments of a call as a backend's kernels take them."""
    names = ("w", "gamma", "beta", "w_s1", "w_s2", "w_c")
    running_mean, running_var = (buffer.detach() for buffer in call.buffers)
    state_x, state_s = (None, None) if call.state is None else call.state
    return RefineArguments(
        x=call.x,
        **{name: call.weights.get(name) for name in names},  # type: ignore[arg-type]
        running_mean=running_mean,
        running_var=running_var,
        lengths=call.lengths,
        state_x=state_x,
        state_s=state_s,
        inputs=case.inputs,
        training=case.mode == "train",
        eps=1e-3,
        bn_groups=case.bn_groups,
    )


def share(call: Call, first: int, end: int) -> Call:
    """The call of a rank whose clips are `first` to `end - 1`."""
    clips = slice(first, end)
    return replace(call, x=call.x[clips], d_features=call.d_features[clips], d_strips=call.d_strips[clips])


def draws(backend: str, count: int) -> range:
    """Seeds of `count` draws; of at most 5 of kernels that are interpreted or emulated, which take seconds."""
    return range(count if backend in COMPILED else min(count, 5))


def run(
    case: Case, call: Call, backend: str, frozen: tuple[str, ...] = (), process_group: ProcessGroup | None = None
) -> Results:
    """Outputs, running statistics and gradients of `refine`, by name; no gradients of the inputs in `frozen`."""
    leaves = {"x": call.x, **call.weights}
    if call.state is not None:
        leaves |= {"state_x": call.state.x, "state_s": call.state.s}
    leaves = {name: leaf.detach().requires_grad_(name not in frozen) for name, leaf in leaves.items()}
    mean, var = (buffer.clone() for buffer in call.buffers)
    out = rru_fast.refine(
        **{name: leaf for name, leaf in leaves.items() if not name.startswith("state")},
        inputs=case.inputs,  # type: ignore[arg-type]
        running_mean=mean,
        running_var=var,
        training=case.mode == "train",
        bn_groups=case.bn_groups,
        lengths=call.lengths,
        state=None if call.state is None else State(leaves["state_x"], leaves["state_s"]),
        process_group=process_group,
        backend=backend,
    )
    results = {"features": out.features, "strips": out.strips, "running_mean": mean, "running_var": var}
    if out.state is not None:
        results |= {"next_x": out.state.x, "next_s": out.state.s}
    wanted = {name: leaf for name, leaf in leaves.items() if name not in frozen}
    if wanted:
        results |= gradients([out.features, out.strips], [call.d_features, call.d_strips], wanted)
    return {name: value.detach() for name, value in results.items()}


def assert_refine_parity(case: Case, dtype: torch.dtype, backend: str, count: int) -> None:
    """Hold `refine` to `assert_parity` in `dtype` over `count` draws."""

    def draw(seed: int) -> tuple[Results, Results, Results]:
        call = make_call(case, dtype, seed)
        low = call.map(lambda v: v.to(dtype))
        with poisoned_memory():
            got = run(case, low, backend)
        return got, run(case, low, "reference"), run(case, call, "reference")

    assert_parity(draw(seed) for seed in range(count))


def stable_seed(case: Case, dtype: torch.dtype, device: torch.device) -> int:
    """Return the first seed whose oracle run has no ReLU near zero, so that one draw decides; 0 if none has."""

    def stable(seed: int) -> bool:
        call = make_call(case, dtype, seed).map(lambda v: v.to(device))
        return no_relu_near_zero(lambda: run(case, call, "reference"), dtype)

    return next(filter(stable, SEEDS), 0)


def assert_aligned(got: Results, oracle: Results, tolerance: float) -> None:
    """Raise unless each gradient has the oracle's direction and norm, whatever its elementwise noise."""
    for name, wanted in oracle.items():
        if name.startswith("d_") and wanted.norm() > 0:
            a, b = got[name].double().flatten(), wanted.flatten()
            assert abs(float(a.norm() / b.norm()) - 1) < tolerance, name
            assert float(torch.dot(a, b) / (a.norm() * b.norm())) > 1 - tolerance, name
