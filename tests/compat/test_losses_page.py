"""docs/losses.md shows the known losses, and says of them what holds."""

from __future__ import annotations

import functools
from typing import Any

import pytest

import rru_fast
from benchmarks.implementations.losses import FORMS as STATED
from rru_fast.compat import binding
from rru_fast.testing import EXACT
from tests import hold_losses
from tests.helpers.loss_forms import NAMES, Form
from tests.known_losses import PARTLY, SWAPPED
from tests.losses_page import PAGE, rendered
from tests.other_losses import ELSEWHERE, OTHERS, PML, SENTENCES


@functools.cache
def swapped(name: str) -> Any:
    return rru_fast.accelerate(STATED[name].make())


def test_the_page_shows_the_known_losses() -> None:
    page = PAGE.read_text()
    assert page == rendered(page), "run `python -m tests.losses_page`"


@pytest.mark.parametrize("form", [*SWAPPED, *PARTLY], ids=lambda form: f"{form.repositories.split(',')[0]} {form.make}")
def test_a_loss_that_the_page_says_is_swapped_is_so_as_we_state_it(form: Form) -> None:
    names = form.stated.split("; ") if form.stated else []
    assert names or form in PARTLY
    for name in names:
        assert binding.is_bound(swapped(name))
        assert hold_losses.describe(swapped(name), form)[1] == form.returns


def test_every_repository_of_a_stated_loss_is_on_the_page() -> None:
    known = {place.lower() for form in (*SWAPPED, *PARTLY, *ELSEWHERE) for place, _ in form.places()}
    assert {name.lower() for form in STATED.values() for name in form.repositories.split(", ")} <= known
    assert set(STATED) == {name for form in (*SWAPPED, *PARTLY) for name in form.stated.split("; ") if form.stated}


def test_each_loss_is_on_the_page_once_and_has_a_file() -> None:
    forms = [(place, form) for form in (*SWAPPED, *PARTLY, *ELSEWHERE, *OTHERS) for place in form.places()]
    keys = [(place, form.make, form.call, form.has) for place, form in forms]
    assert len(set(keys)) == len(keys)
    assert {repository for (repository, file), _ in forms if not file} == {PML, SENTENCES}


@pytest.mark.parametrize("form", [form for form in ELSEWHERE if form.repositories == PML], ids=lambda form: form.make)
def test_pytorch_metric_learning_is_served_as_the_page_says(form: Form) -> None:
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, miners, reducers

    from rru_fast.contrib import pml  # noqa: F401

    names = {k: v for m in (distances, losses, miners, reducers) for k, v in vars(m).items()} | {"rru_fast": rru_fast}
    own = hold_losses.caller(f"{form.make}{form.call}", names)
    assert hold_losses.error(own, hold_losses.caller(form.instead, names)) <= EXACT


@pytest.mark.parametrize("form", [form for form in ELSEWHERE if form.repositories == SENTENCES], ids=lambda f: f.make)
def test_sentence_transformers_is_served_as_the_page_says(form: Form) -> None:
    pytest.importorskip("sentence_transformers")
    from rru_fast.contrib import sentence_transformers

    names = {**vars(sentence_transformers.losses), **NAMES, "rru_fast": rru_fast}
    own = hold_losses.caller(f"{form.make}{form.call}", names)
    assert hold_losses.error(own, hold_losses.caller(form.instead, names)) <= EXACT
