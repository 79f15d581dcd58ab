"""Third-party modules under accelerate: the same results, from copies too; near misses are left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import rru_fast
from rru_fast.testing import EXACT, relative_error
from tests.helpers import modules, third_party
from tests.helpers.modules import PEOPLE, SIZES, bound_backend, through_a_file
from tests.helpers.near_misses import NEAR_MISSES

UNITS: dict[str, Callable[[], Any]] = {
    "RRU": lambda: third_party.RRU(6, **SIZES).double(),
    "FuseNet": lambda: third_party.FuseNet(6, 7, **SIZES).double(),
}
every_unit = pytest.mark.parametrize("make", UNITS.values(), ids=UNITS.keys())
maps = partial(modules.maps, dtype=torch.float64)
pytestmark = pytest.mark.filterwarnings("error:accelerate")


def outputs(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def train(module: nn.Module, steps: int = 3) -> dict[str, Tensor]:
    """The state and the last outputs after steps of SGD on the same maps for every module."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        out = outputs(module(maps(3)))
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
@pytest.mark.parametrize("norm", ["training", "frozen", "cumulative", "synchronized"])
def test_a_unit_trains_as_before(make: Callable[[], Any], norm: str) -> None:
    plain = make()
    if norm == "frozen":
        plain.reduce_dim_z.eval().requires_grad_(False)
    if norm == "cumulative":  # as torch.optim.swa_utils.update_bn sets it
        plain.reduce_dim_z.bn.momentum = None
    if norm == "synchronized":
        plain = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
    fast = rru_fast.accelerate(copy.deepcopy(plain))
    before = fast.state_dict()["reduce_dim_z.bn.running_mean"].clone()
    wanted = train(plain)
    assert_same(train(fast), wanted)
    assert torch.equal(wanted["reduce_dim_z.bn.running_mean"], before) == (norm == "frozen")
    assert wanted["reduce_dim_z.bn.num_batches_tracked"] == (0 if norm == "frozen" else 3 * 4)  # one per frame

    for module in (plain, fast, rru_fast.restore(fast)):
        module.eval()
        x = maps(1)
        for original, got, of_clip in zip(*(outputs(o) for o in (plain(x), module(x), module(x[0]))), strict=True):
            assert got.shape == of_clip.shape == original.shape  # one clip without the dimension of the batch
            assert got.stride() == original.stride()
            assert relative_error(got, original) <= EXACT
            assert torch.equal(of_clip, got)


