"""What a loss may read, of every kind: it is watched and the change followed, or the loss is left alone."""

from __future__ import annotations

import collections
import functools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rru_fast
from rru_fast.testing import EXACT, relative_error
from tests.helpers.modules import PEOPLE, bound_backend, warnings_as
from tests.helpers.third_party import TripletLoss


def hinge(inputs: Tensor, targets: Tensor, margin: float) -> Tensor:
    distances, same = TripletLoss().distances(inputs), targets[:, None] == targets
    return (
        (margin + distances.masked_fill(~same, 0).amax(1) - distances.masked_fill(same, torch.inf).amin(1))
        .relu()
        .mean()
    )


class ListedTripletLoss:
    def __init__(self) -> None:
        self.parts = [SimpleNamespace(margin=0.3)]

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return hinge(inputs, targets, self.parts[0].margin)


class CalledTripletLoss:
    """Reads its margin from a function, a method or a partial."""

    def __init__(self, get: Callable[[], float]) -> None:
        self.get = get

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return hinge(inputs, targets, float(self.get()))


class Owner:
    def __init__(self) -> None:
        self.margin = 0.3

    def get(self) -> float:
        return self.margin


class BufferTripletLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", None)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        inputs = self.project(inputs) if hasattr(self, "project") else inputs
        loss = hinge(inputs, targets, 0.3)
        return loss if self.weight is None else loss * self.weight


class ClassTripletLoss(nn.Module):
    options = {"margin": 0.3}  # noqa: RUF012
    pair = (1.0,)

    @property
    def margin(self) -> float:
        return getattr(self, "_margin", 0.0)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        margin = self.options["margin"] + self.margin
        return hinge(inputs, targets, margin) * self.pair[0] * getattr(self, "factor", 1.0)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: Any, *args: Any) -> Any:
        return function(self, *args)

    return wrapper


def read_scale(loss: Any) -> float:
    return getattr(loss, "scale", 1.0)


GLOBAL = {"margin": 0.3}


class DecoratedTripletLoss(nn.Module):
    margin = 0.3

    @decorated
    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return hinge(inputs, targets, GLOBAL["margin"]) * read_scale(self) * (2 if getattr(self, "twice", False) else 1)


class ModeTripletLoss:
    """A plain object with a flag of PyTorch's name."""

    training = True

    def __init__(self) -> None:
        self.margin = 0.3

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return hinge(inputs, targets, self.margin if self.training else 0.0)


def set_(path: str, value: Any) -> Callable[[Any], None]:
    def change(loss: Any) -> None:
        *steps, last = path.split(".")
        for step in steps:
            loss = loss[int(step)] if step.isdigit() else getattr(loss, step)
        setattr(loss, last, value)

    return change


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], None], str]] = {
    "an object in a list": (ListedTripletLoss, set_("parts.0.margin", 0.9), r"parts\[0\].margin"),
    "the object of a method": (lambda: CalledTripletLoss(Owner().get), set_("get.__self__.margin", 0.9), "get.margin"),
    "the object in a partial": (
        lambda: CalledTripletLoss(functools.partial(getattr, Owner(), "margin")),
        lambda loss: setattr(loss.get.args[0], "margin", 0.9),
        r"get\[0\].margin",
    ),
    "a buffer that was None": (BufferTripletLoss, set_("weight", torch.tensor(2.0)), "weight"),
    "a new submodule": (BufferTripletLoss, set_("project", nn.Linear(5, 5).double()), "project"),
    "a new attribute of a decorated forward": (DecoratedTripletLoss, set_("twice", True), "twice"),
    "a new attribute that a function reads": (DecoratedTripletLoss, set_("scale", 3.0), "scale"),
    "what a property reads": (ClassTripletLoss, set_("_margin", 0.5), "_margin"),
    "a plain object's training": (ModeTripletLoss, set_("training", False), "training"),
    "another class": (
        lambda: type("SwitchedTripletLoss", (ClassTripletLoss,), {})(),
        set_("__class__", type("OtherTripletLoss", (ClassTripletLoss,), {"margin": 2.0})),
        "__class__",
    ),
}


