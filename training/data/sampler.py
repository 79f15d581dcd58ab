"""The order of training: P people times K clips a batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import cycle, islice, zip_longest
from typing import TypeAlias

import numpy as np
from torch.utils.data import Sampler

from training.data.tracklets import Tracklet
from training.errors import UserError

Clip: TypeAlias = tuple[int, int]
"""Index of the tracklet, index of the clip's first frame in it."""


class PKSampler(Sampler[list[Clip]]):
    """Yield batches of `people` distinct people with `clips` clips each, grouped by person.

    A person's clips come from different cameras first, and from different tracklets before the same one twice. A clip
    starts anywhere that leaves room for `frames` frames; one of a shorter tracklet starts at its first frame. The
    order is a function of `seed` and the epoch alone.

    Args:
        tracklets: what is sampled from.
        people: P, people a batch.
        clips: K, clips a person.
        frames: T, contiguous frames a clip.
        seed: not negative.
        batches: batches an epoch; as many as P goes into the people there are if None.

    Raises:
        UserError: there are fewer than P people, or an argument is out of range.
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
        by_person: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, tracklet in enumerate(tracklets):
            by_person[tracklet.person][tracklet.camera].append(index)
        if len(by_person) < people:
            raise UserError(
                f"people in a batch (P): got {people}, wanted at most {len(by_person)}, all there are to train on"
            )
        # Plain dicts in sorted order: picklable, and independent of the order the tracklets came in.
        self._cameras = [list(dict(sorted(by_person[person].items())).values()) for person in sorted(by_person)]
        self._lengths = [len(tracklet.frames) for tracklet in tracklets]
        self._people, self._clips, self._frames, self._seed = people, clips, frames, seed
        self._batches = len(by_person) // people if batches is None else batches
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives, whatever came before."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[Clip]]:
        rng = np.random.default_rng((self._seed, self._epoch))
        waiting: list[int] = []
        for _ in range(self._batches):
            if len(waiting) < self._people:
                waiting = rng.permutation(len(self._cameras)).tolist()
            chosen, waiting = waiting[: self._people], waiting[self._people :]
            yield [
                (index, int(rng.integers(max(self._lengths[index] - self._frames, 0) + 1)))
                for person in chosen
                for index in self._tracklets_of(person, rng)
            ]

    def _tracklets_of(self, person: int, rng: np.random.Generator) -> Iterator[int]:
        """Deal one tracklet a camera, then a second one a camera, and so on; start over when all are used."""
        hands = [rng.permutation(camera).tolist() for camera in self._cameras[person]]
        rounds = zip_longest(*(hands[i] for i in rng.permutation(len(hands))))
        return islice(cycle([index for dealt in rounds for index in dealt if index is not None]), self._clips)
