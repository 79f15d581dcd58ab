"""Swapped losses and units after something that their own forward reads has changed: they run it, and say so once."""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import rru_fast
from rru_fast.testing import EXACT, relative_error
from tests.helpers import third_party
from tests.helpers.modules import PEOPLE, SIZES, bound_backend, maps, warnings_as
from tests.ranks import in_ranks


class Loss(third_party.TripletLoss):
    """A loss whose forward reads something of every kind."""

    floor = 1e-12

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__(margin)
        self.distance, self.mutual = "euclidean", False
        self.args = argparse.Namespace(weight=1.0, parts=["a"])
        self.weights = {"triplet": [1.0, 1.0]}

    def euclidean(self, inputs: Tensor) -> Tensor:
        square = inputs.pow(2).sum(dim=1, keepdim=True)
        return (square + square.t() - 2 * inputs @ inputs.t()).clamp(min=self.floor).sqrt()

    @staticmethod
    def cosine(inputs: Tensor) -> Tensor:
        unit = nn.functional.normalize(inputs)
        return 1 - unit @ unit.t()

    def distances(self, inputs: Tensor) -> Tensor:
        return self.euclidean(inputs) if self.distance == "euclidean" else self.cosine(inputs)

    def forward(self, inputs: Tensor, targets: Tensor) -> Any:
        loss = super().forward(inputs, targets) * getattr(self, "scale", 1.0)
        loss = loss * self.args.weight * self.weights["triplet"][0] * len(self.args.parts)
        return (loss, self.distances(inputs)) if self.mutual else loss


def set_in(loss: Any, path: str, value: Any) -> None:
    *owners, name = path.split(".")
    for owner in owners:
        loss = getattr(loss, owner)
    setattr(loss, name, value)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "distance": lambda loss: set_in(loss, "distance", "cosine"),
    "mutual": lambda loss: set_in(loss, "mutual", True),
    "scale": lambda loss: set_in(loss, "scale", 3.0),
    "ranking_loss.margin": lambda loss: set_in(loss, "ranking_loss.margin", 2.0),
    "ranking_loss.reduction": lambda loss: set_in(loss, "ranking_loss.reduction", "sum"),
    "ranking_loss": lambda loss: set_in(loss, "ranking_loss", nn.MarginRankingLoss(margin=9.0)),
    "ranking_loss._forward_hooks": lambda loss: loss.ranking_loss.register_forward_hook(lambda *call: 2 * call[2]),
    "args.weight": lambda loss: set_in(loss, "args.weight", 0.5),
    "args.parts": lambda loss: loss.args.parts.append("b"),
    "args": lambda loss: set_in(loss, "args", argparse.Namespace(weight=2.0, parts=["a"])),
    "weights": lambda loss: loss.weights["triplet"].__setitem__(0, 4.0),
    "euclidean": lambda loss: set_in(loss, "euclidean", torch.cdist(torch.eye(12), torch.eye(12)).double().mul),
}


def features() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(12, 12, dtype=torch.float64) + 0.3 * torch.randn(4, 12, dtype=torch.float64)[PEOPLE]


def results(loss: Any) -> list[Tensor]:
    leaf = features().requires_grad_()
    out = loss(leaf, PEOPLE)
    out = out if isinstance(out, tuple) else (out,)
    return [*out, torch.autograd.grad(out[0], leaf)[0]]


def assert_same(loss: Any, plain: Any) -> None:
    got, wanted = results(loss), results(plain)
    assert len(got) == len(wanted)
    for one, two in zip(got, wanted, strict=True):
        assert relative_error(one, two) <= EXACT


def assert_same_twice(loss: Any, plain: Any) -> None:
    assert_same(loss, plain)
    assert_same(loss, plain)


@pytest.mark.parametrize("name", CHANGES)
def test_a_loss_whose_attributes_have_changed_runs_its_own_forward_and_says_so_once(name: str) -> None:
    plain, fast = Loss(), rru_fast.accelerate(Loss())
    with warnings_as("error"):
        assert_same(fast, plain)
    for loss in (plain, fast):
        CHANGES[name](loss)
    reason = rf"accelerate: Loss runs its own forward, since its {name} is not what it was when it was swapped$"
    with pytest.warns(UserWarning, match=reason) as caught:
        assert_same_twice(fast, plain)
    assert len([w for w in caught if "accelerate" in str(w.message)]) == 1
    if name != "mutual":  # which changes what is returned, not the loss
        assert relative_error(results(fast)[0], results(rru_fast.accelerate(Loss()))[0]) > 1e-3


