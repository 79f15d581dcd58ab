"""The order of training: P people times K clips a batch, everybody in turn or as the paper's authors did."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, cycle, islice, repeat, zip_longest
from typing import TypeAlias

import numpy as np
from torch.utils.data import Sampler

from training.data.tracklets import Tracklet
from training.runtime.errors import UserError

Clip: TypeAlias = tuple[int, int]
"""Index of the tracklet, index of the clip's first frame in it."""


class PeopleSampler(Sampler[list[Clip]], ABC):
    """What the samplers share: batches of P people with K clips each, a function of `seed` and the epoch alone.

    Args:
        tracklets: what is sampled from.
        people: P, people a batch.
        clips: K, clips a person.
        frames: T, contiguous frames a clip.
        seed: not negative.
        batches: batches an epoch; `None` for what the sampler says.

    Raises:
        UserError: there are fewer than P people with a tracklet long enough, or an argument is out of range.
    """

    def __init__(
        self,
        tracklets: Sequence[Tracklet],
        people: int,
        clips: int,
        frames: int,
        seed: int,
        batches: int | None = None,
    ) -> None:
        limits = (("people", people, 1), ("clips", clips, 1), ("frames", frames, 1), ("seed", seed, 0))
        for name, value, least in limits:
            if value < least:
                raise UserError(f"{name}: got {value}, wanted at least {least}")
        shortest = self._shortest(frames)
        by_person: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, tracklet in enumerate(tracklets):
            if len(tracklet.frames) >= shortest:
                by_person[tracklet.person][tracklet.camera].append(index)
        if len(by_person) < people:
            raise UserError(
                f"people in a batch (P): got {people}, wanted at most {len(by_person)}, all there are to train on"
                + f" with {shortest} frames in a tracklet" * (shortest > 1)
            )
        # Plain dicts in sorted order: picklable, and independent of the order the tracklets came in.
        self._cameras = [list(dict(sorted(by_person[person].items())).values()) for person in sorted(by_person)]
        self._lengths = [len(tracklet.frames) for tracklet in tracklets]
        self._people, self._clips, self._frames, self._batches = people, clips, frames, batches
        self._seed, self._mine = seed, slice(None)
        self.set_epoch(0)

    def _shortest(self, frames: int) -> int:
        """The frames that a tracklet must have not to be left out, where a clip has T."""
        return 1

    def deal_out(self, rank: int, processes: int) -> None:
        """Give of every batch, from now on, only the people who fall to one of several processes.

        The batches are the same for any number of processes; each gets as many of their people, and none another's.

        Raises:
            UserError: P people cannot be dealt out so.
        """
        if self._people % processes:
            raise UserError(
                f"people in a batch (P): got {self._people} for {processes} processes, wanted a multiple of {processes}"
            )
        share = self._people // processes * self._clips
        self._mine = slice(rank * share, (rank + 1) * share)

    @property
    def clips_per_batch(self) -> int:
        """Clips of a batch, or of this process's share of it."""
        return len(range(self._people * self._clips)[self._mine])

    def __iter__(self) -> Iterator[list[Clip]]:
        """The epoch's batches, or this process's share of each."""
        return (batch[self._mine] for batch in self._batches_of_all())

    @abstractmethod
    def __len__(self) -> int:
        """Batches of the epoch."""

    @abstractmethod
    def _batches_of_all(self) -> Iterator[list[Clip]]:
        """The epoch's batches."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives, whatever came before."""
        self._epoch = epoch

    def _generator(self) -> np.random.Generator:
        return np.random.default_rng((self._seed, self._epoch))

    def _clip(self, index: int, rng: np.random.Generator) -> Clip:
        """A clip of a tracklet: it starts anywhere that leaves room for T frames, or else at the first frame."""
        return index, int(rng.integers(max(self._lengths[index] - self._frames, 0) + 1))


class PKSampler(PeopleSampler):
    """Yield batches of `people` distinct people with `clips` clips each, grouped by person; everybody in turn.

    A person's clips come from different cameras first, and from different tracklets before the same one twice. A clip
    starts anywhere that leaves room for `frames` frames; one of a shorter tracklet starts at its first frame. The
    order is a function of `seed` and the epoch alone.

    With `batches` None an epoch has as many as P goes into the people there are.
    """

    def __len__(self) -> int:
        """The batches of every epoch."""
        return len(self._cameras) // self._people if self._batches is None else self._batches

    def _batches_of_all(self) -> Iterator[list[Clip]]:
        rng = self._generator()
        waiting: list[int] = []
        for _ in range(len(self)):
            if len(waiting) < self._people:
                waiting = rng.permutation(len(self._cameras)).tolist()
            chosen, waiting = waiting[: self._people], waiting[self._people :]
            yield [self._clip(index, rng) for person in chosen for index in self._tracklets_of(person, rng)]

    def _tracklets_of(self, person: int, rng: np.random.Generator) -> Iterator[int]:
        """Deal one tracklet a camera, then a second one a camera, and so on; start over when all are used."""
        hands = [rng.permutation(camera).tolist() for camera in self._cameras[person]]
        rounds = zip_longest(*(hands[i] for i in rng.permutation(len(hands))))
        return islice(cycle([index for dealt in rounds for index in dealt if index is not None]), self._clips)


class OfficialSampler(PeopleSampler):
    """Yield batches of `people` people with `clips` clips each as the authors' code does: tracklets are used up.

    Each epoch deals everybody's tracklets into sets of K, without replacement: a set takes one tracklet from each
    camera that has any left, the cameras in random order, then a second one, until it has K. A last set that the
    person's tracklets do not fill is filled up by drawing among all of that person's again. A batch takes one set
    each of P people, drawn at random from those with sets left; the epoch ends when fewer than P people have any. So
    epochs may differ in length.

    A clip is a contiguous window of `frames` frames at a random place; a tracklet too short for one is left out.

    With `batches` None an epoch is one deal; else everything is dealt anew as often as that many take.
    """

    def _shortest(self, frames: int) -> int:
        return frames

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives, whatever came before, and deal it."""
        super().set_epoch(epoch)
        rng = self._generator()
        deals = repeat(rng, 1) if self._batches is None else repeat(rng)
        self._order = list(islice(chain.from_iterable(map(self._deal, deals)), self._batches))

    def __len__(self) -> int:
        """The batches of the epoch chosen."""
        return len(self._order)

    def _batches_of_all(self) -> Iterator[list[Clip]]:
        return iter(self._order)

    def _deal(self, rng: np.random.Generator) -> Iterator[list[Clip]]:
        """The batches of one deal."""
        left = {person: list(self._sets_of(person, rng)) for person in range(len(self._cameras))}
        while len(left) >= self._people:
            chosen = rng.choice(list(left), self._people, replace=False).tolist()
            yield [self._clip(index, rng) for person in chosen for index in left[person].pop()]
            left = {person: sets for person, sets in left.items() if sets}

    def _sets_of(self, person: int, rng: np.random.Generator) -> Iterator[list[int]]:
        """A person's tracklets in sets of K."""
        cameras = self._cameras[person]
        hands = [rng.permutation(camera).tolist() for camera in cameras]
        while hands:
            dealt: list[int] = []
            while hands and len(dealt) < self._clips:
                turns = rng.permutation(len(hands))[: self._clips - len(dealt)]
                dealt += [hands[turn].pop() for turn in turns]
                hands = [hand for hand in hands if hand]
            missing = self._clips - len(dealt)
            yield dealt + rng.choice(list(chain(*cameras)), missing).tolist()
