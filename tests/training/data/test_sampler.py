from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config.presets import Recipe
from training.data.sampler import Clip, OfficialSampler, PKSampler
from training.data.tracklets import Tracklet
from training.engine.build import make_sampler
from training.runtime.errors import UserError
from training.runtime.fields import update

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


@pytest.mark.parametrize("kind", [PKSampler, OfficialSampler])
@given(tracklets=tracklets, seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_seed_and_epoch_alone_decide_the_order(
    kind: type[PKSampler], tracklets: list[Tracklet], seed: int, epoch: int
) -> None:
    def order(before: int) -> list[list[Clip]]:
        sampler = kind(tracklets, 1, 2, 1, seed)
        for earlier in range(before):
            sampler.set_epoch(earlier)
            list(sampler)
        np.random.seed(before)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0) == order(3)


def many(count: int = 12, length: int = 30) -> list[Tracklet]:
    return [Tracklet(person, camera, (PIXELS,) * length, "x") for person in range(count) for camera in (1, 2)]


@pytest.mark.parametrize("kind", [PKSampler, OfficialSampler])
def test_epochs_and_seeds_differ(kind: type[PKSampler]) -> None:
    def order(seed: int, epoch: int) -> list[list[Clip]]:
        sampler = kind(many(), 4, 2, 8, seed)
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


@pytest.mark.parametrize("kind", [PKSampler, OfficialSampler])
def test_every_start_occurs_from_the_first_to_the_last(kind: type[PKSampler]) -> None:
    starts = {first for _, first in chain(*kind(many(2, length=11), 2, 2, 8, seed=0, batches=100))}
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", [PKSampler, OfficialSampler])
@pytest.mark.parametrize(
    "wrong", [{"identities_per_batch": 0}, {"clips_per_identity": 0}, {"frames_per_clip": 0}, {"seed": -1}]
)
def test_numbers_out_of_range_are_named(kind: type[PKSampler], wrong: dict[str, int]) -> None:
    (name,) = wrong
    valid = {"identities_per_batch": 2, "clips_per_identity": 2, "frames_per_clip": 8, "seed": 0}
    with pytest.raises(UserError, match=f"^{name}: got {wrong[name]}, wanted at least"):
        kind(many(), **{**valid, **wrong})


def test_too_few_people_say_how_many_there_are() -> None:
    with pytest.raises(UserError, match=r"got 10, wanted at most 3,"):
        PKSampler(many(3), 10, 2, 8, seed=0)


def official_sets(
    tracklets: list[Tracklet], people: int, clips: int, frames: int = 1, epoch: int = 0
) -> list[list[list[int]]]:
    """Return an epoch's batches, each as its sets of K tracklets."""
    sampler = OfficialSampler(tracklets, people, clips, frames, seed=0)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    drawn = [[index for index, _ in batch] for batch in batches]
    return [[batch[start : start + clips] for start in range(0, len(batch), clips)] for batch in drawn]


@given(tracklets, st.data())
def test_an_official_batch_is_p_people_with_windows_of_t_frames(tracklets: list[Tracklet], data: st.DataObject) -> None:
    frames = data.draw(st.integers(1, 8))
    long = [tracklet for tracklet in tracklets if len(tracklet.frames) >= frames]
    p, k = data.draw(st.integers(1, max(people(long), 1))), data.draw(st.integers(1, 4))
    if not long:
        with pytest.raises(UserError, match="got 1, wanted at most 0, all there are to train on"):
            OfficialSampler(tracklets, p, k, frames, seed=0)
        return
    for batch in OfficialSampler(tracklets, p, k, frames, seed=0):
        owners = [tracklets[index].person for index, _ in batch]
        assert list(Counter(owners).values()) == [k] * p
        assert all(0 <= first <= len(tracklets[index].frames) - frames for index, first in batch)


