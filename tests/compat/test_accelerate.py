"""accelerate and restore."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import rru_fast
from rru_fast import reference
from rru_fast.compat import accelerate as swap
from rru_fast.testing import EXACT, relative_error
from tests.helpers import third_party
from tests.helpers.modules import SIZES


class Video(nn.Module):
    """A model of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.refine = nn.Sequential(nn.Identity(), reference.RRU(6, (3, 2), hidden=5))
        self.again = self.refine[1]  # shared
        self.loss = reference.BatchHardTripletLoss(margin=0.4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        out = self.again(self.refine(x).features)
        return self.loss(out.strips.permute(2, 0, 1), labels) + self.loss(out.features.mean((1, 3, 4)), labels)


def test_a_swapped_model_gives_the_same_losses_and_gradients_and_comes_back() -> None:
    model, labels = Video().double(), torch.tensor([0, 0, 1, 1])
    x = torch.randn(4, 3, 6, 3, 2, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    before = model(x, labels)
    wanted = torch.autograd.grad(before, list(parameters.values()))
    keys = list(model.state_dict())

    assert rru_fast.accelerate(model) is model
    assert type(model.again) is rru_fast.RRU
    assert type(model.loss) is rru_fast.BatchHardTripletLoss
    after = model(x, labels)
    for got, want in zip(torch.autograd.grad(after, list(parameters.values())), wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    assert torch.allclose(after, before, rtol=1e-12)
    assert list(model.state_dict()) == keys

    assert rru_fast.restore(model) is model
    assert type(model.again) is reference.RRU
    assert type(model.loss) is reference.BatchHardTripletLoss
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    assert vars(model.loss).keys() == vars(reference.BatchHardTripletLoss()).keys()


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


def test_the_chosen_backend_is_what_runs() -> None:
    model = rru_fast.accelerate(reference.RRU(6, (3, 2), hidden=5), backend="composite")
    assert model.backend == "composite"
    with pytest.raises(ValueError, match="backend: got 'warp', wanted 'auto' or one of"):
        rru_fast.accelerate(reference.RRU(6, (3, 2)), backend="warp")


def test_accelerating_again_changes_the_backend() -> None:
    model = rru_fast.accelerate(reference.RRU(6, (3, 2)), backend="reference")
    assert rru_fast.accelerate(model, backend="composite").backend == "composite"
    assert type(rru_fast.restore(model)) is reference.RRU


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


def test_a_model_compiled_before_the_swap_runs_the_fast_forward_after_it() -> None:
    model = reference.RRU(6, (3, 2), hidden=5).eval()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 3, 6, 3, 2)
    before = compiled(x).features
    rru_fast.accelerate(model)
    model.backend = "nonsense"  # only the fast forward looks at it
    with pytest.raises(Exception, match="nonsense"):
        compiled(x)
    model.backend = "auto"
    assert torch.allclose(compiled(x).features, before, atol=1e-6)
    # The error left the compiler in the middle of our registration; a plain backward must not feel it.
    model.train()(x).strips.square().sum().backward()
    assert model.transition.weight.grad.abs().max() > 0


class Mixed(nn.Module):
    """Modules of both kinds, nested, and one of each shared; from maps (B, T, 6, 4, 4) to a loss."""

    def __init__(self) -> None:
        super().__init__()
        unit = reference.RRU(6, (4, 4), hidden=8, spatial_hidden=5)
        theirs = third_party.FuseNet(6, 7, **SIZES)
        self.branches = nn.ModuleDict({"ours": nn.Sequential(nn.Identity(), unit), "theirs": nn.ModuleList([theirs])})
        self.unit, self.theirs = unit, theirs
        self.losses = nn.ModuleList([reference.BatchHardTripletLoss(0.4), third_party.TripletLoss(0.4)])

    def forward(self, x: torch.Tensor, people: torch.Tensor) -> torch.Tensor:
        maps = self.branches["ours"](x).features
        clips, strips = self.branches["theirs"][0](maps)
        again, _ = self.theirs(self.unit(x).features)
        ours, theirs = self.losses
        return ours(strips.permute(2, 0, 1), people) + theirs(clips, people) + theirs(again, people)


PEOPLE = torch.arange(6) // 2
SWAPPED = {"branches.ours.1", "branches.theirs.0", "losses.0", "losses.1"}


def a_batch(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(6, 3, 6, 4, 4).to(dtype)


def inside(name: str) -> str:
    """A name without what wrappers put before it."""
    return name.removeprefix("_orig_mod.").removeprefix("module.")


def swapped(model: nn.Module) -> set[str]:
    """Names of the modules that are fast."""
    return {inside(name) for name, module in model.named_modules() if swap._accelerated(module)}


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
    state = {inside(key): value for key, value in wrapped.state_dict().items()}
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


def test_a_model_of_theirs_compiled_before_the_swap_runs_the_fast_forward_after_it() -> None:
    torch._dynamo.reset()
    model = third_party.FuseNet(6, 7, **SIZES).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = a_batch(torch.float32)
    before = compiled(x)
    rru_fast.accelerate(model)
    model._accelerated_backend = "nonsense"  # only the fast forward looks at it
    with pytest.raises(Exception, match="nonsense"):
        compiled(x)
    model._accelerated_backend = "auto"
    for state in ("fast", "plain"):
        if state == "plain":
            rru_fast.restore(model)
        for got, wanted in zip(compiled(x), before, strict=True):
            assert relative_error(got, wanted) <= 1e-6
