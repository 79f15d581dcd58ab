"""accelerate and restore where losses live: on engines, in closures, lists and dicts, as plain objects."""

from __future__ import annotations

import argparse
import copy
import inspect
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rru_fast
from rru_fast.testing import EXACT, relative_error
from tests.helpers import third_party
from tests.helpers.modules import PEOPLE, SIZES, bound_backend, through_a_file, warnings_as


class PlainLoss:
    """A loss that is no module, with reid-strong-baseline's arguments and return value."""

    def __init__(self, margin: float | None = None) -> None:
        self.margin = margin
        self.ranking_loss = nn.SoftMarginLoss() if margin is None else nn.MarginRankingLoss(margin=margin)

    def __call__(self, global_feat: Tensor, labels: Tensor, normalize_feature: bool = False) -> tuple[Tensor, ...]:
        if normalize_feature:
            global_feat = global_feat / (global_feat.norm(dim=1, keepdim=True) + 1e-12)
        distances = third_party.TripletLoss().distances(global_feat)
        same = labels[:, None] == labels
        dist_ap, dist_an = distances.masked_fill(~same, 0).amax(1), distances.masked_fill(same, torch.inf).amin(1)
        ones = torch.ones_like(dist_an)
        loss = self.ranking_loss(*((dist_an - dist_ap, ones) if self.margin is None else (dist_an, dist_ap, ones)))
        return loss, dist_ap, dist_an

    def doubled(self, global_feat: Tensor, labels: Tensor) -> Tensor:
        return 2 * self(global_feat, labels)[0]


PlainTripletLoss = type("PlainTripletLoss", (PlainLoss,), {"__module__": __name__})


class Engine:
    """A trainer of the user's, with what it calls in its attributes."""

    def __init__(self) -> None:
        self.args = argparse.Namespace(margin=0.3, names=["a", "b"])
        self.model = nn.ModuleDict({"unit": third_party.RRU(6, **SIZES)})
        self.criterion = PlainTripletLoss(0.3)
        self.criteria = {"strips": [third_party.TripletLoss(0.4)], "labels": nn.CrossEntropyLoss()}
        self.pair = (partial(third_party.TripletLoss(0.5)), SimpleNamespace(loss=PlainTripletLoss()))
        self.loader = torch.utils.data.DataLoader([1, 2])
        self.itself = self


HELD = {
    "model.unit": lambda engine: engine.model["unit"],
    "criterion": lambda engine: engine.criterion,
    "criteria['strips'][0]": lambda engine: engine.criteria["strips"][0],
    "pair[0].func": lambda engine: engine.pair[0].func,
    "pair[1].loss": lambda engine: engine.pair[1].loss,
}


def features() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(12, 5, dtype=torch.float64) + 2 * torch.randn(4, 5, dtype=torch.float64)[PEOPLE]


def is_swapped(obj: Any) -> bool:
    return bound_backend(obj) is not None


def test_all_that_an_engine_holds_is_swapped_and_restored() -> None:
    engine = Engine()
    before = {name: dict(vars(get(engine))) for name, get in HELD.items()}
    with warnings_as("error"):
        assert rru_fast.accelerate(engine) is engine
    assert [name for name, get in HELD.items() if is_swapped(get(engine))] == list(HELD)
    assert rru_fast.restore(engine) is engine
    assert {name: vars(get(engine)) for name, get in HELD.items()} == before
    assert type(engine.criterion) is PlainTripletLoss


def test_what_is_left_alone_is_named_by_the_way_to_it() -> None:
    engine = Engine()
    engine.criteria["strips"][0].forward = print
    with pytest.warns(
        UserWarning, match=r"accelerate: criteria\['strips'\]\[0\] \(TripletLoss\) looks like .* its forw"
    ):
        rru_fast.accelerate(engine)
    assert is_swapped(engine.criterion)


def make_loss(margin: float) -> Callable[..., Tensor]:
    triplet, classify = PlainTripletLoss(margin), nn.CrossEntropyLoss()

    def loss_func(score: Tensor, feat: Tensor, target: Tensor) -> Tensor:
        return classify(score, target) + triplet(feat, target)[0]

    return loss_func


GLOBAL_LOSS = PlainTripletLoss(0.3)