@pytest.mark.exhaustive  # every dtype at the original sizes
def test_a_unit_of_the_original_sizes_is_as_near_the_oracle_as_the_original_in_every_dtype() -> None:
    plain = third_party.FuseNet(16, 256).double()
    fast = rru_fast.accelerate(copy.deepcopy(plain))
    x = torch.randn(2, 3, 16, 8, 8, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        low = x.to(dtype)
        oracle, originals = copy.deepcopy(plain)(low.double()), copy.deepcopy(plain).to(dtype)(low)
        for wanted, original, got in zip(oracle, originals, copy.deepcopy(fast).to(dtype)(low), strict=True):
            assert got.dtype == dtype
            limit = max(2 * relative_error(original.double(), wanted), torch.finfo(dtype).eps, EXACT)
            assert relative_error(got.double(), wanted) <= limit


@pytest.mark.parametrize("loss", [third_party.TripletLoss, third_party.BatchHardTripletLoss])
@pytest.mark.parametrize("margin", [0.0, 1e-3, 0.3, 5.0, 100.0, 1e4, 1e6])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_and_its_gradients_are_the_same(loss: type[Any], margin: float, reduction: str) -> None:
    plain = loss(margin)
    plain.ranking_loss.reduction = reduction
    fast = rru_fast.accelerate(copy.deepcopy(plain))
    for features in (torch.randn(12, 5).double(), torch.randn(12, 5).double() + 9 * PEOPLE[:, None]):
        results = []
        for module in (plain, fast):
            leaf = features.clone().requires_grad_()
            value = module(leaf, targets=PEOPLE)
            results.append((value, *torch.autograd.grad(value.sum(), leaf)))
        for original, got in zip(*results, strict=True):
            assert original.shape == got.shape
            assert relative_error(got, original) <= EXACT


def test_under_autocast_a_loss_is_float32() -> None:
    features = torch.randn(12, 6, dtype=torch.bfloat16, requires_grad=True)
    fast = rru_fast.accelerate(third_party.TripletLoss(5.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fast(features, PEOPLE)
    loss.backward()
    assert loss.dtype == torch.float32 and features.grad is not None and features.grad.dtype == torch.bfloat16
    exact = third_party.TripletLoss(5.0)(features.double(), PEOPLE)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone_with_a_line_that_says_why(name: str) -> None:
    make, reason = NEAR_MISSES[name]
    model = nn.ModuleDict({"head": make(), "loss": third_party.TripletLoss()})
    own = dict(vars(model["head"]))
    expected = rf"^accelerate: head \({type(model['head']).__name__}\) looks like .* and is left alone: {reason}"
    with pytest.warns(UserWarning, match=expected) as caught:
        rru_fast.accelerate(model)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert vars(model["head"]) == own
    assert bound_backend(model["loss"]) == "auto"


@every_unit
def test_the_swap_changes_no_weight_random_state_or_hook_and_is_undone(make: Callable[[], Any]) -> None:
    module, seen = make().requires_grad_(False).eval(), []
    module.register_forward_hook(lambda *call: seen.append(call[0]))
    module.backend = "gloo"  # an attribute of its own
    own, parameters, random = dict(vars(module)), list(module.parameters()), torch.get_rng_state()
    before = copy.deepcopy(module.state_dict())
    with torch.inference_mode(), torch.device("meta"):
        assert rru_fast.accelerate(module) is module
    assert seen == [] and torch.equal(torch.get_rng_state(), random)
    assert_same(module.state_dict(), before)
    module(maps(3))
    assert seen == [module]
    assert vars(rru_fast.restore(module)) == own
    assert all(p is q and not p.requires_grad for p, q in zip(module.parameters(), parameters, strict=True))


def test_hooks_on_a_part_that_is_still_called_run_after_the_swap() -> None:
    module, seen = UNITS["FuseNet"](), []
    module.t_info.register_forward_hook(lambda *call: seen.append(call[0]))
    rru_fast.accelerate(module)(maps(3))
    assert bound_backend(module) == "auto" and seen == [module.t_info]


def test_a_forward_that_was_wrapped_after_the_swap_is_not_dropped() -> None:
    module = rru_fast.accelerate(UNITS["RRU"]())
    bound = module.forward
    module.forward = lambda x: bound(x)
    for change in (rru_fast.accelerate, rru_fast.restore):
        with pytest.raises(TypeError, match="got a RRU with another forward, wanted the one that accelerate gave it"):
            change(module)
    module.forward = bound
    assert "forward" not in vars(rru_fast.restore(module))


@every_unit
def test_a_unit_on_the_meta_device_is_swapped(make: Callable[[], Any]) -> None:
    fast = rru_fast.accelerate(make().to("meta"))
    assert next(fast.parameters()).is_meta
    fast.to_empty(device="cpu").load_state_dict(make().state_dict())
    assert outputs(fast(maps(3)))[0].isfinite().all()


@pytest.mark.parametrize(
    "change", [partial(prune.l1_unstructured, name="weight", amount=0.5), parametrizations.orthogonal]
)
def test_a_weight_made_of_others_after_the_swap_is_made_at_each_call(change: Callable[[Any], object]) -> None:
    plain = UNITS["RRU"]()
    fast = rru_fast.accelerate(copy.deepcopy(plain))
    for module in (plain, fast):
        change(module.c_atten_z[1])
    assert_same(train(fast), train(plain))


def test_scripted_modules_and_those_with_a_few_of_the_names_are_passed_over() -> None:
    other = nn.Module()
    other.reduce_dim_z, other.margin = nn.Linear(2, 2), 0.3  # type: ignore[assignment]
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), other, UNITS["RRU"]())
    assert [bound_backend(module) for module in rru_fast.accelerate(model)] == [None, None, "auto"]


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": through_a_file,
    "DataParallel": lambda module: module._replicate_for_data_parallel(),
}


@every_unit
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_as_fast_has_weights_of_its_own_and_is_restored(make: Callable[[], Any], how: str) -> None:
    plain = make()
    fast = rru_fast.accelerate(copy.deepcopy(plain), backend="composite")
    other = COPIES[how](fast)
    if how == "DataParallel":  # it gives a replica its submodules afterwards
        other.__dict__["_modules"] = {name: copy.deepcopy(module) for name, module in fast._modules.items()}
    assert bound_backend(other) == "composite"
    with torch.no_grad():
        for module in (plain, other):
            next(module.parameters()).mul_(2)  # not those of `fast`
    x = maps(3)
    for got, wanted, not_wanted in zip(*(outputs(m.eval()(x)) for m in (other, plain, fast)), strict=True):
        assert relative_error(got, wanted) <= EXACT
        assert relative_error(not_wanted, wanted) > 1e-6
    assert vars(rru_fast.restore(other)).keys() - vars(plain).keys() <= {"_is_replica"}
