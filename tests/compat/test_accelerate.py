"""accelerate and restore."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import rru_fast
from rru_fast import reference
from rru_fast.testing import EXACT, relative_error
from tests import parity
from tests.helpers import third_party
from tests.helpers.modules import PLAIN, SIZES, bound_backend, first_two, loss_of, maps


class Mixed(nn.Module):
    """Nested and shared modules of both kinds, from maps (B, T, 6, 4, 4) to a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.fuse_net = (
            reference.RRU(6, (4, 4), hidden=8, spatial_hidden=5),
            third_party.FuseNet(6, 7, **SIZES),
        )
        self.branches = nn.ModuleList([nn.Sequential(nn.Identity(), self.unit), nn.Sequential(self.fuse_net)])
        self.losses = nn.ModuleList([reference.BatchHardTripletLoss(0.4), third_party.TripletLoss(0.4)])

    def forward(self, x: torch.Tensor, people: torch.Tensor) -> torch.Tensor:
        maps = self.branches[0](x).features
        clips, strips = self.branches[1](maps)
        again, _ = self.fuse_net(self.unit(x).features)
        strip_loss, clip_loss = self.losses
        return strip_loss(strips.permute(2, 0, 1), people) + clip_loss(clips, people) + clip_loss(again, people)


PEOPLE = torch.arange(6) // 2
SWAPPED = {"unit", "fuse_net", "losses.0", "losses.1"}


def a_batch(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return maps(6, 3, dtype=torch.float64).to(dtype)


def without_wrapper(name: str) -> str:
    return name.removeprefix("_orig_mod.").removeprefix("module.")


def swapped(model: nn.Module) -> set[str]:
    """The names of the modules that accelerate swapped."""
    return {without_wrapper(name) for name, module in model.named_modules() if "_accelerated_from" in vars(module)}


def training(model: nn.Module, steps: int) -> list[float]:
    """Losses of steps of SGD, on the same maps for every model."""
    torch.manual_seed(3)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(a_batch(next(model.parameters()).dtype), PEOPLE)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_a_swapped_model_gives_the_same_losses_and_gradients_and_is_restored() -> None:
    model, x = Mixed().double(), a_batch()
    parameters = dict(model.named_parameters())
    before = model(x, PEOPLE)
    wanted = torch.autograd.grad(before, list(parameters.values()))
    keys, own = list(model.state_dict()), {name: dict(vars(module)) for name, module in model.named_modules()}

    assert rru_fast.accelerate(model) is model
    assert swapped(model) == SWAPPED
    assert type(model.unit) is rru_fast.RRU
    assert type(model.losses[0]) is rru_fast.BatchHardTripletLoss
    assert type(model.fuse_net) is third_party.FuseNet
    after = model(x, PEOPLE)
    for got, want in zip(torch.autograd.grad(after, list(parameters.values())), wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    assert torch.allclose(after, before, rtol=1e-12)
    assert list(model.state_dict()) == keys

    assert rru_fast.restore(model) is model
    assert type(model.unit) is reference.RRU
    assert type(model.losses[0]) is reference.BatchHardTripletLoss
    assert {name: vars(module) for name, module in model.named_modules()} == own
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]


def test_hooks_and_optimizers_survive() -> None:
    model = reference.RRU(6, (3, 2), hidden=5)
    seen: list[int] = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.features.shape[1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rru_fast.accelerate(model)
    weight = model.transition.weight.clone()
    model(torch.randn(2, 3, 6, 3, 2)).strips.square().sum().backward()
    optimizer.step()
    assert seen == [3]
    assert not torch.equal(model.transition.weight, weight)


def test_the_backend_is_the_one_asked_for_and_can_be_changed() -> None:
    with pytest.raises(ValueError, match="backend: got 'warp', wanted 'auto' or one of"):
        rru_fast.accelerate(reference.RRU(6, (3, 2)), backend="warp")
    model = rru_fast.accelerate(Mixed().double(), backend="composite").eval()
    x = a_batch()
    composite = model(x, PEOPLE)
    for backend in [*parity.COMPILED, "reference"]:
        assert relative_error(rru_fast.accelerate(model, backend=backend)(x, PEOPLE), composite) <= EXACT
        assert model.unit.backend == bound_backend(model.fuse_net) == backend
    assert swapped(rru_fast.restore(model)) == set()


def test_cuda_graphs_are_refused_for_a_third_party_unit_before_anything_is_swapped() -> None:
    model = nn.ModuleList([reference.RRU(6, (4, 4)), third_party.TripletLoss(), third_party.RRU(6, **SIZES)])
    wanted = r"cuda_graph: got True with 2 \(RRU\), wanted False: rru-reid's RRU runs no CUDA graphs"
    with pytest.raises(ValueError, match=wanted):
        rru_fast.accelerate(model, cuda_graph=True)
    assert swapped(model) == set()


def test_modules_built_fast_stay_fast_through_restore() -> None:
    model = nn.ModuleList([rru_fast.RRU(6, (3, 2)), reference.RRU(6, (3, 2))])
    rru_fast.restore(rru_fast.accelerate(model))
    assert [type(module) for module in model] == [rru_fast.RRU, reference.RRU]


def test_a_subclass_with_a_forward_of_its_own_is_left_alone() -> None:
    class Doubled(reference.RRU):
        def forward(self, x, lengths=None, state=None):  # type: ignore[no-untyped-def]
            return super().forward(2 * x, lengths, state)

    with pytest.warns(UserWarning, match="accelerate: Doubled holds no module to swap"):
        assert type(rru_fast.accelerate(Doubled(6, (3, 2)))) is Doubled


def test_nothing_to_restore_warns() -> None:
    with pytest.warns(UserWarning, match="restore: Linear holds no accelerated module"):
        rru_fast.restore(nn.Linear(2, 2))


def test_copies_of_an_accelerated_model_can_be_restored() -> None:
    model = copy.deepcopy(rru_fast.accelerate(reference.RRU(6, (3, 2))))
    assert type(rru_fast.restore(model)) is reference.RRU


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model,
    "DistributedDataParallel": DistributedDataParallel,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item]
    "AveragedModel": AveragedModel,
}


