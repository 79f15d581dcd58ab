"""Other people's classes, once swapped: others made by them, registers and metaclasses, copies made their own way."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rru_fast
from rru_fast.compat import third_party as foreign
from tests.helpers import third_party
from tests.helpers.modules import PEOPLE, through_a_file


def test_another_one_made_by_the_class_of_a_swapped_one_is_fast_too() -> None:
    features = torch.randn(12, 6, dtype=torch.float64)
    other = type(rru_fast.accelerate(third_party.TripletLoss(0.3)))(5.0)
    assert "rru_fast backend='auto'" in repr(other)
    wanted = third_party.TripletLoss(5.0)(features, PEOPLE).item()
    assert other(features, PEOPLE).item() == pytest.approx(wanted, rel=1e-12)
    assert rru_fast.accelerate(other, backend="composite") is other and "'composite'" in repr(other)
    assert type(rru_fast.restore(other)) is third_party.TripletLoss


known_classes: dict[str, type] = {}


class Registered(third_party.TripletLoss):
    def __init_subclass__(cls, *, alias: str) -> None:
        known_classes[alias] = cls


class Known(Registered, alias="known"):
    pass


def test_a_register_of_their_classes_keeps_its_own() -> None:
    module = rru_fast.accelerate(Known(0.3))
    assert isinstance(module, foreign.Foreign)
    assert type(rru_fast.restore(module)) is Known and known_classes == {"known": Known}


class Final(type):
    def __new__(cls, name: str, bases: tuple[type, ...], names: dict[str, Any]) -> Any:
        if any(isinstance(base, cls) for base in bases):
            raise TypeError(f"{name} cannot be derived")
        return super().__new__(cls, name, bases, names)


class Underivable(third_party.TripletLoss, metaclass=Final):
    pass


def test_a_class_that_cannot_be_derived_from_is_left_alone() -> None:
    with pytest.warns(
        UserWarning, match=r"left alone: it cannot be run as one \(TypeError: Underivable cannot be derived"
    ):
        model = rru_fast.accelerate(nn.Sequential(Underivable(), third_party.TripletLoss()))
    assert type(model[0]) is Underivable and isinstance(model[1], foreign.Foreign)


class Reduced(third_party.TripletLoss):
    def __reduce__(self) -> Any:
        return Reduced, (self.margin,)


class Made(third_party.TripletLoss):
    def __new__(cls, margin: float) -> Any:
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[float]:
        return (self.margin,)


class Noted(third_party.TripletLoss):
    """Notes what is set, in a list that has to be there first; and has a `kind` of its own."""

    def __init__(self, margin: float) -> None:
        vars(self)["noted"] = []
        super().__init__(margin)
        self.kind = "noted"

    def __setattr__(self, name: str, value: Any) -> None:
        self.noted.append(name)
        super().__setattr__(name, value)


class Derived(third_party.TripletLoss):
    @classmethod
    def make(cls, margin: float) -> Any:
        return cls(margin)

    def __reduce__(self) -> Any:
        return type(self).make, (self.margin,)


class Copied(third_party.TripletLoss):
    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)(self.margin)


@pytest.mark.parametrize("their_class", [Reduced, Made, Noted, Derived, Copied])
@pytest.mark.parametrize("how", [copy.deepcopy, through_a_file], ids=["deepcopy", "pickle"])
def test_a_class_that_says_how_it_is_copied_is_copied_so(
    their_class: Any, how: Callable[[nn.Module], nn.Module]
) -> None:
    features = torch.randn(12, 6, dtype=torch.float64)
    plain = their_class(5.0)
    fast = rru_fast.accelerate(copy.deepcopy(plain), backend="composite")
    if their_class is Derived and how is not copy.deepcopy:
        with pytest.raises(pickle.PicklingError, match="not the same object"):  # a method of a class without a name
            how(fast)
        return
    other = how(fast)
    assert isinstance(other, foreign.Foreign)
    if their_class is not Copied:
        assert "backend='composite'" in repr(other)
    assert other(features, PEOPLE).item() == pytest.approx(plain(features, PEOPLE).item(), rel=1e-12)
    assert type(rru_fast.restore(other)) is their_class