@given(tracklets, st.integers(1, 4))
def test_official_sets_use_up_everybodys_tracklets_different_cameras_first(tracklets: list[Tracklet], k: int) -> None:
    left: dict[int, list[int]] = {}
    for index, tracklet in enumerate(tracklets):
        left.setdefault(tracklet.person, []).append(index)
    own = {person: set(indices) for person, indices in left.items()}
    # One identity per batch: no sets are left over. Sets are used from last to first.
    for (chosen,) in official_sets(tracklets, 1, k)[::-1]:
        person = tracklets[chosen[0]].person
        new, again = chosen[: len(left[person])], chosen[len(left[person]) :]
        assert len(set(new)) == len(new)
        assert set(new) <= set(left[person])
        assert set(again) <= own[person]
        cameras = {tracklets[index].camera for index in left[person]}
        assert len({tracklets[index].camera for index in new}) == min(k, len(cameras))
        left[person] = [index for index in left[person] if index not in new]
    assert not any(left.values())


@given(tracklets, st.data())
def test_an_official_epoch_ends_when_fewer_than_p_people_have_sets_left(
    tracklets: list[Tracklet], data: st.DataObject
) -> None:
    p, k = data.draw(st.integers(1, people(tracklets))), data.draw(st.integers(1, 3))
    sets = {person: -(-number // k) for person, number in Counter(t.person for t in tracklets).items()}
    for batch in official_sets(tracklets, p, k, epoch=data.draw(st.integers(0, 3))):
        assert sum(number > 0 for number in sets.values()) >= p
        for chosen in batch:
            sets[tracklets[chosen[0]].person] -= 1
    assert all(number >= 0 for number in sets.values())
    assert sum(number > 0 for number in sets.values()) < p


def test_official_epochs_differ_in_length_and_each_knows_its_own() -> None:
    uneven = [Tracklet(person, 1, (PIXELS,), "x") for person, number in enumerate((6, 3, 2, 1)) for _ in range(number)]
    sampler = OfficialSampler(uneven, 2, 1, 1, seed=0)
    lengths = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler))
        lengths.add(len(sampler))
    assert len(lengths) > 1


def test_a_number_of_batches_takes_as_many_passes_as_it_needs() -> None:
    sampler = OfficialSampler(many(5), 2, 2, 8, seed=0, batches=7)
    batches = [[many(5)[index].person for index, _ in batch] for batch in sampler]
    assert len(batches) == len(sampler) == 7
    # 5 identities of one set each: two batches per pass
    assert all(len(set(chain(*batches[start : start + 2]))) == 4 for start in (0, 2, 4))


def test_too_short_tracklets_are_left_out_and_too_few_people_say_so() -> None:
    short = [*many(3), *(Tracklet(person, 1, (PIXELS,) * 7, "x") for person in range(2, 9))]
    seen = {index for index, _ in chain(*OfficialSampler(short, 3, 3, 8, seed=0))}
    assert seen == set(range(6))
    with pytest.raises(UserError, match="got 4, wanted at most 3, all there are to train on with 8 frames"):
        OfficialSampler(short, 4, 2, 8, seed=0)


@pytest.mark.parametrize(("name", "kind"), [("pk", PKSampler), ("official", OfficialSampler)])
def test_the_recipe_chooses_the_sampler_and_its_numbers(recipe: Recipe, name: str, kind: type[PKSampler]) -> None:
    recipe = update(recipe, sampler=name, seed=5, batches=3)
    sampler = make_sampler(recipe, many())
    assert type(sampler) is kind
    assert list(sampler) == list(
        kind(many(), recipe.batch.people, recipe.batch.clips, recipe.batch.frames, seed=5, batches=3)
    )


@pytest.mark.parametrize("kind", [PKSampler, OfficialSampler])
@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_shards_of_processes_make_up_the_batches_and_nobody_is_in_two(kind: type[PKSampler], processes: int) -> None:
    whole = list(kind(many(), 6, 2, 8, seed=3))
    shards = []
    for rank in range(processes):
        sampler = kind(many(), 6, 2, 8, seed=3)
        sampler.shard(rank, processes)
        assert len(sampler) == len(whole)
        shards.append(list(sampler))
    for batch, parts in zip(whole, zip(*shards, strict=True), strict=True):
        assert list(chain(*parts)) == batch
        seen = [{many()[index].person for index, _ in part} for part in parts]
        assert [len(each) for each in seen] == [6 // processes] * processes
        assert len(set.union(*seen)) == 6


def test_people_that_cannot_be_sharded_are_named() -> None:
    with pytest.raises(UserError, match=r"people in a batch \(P\): got 6 for 4 processes, wanted a multiple of 4"):
        PKSampler(many(), 6, 2, 8, seed=0).shard(0, 4)