def train_step(feat: Tensor, target: Tensor) -> Tensor:
    return GLOBAL_LOSS(feat, target)[0]


def test_a_functions_closure_and_the_globals_that_it_names_are_followed() -> None:
    plain, fast = make_loss(0.3), make_loss(0.3)
    assert rru_fast.accelerate(fast) is fast
    assert is_swapped(fast.__closure__[1].cell_contents)  # type: ignore[index]
    score, feat = torch.randn(12, 4, dtype=torch.float64), features()
    assert relative_error(fast(score, feat, PEOPLE), plain(score, feat, PEOPLE)) <= EXACT
    wanted = train_step(feat, PEOPLE)
    try:
        rru_fast.accelerate(train_step)
        assert is_swapped(GLOBAL_LOSS)
        assert relative_error(train_step(feat, PEOPLE), wanted) <= EXACT
    finally:
        rru_fast.restore(train_step)
    assert type(GLOBAL_LOSS) is PlainTripletLoss


def test_a_modules_plain_attributes_are_followed_too() -> None:
    model = type("Model", (nn.Module,), {})()
    model.loss, model.losses = PlainTripletLoss(0.3), [third_party.TripletLoss(0.3)]
    rru_fast.accelerate(nn.Sequential(model))
    assert is_swapped(model.loss) and is_swapped(model.losses[0])


def test_a_model_without_a_loss_says_where_losses_are_swapped() -> None:
    match = "Linear holds no module to swap; a loss outside of the model is swapped by itself: accelerate.loss."
    with pytest.warns(UserWarning, match=match):
        rru_fast.accelerate(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="accelerate: list holds no module to swap"):
        rru_fast.accelerate([3])


@pytest.mark.parametrize("margin", [None, 0.3])
def test_a_plain_loss_keeps_its_class_its_methods_and_its_results(margin: float | None) -> None:
    plain, fast = PlainTripletLoss(margin), PlainTripletLoss(margin)
    assert rru_fast.accelerate(fast) is fast
    assert isinstance(fast, PlainTripletLoss)
    assert (type(fast).__name__, type(fast).__module__) == ("PlainTripletLoss", __name__)
    for call in (
        lambda loss, f: loss(f, PEOPLE),
        lambda loss, f: loss(global_feat=f, labels=PEOPLE),
        lambda loss, f: loss(f, PEOPLE, normalize_feature=True),
        lambda loss, f: loss(f, PEOPLE, True),
        lambda loss, f: (loss.doubled(f, PEOPLE),),
    ):
        found = []
        for loss in (plain, fast):
            leaf = features().requires_grad_()
            out = call(loss, leaf)
            found.append((*out, torch.autograd.grad(sum(v.mean() for v in out), leaf)[0]))
        for got, wanted in zip(*found, strict=True):
            assert relative_error(got, wanted) <= EXACT


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "torch.save": through_a_file,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", [PlainTripletLoss, third_party.TripletLoss])
def test_a_copy_of_a_swapped_loss_is_swapped_and_restored_by_itself(make: Callable[..., Any], how: str) -> None:
    fast = rru_fast.accelerate(make(0.3), backend="composite")
    other = COPIES[how](fast)
    assert bound_backend(other) == "composite"
    with warnings_as("ignore" if how == "copy" else "error"):
        got, wanted = other(features(), PEOPLE), make(0.3)(features(), PEOPLE)
    for one, two in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, wanted)), strict=True):
        assert relative_error(one, two) <= EXACT
    if how != "copy":  # which shares what the loss holds
        rru_fast.restore(other)
        assert type(other) is make and "forward" not in vars(other)
        assert bound_backend(fast) == "composite"


def test_a_shallow_copy_of_a_plain_loss_runs_its_own_forward() -> None:
    fast = rru_fast.accelerate(PlainTripletLoss(0.3))
    other, wanted = copy.copy(fast), PlainTripletLoss(0.3)
    other.ranking_loss = wanted.ranking_loss = nn.MarginRankingLoss(margin=2.0)
    with pytest.warns(UserWarning, match="runs its own forward, since it is a copy of the one that was swapped"):
        got = other(features(), PEOPLE)[0]
    assert relative_error(got, wanted(features(), PEOPLE)[0]) <= EXACT
    assert relative_error(fast(features(), PEOPLE)[0], PlainTripletLoss(0.3)(features(), PEOPLE)[0]) <= EXACT