WHEN = [(name, when) for name in WRAPPERS for when in ("before", "after")]
WHEN.remove(("torch.compile", "before"))  # tests/test_works_with_graphs.py


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("name", "when"), WHEN)
def test_a_model_swapped_before_or_after_it_is_wrapped_trains_on_and_back(name: str, when: str) -> None:
    torch._dynamo.reset()
    plain = Mixed().double()
    model = copy.deepcopy(plain)
    wanted = training(plain, 4)
    if when == "before":
        rru_fast.accelerate(model)
    wrapped = WRAPPERS[name](model)
    parameters = dict(wrapped.named_parameters())
    if when == "after":
        rru_fast.accelerate(wrapped)
    assert swapped(wrapped) == SWAPPED
    got = training(wrapped, 4)
    assert got == pytest.approx(wanted, rel=1e-9)

    rru_fast.restore(wrapped)
    assert swapped(wrapped) == set()
    for key, parameter in wrapped.named_parameters():
        assert parameter is parameters[key]
    state = {without_wrapper(key): value for key, value in wrapped.state_dict().items()}
    for key, trained in plain.state_dict().items():
        assert relative_error(state[key].double(), trained.double()) <= EXACT, key
    assert training(wrapped, 1) == pytest.approx(training(plain, 1), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_in_half_precision_is_swapped_as_it_is(dtype: torch.dtype) -> None:
    plain = Mixed().to(dtype)
    fast = rru_fast.accelerate(copy.deepcopy(plain))
    assert swapped(fast) == SWAPPED
    assert {value.dtype for value in (*fast.parameters(), *fast.buffers())} == {dtype, torch.int64}
    errors: dict[str, list[float]] = {"plain": [], "fast": []}
    for _ in range(5):
        x = a_batch(dtype)
        oracle = copy.deepcopy(plain).double()(x.double(), PEOPLE)
        for name, model in (("plain", plain), ("fast", fast)):
            loss = copy.deepcopy(model)(x, PEOPLE)
            assert loss.dtype == dtype
            loss.backward()
            errors[name].append(relative_error(loss.detach().double(), oracle.detach()))
    assert sorted(errors["fast"])[2] <= 2 * sorted(errors["plain"])[2] + torch.finfo(dtype).eps


def test_state_dicts_load_both_ways() -> None:
    plain, fast = Mixed().double(), rru_fast.accelerate(Mixed().double())
    training(plain, 2), training(fast, 2)
    for source, target in ((plain, fast), (fast, plain)):
        training(source, 1)
        target.load_state_dict(source.state_dict(), strict=True)
        x = a_batch()
        for mode in (True, False):
            wanted, got = source.train(mode)(x, PEOPLE), target.train(mode)(x, PEOPLE)
            assert relative_error(got.detach(), wanted.detach()) <= EXACT
        source.train(), target.train()


def test_an_average_of_a_swapped_model_is_the_average_of_the_plain_one_and_is_fast_itself() -> None:
    plain = Mixed().double()
    averages = []
    for model in (plain, rru_fast.accelerate(copy.deepcopy(plain))):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
        for seed in range(3):
            torch.manual_seed(seed)
            training(model, 1)
            average.update_parameters(model)
        averages.append(average)
    of_plain, of_fast = averages
    assert swapped(of_fast) == SWAPPED
    for (name, wanted), got in zip(of_plain.state_dict().items(), of_fast.state_dict().values(), strict=True):
        assert relative_error(got.double(), wanted.double()) <= EXACT, name
    x = a_batch()
    assert relative_error(of_fast.eval()(x, PEOPLE), of_plain.eval()(x, PEOPLE)) <= EXACT
    assert swapped(rru_fast.restore(of_fast)) == set()


@pytest.mark.parametrize("kind", PLAIN)
def test_a_model_compiled_before_the_swap_runs_the_fast_forward_after_it(kind: str) -> None:
    torch._dynamo.reset()
    model: Any = PLAIN[kind]().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = maps(2)
    before = first_two(compiled(x))

    def use(backend: str) -> None:
        if kind == "reference":
            model.backend = backend
        else:
            model.forward = partial(model.forward.func, model, backend, *model.forward.args[2:])

    rru_fast.accelerate(model)
    use("nonsense")  # only the fast forward reads it
    with pytest.raises(Exception, match="nonsense"):
        compiled(x)
    use("auto")
    for change in (rru_fast.accelerate, rru_fast.restore):
        for got, wanted in zip(first_two(change(model) and compiled(x)), before, strict=True):
            assert relative_error(got, wanted) <= 1e-6
    # The error left the compiler in the middle of an operator's registration; a plain backward must not be affected.
    loss_of(rru_fast.accelerate(model).train()(x)).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
