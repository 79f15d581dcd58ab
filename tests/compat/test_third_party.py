"""Other people's modules, swapped by the one call: what they compute, and which are left alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import update_bn

import rru_fast
from rru_fast.compat import third_party as foreign
from rru_fast.testing import EXACT, relative_error
from tests import parity
from tests.helpers import third_party
from tests.helpers.modules import PEOPLE, SIZES, through_a_file
from tests.helpers.near_misses import LOOK_ALIKES

UNITS: dict[str, Callable[[], nn.Module]] = {
    "RRU": lambda: third_party.RRU(6, **SIZES),
    "FuseNet": lambda: third_party.FuseNet(6, 7, **SIZES),
}
every_unit = pytest.mark.parametrize("make", UNITS.values(), ids=UNITS.keys())


def maps(clips: int = 3, frames: int = 4) -> Tensor:
    return torch.randn(clips, frames, 6, 4, 4, dtype=torch.float64)


def outputs(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def twins(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The module in float64 as it is, and a copy that is swapped."""
    plain = module.double()
    return plain, rru_fast.accelerate(copy.deepcopy(plain))


def train(module: nn.Module, steps: int = 3) -> dict[str, Tensor]:
    """The state and the last outputs after steps of SGD, the same for every module."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        out = outputs(module(maps()))
        optimizer.zero_grad()
        sum((v.square().mean() for v in out), torch.zeros(())).backward()
        optimizer.step()
    return {**module.state_dict(), **{f"output {n}": v.detach() for n, v in enumerate(out)}}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        assert relative_error(got[name].double(), value.double()) <= EXACT, name


@every_unit
@pytest.mark.parametrize("norm", ["training", "frozen", "synchronised"])
def test_the_authors_unit_trains_as_before(make: Callable[[], nn.Module], norm: str) -> None:
    module = make()
    if norm == "frozen":
        module.reduce_dim_z.eval().requires_grad_(False)  # type: ignore[union-attr, operator]
    if norm == "synchronised":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    plain, fast = twins(module)
    before = fast.state_dict()["reduce_dim_z.bn.running_mean"].clone()
    wanted = train(plain)
    assert_same(train(fast), wanted)
    assert torch.equal(wanted["reduce_dim_z.bn.running_mean"], before) == (norm == "frozen")
    assert wanted["reduce_dim_z.bn.num_batches_tracked"] == (0 if norm == "frozen" else 3 * 4)  # a frame each

    for module in (plain, fast, rru_fast.restore(fast)):
        module.eval()
        x = maps(1)
        for theirs, ours, one in zip(
            outputs(plain(x)), outputs(module(x)), outputs(module(x[0])), strict=True
        ):  # one clip without its dimension
            assert ours.shape == one.shape == theirs.shape
            assert ours.stride() == theirs.stride()
            assert relative_error(ours, theirs) <= EXACT
            assert torch.equal(one, ours)


@pytest.mark.exhaustive  # every dtype at 2048 channels
def test_the_authors_unit_at_its_own_sizes_is_as_near_the_oracle_as_theirs_in_every_dtype() -> None:
    plain, fast = twins(third_party.FuseNet(16, 256))
    x = torch.randn(2, 3, 16, 8, 8, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        low = x.to(dtype)
        oracle, theirs = copy.deepcopy(plain)(low.double()), copy.deepcopy(plain).to(dtype)(low)
        for wanted, their, ours in zip(oracle, theirs, copy.deepcopy(fast).to(dtype)(low), strict=True):
            assert ours.dtype == dtype
            limit = max(2 * relative_error(their.double(), wanted), torch.finfo(dtype).eps, EXACT)
            assert relative_error(ours.double(), wanted) <= limit


@pytest.mark.parametrize("loss", [third_party.TripletLoss, third_party.BatchHardTripletLoss])
@pytest.mark.parametrize("margin", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torchreids_loss_and_the_authors_are_the_same_with_their_gradients(
    loss: type[third_party.TripletLoss], margin: float, reduction: str
) -> None:
    plain = loss(margin)
    plain.ranking_loss.reduction = reduction
    fast = rru_fast.accelerate(copy.deepcopy(plain))
    for features in (torch.randn(12, 5).double(), torch.randn(12, 5).double() + 9 * PEOPLE[:, None]):
        results = []
        for module in (plain, fast):
            leaf = features.clone().requires_grad_()
            value = module(leaf, targets=PEOPLE)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            results.append((value, gradient))
        for theirs, ours in zip(*results, strict=True):
            assert theirs.shape == ours.shape
            assert relative_error(ours, theirs) <= EXACT


def test_a_margin_changed_after_the_swap_is_the_margin() -> None:
    plain = third_party.TripletLoss(0.3)
    fast = rru_fast.accelerate(copy.deepcopy(plain))
    plain.ranking_loss.margin = fast.ranking_loss.margin = 2.0
    features = torch.randn(12, 5)
    assert torch.allclose(fast(features, PEOPLE), plain(features, PEOPLE))


@every_unit
def test_the_very_module_and_parameters_stay(make: Callable[[], nn.Module]) -> None:
    module = make()
    cls, text, parameters, own = type(module), repr(module), dict(module.named_parameters()), set(vars(module))
    assert rru_fast.accelerate(module) is module
    assert isinstance(module, cls)
    assert type(module) is not cls
    assert type(module).__qualname__ == cls.__qualname__
    assert "rru_fast backend='auto'" in repr(module)
    for restored in (False, True):
        if restored:
            rru_fast.restore(module)
        assert [p is parameters[name] for name, p in module.named_parameters()] == [True] * len(parameters)
    assert type(module) is cls
    assert repr(module) == text
    assert set(vars(module)) == own


def test_looking_at_a_module_changes_nothing_and_runs_no_hooks() -> None:
    module = third_party.FuseNet(6, 7, **SIZES).requires_grad_(False).eval()
    module.t_info.append(nn.Dropout3d())  # draws from the generator that is looked at below
    seen: list[Any] = []
    module.register_forward_hook(lambda *call: seen.append(call[0]))
    module.t_info.register_forward_pre_hook(lambda *call: seen.append(call[0]))
    before, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    with torch.inference_mode(), torch.device("meta"):
        rru_fast.accelerate(module)
    assert seen == []
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(p.requires_grad for p in module.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    module(maps().float())
    assert seen == [module.t_info, module]  # hooks on what still runs, run


@pytest.mark.parametrize(("make", "why"), LOOK_ALIKES, ids=[why[:50] for _, why in LOOK_ALIKES])
def test_a_look_alike_is_left_alone_with_a_line_that_says_why(make: Callable[[], nn.Module], why: str) -> None:
    module = make()
    model = nn.ModuleDict({"head": module, "unit": third_party.TripletLoss()})
    cls, own = type(module), dict(vars(module))
    with pytest.warns(
        UserWarning, match=rf"^accelerate: head \({cls.__name__}\) looks like .* and is left alone: {why}"
    ) as caught:
        rru_fast.accelerate(model)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert type(module) is cls
    assert vars(module) == own
    assert isinstance(model["unit"], foreign.Foreign)  # the others are swapped


@every_unit
def test_statistics_over_all_batches_are_theirs(make: Callable[[], nn.Module]) -> None:
    plain, fast = twins(make())
    batches = [maps(), maps(clips=2, frames=3)]
    for module in (plain, fast):
        update_bn(batches, module)
    assert_same(fast.state_dict(), plain.state_dict())


class Renamed(third_party.TripletLoss):
    def forward(self, feats: Tensor, labels: Tensor) -> Tensor:
        return super().forward(feats, labels)


def test_arguments_keep_the_names_they_had() -> None:
    features, labels = torch.randn(12, 6, dtype=torch.float64), PEOPLE
    plain = Renamed(5.0)
    fast = rru_fast.accelerate(copy.deepcopy(plain))
    assert isinstance(fast, foreign.Foreign)
    for call in (lambda loss: loss(features, labels=labels), lambda loss: loss(labels=labels, feats=features)):
        assert call(fast).item() == pytest.approx(call(plain).item(), rel=1e-12)


def test_under_autocast_the_loss_is_float32_as_theirs() -> None:
    features = torch.randn(12, 6, dtype=torch.bfloat16, requires_grad=True)
    fast = rru_fast.accelerate(third_party.TripletLoss(5.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fast(features, PEOPLE)
    loss.backward()
    assert loss.dtype == torch.float32 and features.grad is not None and features.grad.dtype == torch.bfloat16
    exact = third_party.TripletLoss(5.0)(features.double(), PEOPLE)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@every_unit
def test_a_unit_without_data_yet_is_swapped(make: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        module = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = rru_fast.accelerate(module)
    assert isinstance(fast, foreign.Foreign) and next(fast.parameters()).is_meta
    fast.to_empty(device="cpu").load_state_dict(make().state_dict())
    assert outputs(fast(maps().float()))[0].isfinite().all()


def test_a_scripted_module_beside_a_unit_is_passed_by() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    model = rru_fast.accelerate(nn.Sequential(scripted, third_party.RRU(6, **SIZES)))
    assert isinstance(model[1], foreign.Foreign) and isinstance(model[0], torch.jit.ScriptModule)


def test_a_weight_that_is_made_before_each_call_is_made_after_the_swap_too() -> None:
    plain, fast = twins(third_party.RRU(6, **SIZES))
    for module in (plain, fast):
        prune.l1_unstructured(module.c_atten_z[1], "weight", 0.5)
    for module in (plain, fast):
        module.c_atten_z[1].weight_orig.data.mul_(3)
    assert_same(train(fast), train(plain))


def test_names_alone_mean_nothing() -> None:
    class Imputer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduce_dim_z = nn.Linear(2, 2)
            self.margin = 0.3

    with pytest.warns(UserWarning, match="accelerate: Imputer holds no module to swap") as caught:
        rru_fast.accelerate(Imputer())
    assert len(caught) == 1


@pytest.mark.parametrize("margin", [1e-3, 0.3, 100.0, 1e4, 1e6])
def test_a_loss_is_swapped_whatever_its_margin(margin: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(rru_fast.accelerate(third_party.TripletLoss(margin)), foreign.Foreign)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": through_a_file,
    "replica": lambda module: module._replicate_for_data_parallel(),  # type: ignore[operator]
}


@every_unit
@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES.keys())
def test_a_copy_is_as_fast_has_weights_of_its_own_and_comes_back(
    make: Callable[[], nn.Module], how: Callable[[nn.Module], nn.Module]
) -> None:
    plain, fast = twins(make())
    if how is COPIES["replica"]:  # of DataParallel: parameters are set on it afterwards, and are the original's here
        other = how(fast)
        other.__dict__["_modules"] = {name: copy.deepcopy(module) for name, module in fast._modules.items()}
    else:
        other = how(fast)
    assert type(other) is type(fast)
    with torch.no_grad():
        for module in (plain, other):
            next(module.parameters()).mul_(2)  # not the swapped module's
    x = maps()
    for got, wanted, not_wanted in zip(*(outputs(m.eval()(x)) for m in (other, plain, fast)), strict=True):
        assert relative_error(got, wanted) <= EXACT
        assert relative_error(not_wanted, wanted) > 1e-6
    assert type(rru_fast.restore(other)) is type(plain)


def test_the_backend_is_the_one_asked_for_and_can_be_changed() -> None:
    module = rru_fast.accelerate(third_party.RRU(6, **SIZES).double(), backend="composite")
    assert "rru_fast backend='composite'" in repr(module)
    x = maps()
    composite = module.eval()(x)
    for backend in [*parity.COMPILED, "reference"]:
        assert relative_error(rru_fast.accelerate(module, backend=backend)(x), composite) <= EXACT
        assert f"rru_fast backend={backend!r}" in repr(module)


def test_graphs_are_refused_for_their_unit_before_anything_is_swapped() -> None:
    model = nn.ModuleList([rru_fast.reference.RRU(6, (4, 4)), third_party.TripletLoss(), third_party.RRU(6, **SIZES)])
    wanted = r"cuda_graph: got True with 2 \(RRU\), wanted False: rru-reid's RRU runs no CUDA graphs"
    with pytest.raises(ValueError, match=wanted):
        rru_fast.accelerate(model, cuda_graph=True)
    assert [type(module) for module in model] == [rru_fast.reference.RRU, third_party.TripletLoss, third_party.RRU]


def test_an_attribute_that_is_called_backend_stays_the_modules_own() -> None:
    module = third_party.TripletLoss()
    module.backend = "gloo"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rru_fast.restore(rru_fast.accelerate(module))
    assert module.backend == "gloo"