class Registered:
    """A base that keeps its subclasses."""

    classes: dict[str, type[Any]] = {}  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        Registered.classes[cls.__name__] = cls


class RegisteredTripletLoss(PlainLoss, Registered):
    """A loss in that register, whose attributes are set once, made with an argument."""

    def __new__(cls, margin: float) -> Any:
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[float]:
        return (self.margin or 0.3,)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            raise AttributeError(name)
        vars(self)[name] = value


def test_registers_copies_and_locks_of_a_class_work_as_before() -> None:
    fast = rru_fast.accelerate(RegisteredTripletLoss(0.3))
    assert bound_backend(fast) == "auto"
    assert Registered.classes == {"RegisteredTripletLoss": RegisteredTripletLoss}
    wanted = RegisteredTripletLoss(0.3)(features(), PEOPLE)[0]
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert bound_backend(other) == "auto"
        assert relative_error(other(features(), PEOPLE)[0], wanted) <= EXACT
    rru_fast.restore(fast)
    assert vars(fast).keys() == vars(RegisteredTripletLoss(0.3)).keys()


class Raises:
    """An object that can hardly be looked at."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class BrokenTripletLoss(PlainLoss):
    """A loss that cannot be copied."""

    def __deepcopy__(self, memo: object) -> Any:
        raise RuntimeError("one of a kind")


def test_one_that_raises_does_not_keep_others_from_being_swapped() -> None:
    gone = Raises()
    engine: Any = Engine()
    engine.proxy = weakref.proxy(gone)
    del gone
    engine.raises, engine.broken = Raises(), BrokenTripletLoss(0.3)
    match = (
        r"broken \(BrokenTripletLoss\) .* left alone: it cannot be copied or changed \(RuntimeError: one of a kind\)"
    )
    with pytest.warns(UserWarning, match=match):
        rru_fast.accelerate(engine)
    assert [is_swapped(get(engine)) for get in HELD.values()] == [True] * len(HELD)
    rru_fast.restore(engine)
    assert not any(is_swapped(get(engine)) for get in HELD.values())


def names_an_attribute(engine: Any) -> Any:
    return engine.GLOBAL_LOSS


def test_an_attributes_name_is_not_a_global() -> None:
    with pytest.warns(UserWarning, match="names_an_attribute holds no module to swap"):
        rru_fast.accelerate(names_an_attribute)
    assert not is_swapped(GLOBAL_LOSS)


class CallsForward:
    """A plain loss with a forward that its __call__ calls."""

    def __init__(self, margin: float) -> None:
        self.ranking_loss = nn.MarginRankingLoss(margin=margin)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return third_party.TripletLoss.forward(self, features, labels)  # type: ignore[arg-type]

    def distances(self, features: Tensor) -> Tensor:
        return torch.cdist(features, features).clamp(1e-6)

    def __call__(self, *arguments: Tensor) -> Tensor:
        return self.forward(*arguments)


class CallIsForward(CallsForward):
    """One whose __call__ does not look forward up."""

    __call__ = CallsForward.forward


@pytest.mark.parametrize("make", [CallsForward, CallIsForward])
def test_a_plain_loss_is_swapped_however_it_is_called(make: Callable[..., Any]) -> None:
    fast = rru_fast.accelerate(make(0.3))
    wanted = make(0.3)(features(), PEOPLE)
    seen: list[int] = []
    fast.ranking_loss.forward = lambda *arguments: seen.append(1)  # only its own forward would call it
    with pytest.warns(UserWarning, match="runs its own forward"):
        fast(features(), PEOPLE)
    assert seen == [1]
    del fast.ranking_loss.forward
    assert relative_error(fast(features(), PEOPLE), wanted) <= EXACT
    assert seen == [1]


def test_the_signature_of_a_swapped_loss_is_its_own() -> None:
    fast = rru_fast.accelerate(PlainTripletLoss(0.3))
    assert list(inspect.signature(fast).parameters) == ["global_feat", "labels", "normalize_feature"]
