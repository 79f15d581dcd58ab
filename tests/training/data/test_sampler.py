from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.sampler import Clip, PKSampler
from training.data.tracklets import Tracklet
from training.errors import UserError

PIXELS = np.zeros((2, 2, 3), np.uint8)

tracklets = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(1, 20)), min_size=1, max_size=30).map(
    lambda each: [Tracklet(person, camera, (PIXELS,) * length, "x") for person, camera, length in each]
)


def people(tracklets: list[Tracklet]) -> int:
    return len({tracklet.person for tracklet in tracklets})


@given(tracklets, st.data())
def test_a_batch_is_p_people_with_k_clips_each_that_fit_their_tracklets(
    tracklets: list[Tracklet], data: st.DataObject
) -> None:
    p, k, frames = data.draw(st.integers(1, people(tracklets))), data.draw(st.integers(1, 5)), 8
    sampler = PKSampler(tracklets, p, k, frames, seed=data.draw(st.integers(0, 9)))
    batches = list(sampler)
    assert len(batches) == len(sampler) == people(tracklets) // p
    for batch in batches:
        groups = [batch[start : start + k] for start in range(0, p * k, k)]
        owners = [{tracklets[index].person for index, _ in group} for group in groups]
        assert all(len(owner) == 1 for owner in owners)
        assert len(set.union(*owners)) == p
        for index, first in batch:
            assert 0 <= first <= max(len(tracklets[index].frames) - frames, 0)


@given(tracklets, st.integers(1, 6))
def test_cameras_differ_first_and_then_tracklets(tracklets: list[Tracklet], k: int) -> None:
    for clips in PKSampler(tracklets, 1, k, 4, seed=0):
        person = tracklets[clips[0][0]].person
        own = [tracklet for tracklet in tracklets if tracklet.person == person]
        used = [index for index, _ in clips]
        assert len({tracklets[index].camera for index in used}) == min(k, len({t.camera for t in own}))
        assert len(set(used)) == min(k, len(own))


@given(tracklets, st.integers(0, 9), st.integers(0, 9))
def test_seed_and_epoch_alone_decide_the_order(tracklets: list[Tracklet], seed: int, epoch: int) -> None:
    def order(before: int) -> list[list[Clip]]:
        sampler = PKSampler(tracklets, 1, 2, 8, seed)
        for earlier in range(before):
            sampler.set_epoch(earlier)
            list(sampler)
        np.random.seed(before)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0) == order(3)


def many(count: int = 12, length: int = 30) -> list[Tracklet]:
    return [Tracklet(person, camera, (PIXELS,) * length, "x") for person in range(count) for camera in (1, 2)]


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[list[Clip]]:
        sampler = PKSampler(many(), 4, 2, 8, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_an_epoch_gives_everyone_a_turn() -> None:
    seen = [many()[index].person for index, _ in chain(*PKSampler(many(), 4, 1, 8, seed=0))]
    assert sorted(seen) == list(range(12))


def test_more_batches_than_people_start_another_round() -> None:
    sampler = PKSampler(many(5), 2, 1, 8, seed=0, batches=7)
    batches = [[many(5)[index].person for index, _ in batch] for batch in sampler]
    assert len(batches) == len(sampler) == 7
    assert all(len(set(batch)) == 2 for batch in batches)
    assert len(set(chain(*batches))) == 5


def test_every_start_occurs_from_the_first_to_the_last() -> None:
    starts = {first for _, first in chain(*PKSampler(many(2, length=11), 2, 2, 8, seed=0, batches=100))}
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize("wrong", [{"people": 0}, {"clips": 0}, {"frames": 0}, {"seed": -1}])
def test_numbers_out_of_range_are_named(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(UserError, match=f"^{name}: got {wrong[name]}, wanted at least"):
        PKSampler(many(), **{"people": 2, "clips": 2, "frames": 8, "seed": 0, **wrong})


def test_too_few_people_say_how_many_there_are() -> None:
    with pytest.raises(UserError, match=r"got 10, wanted at most 3,"):
        PKSampler(many(3), 10, 2, 8, seed=0)