def features() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(12, 5, dtype=torch.float64)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_followed(name: str) -> None:
    make, change, said = CHANGES[name]
    plain = make()
    fast = rru_fast.accelerate(make())
    assert bound_backend(fast) == "auto"
    with warnings_as("error"):
        before = fast(features(), PEOPLE)
    for loss in (plain, fast):
        change(loss)
    with pytest.warns(UserWarning, match=f"runs its own forward, since its {said} is not what it was"):
        got = fast(features(), PEOPLE)
    wanted = plain(features(), PEOPLE)
    assert relative_error(got, wanted) <= EXACT
    assert relative_error(before, wanted) > 1e-3


OF_CLASSES: dict[str, tuple[type[Any], str, Any]] = {
    "a dict's value": (ClassTripletLoss, "options", {"margin": 0.9}),
    "a tuple": (ClassTripletLoss, "pair", (3.0,)),
    "a property": (ClassTripletLoss, "margin", property(lambda self: 0.4)),
    "a new attribute": (ClassTripletLoss, "factor", 2.0),
}


@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_change_of_a_class_is_followed_in_pickles_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, attribute, value = OF_CLASSES[name]
    plain, fast = cls(), rru_fast.accelerate(cls())
    stored = pickle.dumps(fast)
    monkeypatch.setattr(cls, attribute, value, raising=False)
    for loss in (fast, pickle.loads(stored)):
        with pytest.warns(UserWarning, match=f"since its ClassTripletLoss.{attribute} is not what it was"):
            assert relative_error(loss(features(), PEOPLE), plain(features(), PEOPLE)) <= EXACT


def test_a_pickle_of_a_loss_whose_class_is_the_same_stays_fast() -> None:
    fast = pickle.loads(pickle.dumps(rru_fast.accelerate(ClassTripletLoss())))
    with warnings_as("error"):
        assert relative_error(fast(features(), PEOPLE), ClassTripletLoss()(features(), PEOPLE)) <= EXACT


def test_a_change_of_a_global_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = DecoratedTripletLoss(), rru_fast.accelerate(DecoratedTripletLoss())
    monkeypatch.setitem(GLOBAL, "margin", 0.9)
    with pytest.warns(UserWarning, match=r"since its .*test_watch_kinds.GLOBAL is not what it was"):
        assert relative_error(fast(features(), PEOPLE), plain(features(), PEOPLE)) <= EXACT


class CompiledTripletLoss(nn.Module):
    soft = False

    def __init__(self) -> None:
        super().__init__()
        self.margin = 0.3

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return hinge(inputs, targets, self.margin) * (3 if self.soft else 1)


@pytest.mark.parametrize("compiled_first", [True, False])
@pytest.mark.parametrize("on", ["loss", "class"])
def test_a_compiled_loss_follows_an_attribute_of_its_class(
    on: str, compiled_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    plain, fast = CompiledTripletLoss(), rru_fast.accelerate(CompiledTripletLoss())
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    if compiled_first:
        compiled(features(), PEOPLE)
    if on == "class":
        monkeypatch.setattr(CompiledTripletLoss, "soft", True)
    else:
        plain.soft = fast.soft = True
    assert relative_error(compiled(features(), PEOPLE), plain(features(), PEOPLE)) <= EXACT


@dataclass(slots=True)
class Slots:
    margin: float = 0.3


def closure(margin: float) -> Callable[[], float]:
    held = [margin]
    return lambda: held[0]


UNWATCHABLE: dict[str, tuple[Any, str]] = {
    "an object with slots": (Slots(), "its held is a Slots, whose contents may change"),
    "an array": (np.array([0.3]), "its held is a ndarray, whose contents may change"),
    "a deque": (collections.deque([0.3]), "its held is a deque, whose contents may change"),
    "a tensor in a set": ({torch.ones(())}, r"its held\[0\] is a Tensor, whose contents may change"),
    "a closure": (closure(0.3), "its held is a closure, whose variables may change"),
    "a long list": ([0.3] * 1001, "its held has 1001 items, wanted at most 1000 to compare at every call"),
}


@pytest.mark.parametrize("name", UNWATCHABLE)
def test_what_cannot_be_watched_leaves_a_loss_alone(name: str) -> None:
    held, reason = UNWATCHABLE[name]
    loss = TripletLoss(0.3)
    loss.held = held
    with pytest.warns(UserWarning, match=f"is left alone: {reason}; rru_fast.batch_hard_triplet"):
        rru_fast.accelerate(loss)
    assert bound_backend(loss) is None