@pytest.mark.parametrize("name", ["floor", "cosine", "distances", "forward"])
def test_a_class_that_has_changed_runs_its_own_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {
        "floor": 4.0,
        "cosine": staticmethod(lambda v: v @ v.t()),
        "distances": lambda self, v: torch.cdist(v, v) + 1,
        "forward": lambda self, inputs, targets: inputs.sum(),
    }
    plain, fast = Loss(), rru_fast.accelerate(Loss())
    monkeypatch.setattr(Loss, name, values[name])
    with pytest.warns(UserWarning, match=f"accelerate: Loss runs its own forward, since its Loss.{name} is not what"):
        assert_same(fast, plain)


def test_it_is_fast_again_once_the_attribute_is_back_or_accelerate_has_compared_it_anew() -> None:
    fast = rru_fast.accelerate(Loss())
    fast.distance = "cosine"
    with pytest.warns(UserWarning, match="runs its own forward"):
        fast(features(), PEOPLE)
    with warnings_as("error"):
        fast.distance = "euclidean"
        fast(features(), PEOPLE)
        fast.distance = "cosine"
        rru_fast.accelerate(fast)
        wanted = Loss()
        wanted.distance = "cosine"
        assert_same(fast, wanted)


def test_a_loss_that_can_no_longer_be_swapped_is_restored_with_the_reason() -> None:
    fast = rru_fast.accelerate(Loss())
    fast.mutual = True
    with pytest.warns(UserWarning, match=r"Loss looks like .* is left alone: it returns \(.*, a tensor \(12, 12\)\)"):
        rru_fast.accelerate(fast)
    assert bound_backend(fast) is None and "forward" not in vars(fast)


@pytest.mark.parametrize("name", ["distance", "scale", "ranking_loss.margin", "args.weight", "mutual"])
def test_a_compiled_loss_follows_the_change_as_well(name: str) -> None:
    torch._dynamo.reset()
    plain, fast = Loss(), rru_fast.accelerate(Loss())
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    assert_same(compiled, plain)
    for loss in (plain, fast):
        CHANGES[name](loss)
    assert_same(compiled, plain)


class Scaled(third_party.RRU):
    scale = 1.0

    def refined(self, x: Tensor) -> Tensor:
        return super().refined(x) * self.scale


def test_a_unit_whose_attributes_have_changed_runs_its_own_forward() -> None:
    torch.manual_seed(0)
    plain = Scaled(6, **SIZES).double()
    fast, x = rru_fast.accelerate(copy.deepcopy(plain)), maps(3, dtype=torch.float64)
    plain.scale = fast.scale = 2.0
    with pytest.warns(UserWarning, match="accelerate: Scaled runs its own forward, since its scale is not what it was"):
        assert relative_error(fast(x), plain(x)) <= EXACT
    # A layer inside is read anew at each call; one of another kind is an error.
    fast = rru_fast.accelerate(Scaled(6, **SIZES).double())
    fast.s_atten_z[1] = nn.LeakyReLU()
    with pytest.raises(TypeError, match=r"s_atten_z\.1: got LeakyReLU, wanted a ReLU"):
        fast(x)


class Gathering(third_party.TripletLoss):
    """A loss that gathers features of all ranks where there are some."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if dist.is_initialized():
            parts = [torch.empty_like(inputs) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, inputs.detach())
            parts[dist.get_rank()] = inputs
            inputs, targets = torch.cat(parts), targets.repeat(len(parts))
        return super().forward(inputs, targets)


def gather_in_ranks(rank: int) -> dict[str, Any]:
    """Return warnings and losses of a gathering loss that was swapped before and after the process group."""
    torch.manual_seed(rank)
    inputs, targets = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) // 3
    found: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        after = rru_fast.accelerate(Gathering(0.3))
    found["after"] = [str(w.message) for w in caught]
    group = dist.group.WORLD
    dist.GroupMember.WORLD = None  # as before init_process_group
    before = rru_fast.accelerate(Gathering(0.3))
    dist.GroupMember.WORLD = group
    found["swapped"] = bound_backend(before), bound_backend(after)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = before(inputs, targets)
    found["call"] = [str(w.message) for w in caught]
    found["losses"] = [float(loss(inputs, targets)) for loss in (Gathering(0.3), after)] + [float(got)]
    return found


def test_a_loss_that_gathers_is_left_alone_among_ranks_and_runs_its_own_forward_once_there_are_some(
    tmp_path: Path,
) -> None:
    for found in in_ranks(2, tmp_path, gather_in_ranks):
        (left,) = found["after"]
        assert (
            "left alone: it calls torch.distributed.is_initialized; rru_fast.BatchHardTripletLoss(gather=True)" in left
        )
        assert found["swapped"] == ("auto", None)
        assert found["call"] == [
            "accelerate: Gathering runs its own forward, since it calls torch.distributed, which now has 2 ranks"
        ]
        assert found["losses"] == pytest.approx(found["losses"][:1] * 3, rel=1e-12)
