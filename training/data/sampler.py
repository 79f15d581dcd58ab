"""Samplers of P identities with K clips each per batch: identities in turn, or as in the paper authors' code."""

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
"""Index of the tracklet, and index of the clip's first frame in it."""


class IdentitySampler(Sampler[list[Clip]], ABC):
    """Base of the samplers: batches of P identities with K clips each, a function of `seed` and the epoch alone.

    Args:
        tracklets: the tracklets to sample from.
        identities_per_batch: P.
        clips_per_identity: K.
        frames_per_clip: T, contiguous frames.
        seed: not negative.
        batches: batches per epoch; `None` for the sampler's own number.

    Raises:
        UserError: fewer than P identities have a long enough tracklet, or an argument is out of range.
    """

    def __init__(
        self,
        tracklets: Sequence[Tracklet],
        identities_per_batch: int,
        clips_per_identity: int,
        frames_per_clip: int,
        seed: int,
        batches: int | None = None,
    ) -> None:
        self._p, self._k, self._t, self._batches = identities_per_batch, clips_per_identity, frames_per_clip, batches
        limits = (
            ("identities_per_batch", identities_per_batch, 1),
            ("clips_per_identity", clips_per_identity, 1),
            ("frames_per_clip", frames_per_clip, 1),
            ("seed", seed, 0),
        )
        for name, value, least in limits:
            if value < least:
                raise UserError(f"{name}: got {value}, wanted at least {least}")
        min_frames = self._min_frames(frames_per_clip)
        by_person: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, tracklet in enumerate(tracklets):
            if len(tracklet.frames) >= min_frames:
                by_person[tracklet.person][tracklet.camera].append(index)
        if len(by_person) < self._p:
            raise UserError(
                f"people in a batch (P): got {self._p}, wanted at most {len(by_person)}, all there are to train on"
                + f" with {min_frames} frames in a tracklet" * (min_frames > 1)
            )
        # By identity, then camera, in sorted order: independent of the order of `tracklets`. Lists can be pickled.
        self._cameras = [list(dict(sorted(by_person[person].items())).values()) for person in sorted(by_person)]
        self._lengths = [len(tracklet.frames) for tracklet in tracklets]
        self._seed, self._shard = seed, slice(None)
        self.set_epoch(0)

    def _min_frames(self, frames_per_clip: int) -> int:
        """Return the length below which tracklets are left out."""
        return 1

    def shard(self, rank: int, world_size: int) -> None:
        """Restrict every batch to the identities of one of several processes.

        The batches are the same for any number of processes; each process gets an equal number of identities per
        batch, and no identity of a batch goes to two of them.

        Raises:
            UserError: P is not a multiple of `world_size`.
        """
        if self._p % world_size:
            raise UserError(
                f"people in a batch (P): got {self._p} for {world_size} processes, wanted a multiple of {world_size}"
            )
        clips = self._p // world_size * self._k
        self._shard = slice(rank * clips, (rank + 1) * clips)

    @property
    def clips_per_batch(self) -> int:
        """Clips of a batch, or of this process's shard of it."""
        return len(range(self._p * self._k)[self._shard])

    def __iter__(self) -> Iterator[list[Clip]]:
        """Iterate over the epoch's batches, or this process's shard of each."""
        return (batch[self._shard] for batch in self._global_batches())

    @abstractmethod
    def __len__(self) -> int:
        """Batches of the epoch."""

    @abstractmethod
    def _global_batches(self) -> Iterator[list[Clip]]:
        """Iterate over the epoch's batches of all processes."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; its batches do not depend on earlier ones."""
        self._epoch = epoch

    def _generator(self) -> np.random.Generator:
        return np.random.default_rng((self._seed, self._epoch))

    def _sample_clip(self, index: int, rng: np.random.Generator) -> Clip:
        """Sample a clip of a tracklet, uniform over the starts that leave T frames; a shorter tracklet starts at 0."""
        return index, int(rng.integers(max(self._lengths[index] - self._t, 0) + 1))


class PKSampler(IdentitySampler):
    """Yield batches of P distinct identities with K clips each, grouped by identity; identities take turns.

    An identity's clips come from different cameras first, and from different tracklets before the same one twice. A
    clip starts anywhere that leaves room for T frames; a clip of a shorter tracklet starts at its first frame.

    With `batches` None an epoch has N // P batches, where there are N identities.
    """

    def __len__(self) -> int:
        """Batches of every epoch."""
        return len(self._cameras) // self._p if self._batches is None else self._batches

    def _global_batches(self) -> Iterator[list[Clip]]:
        rng = self._generator()
        waiting: list[int] = []
        for _ in range(len(self)):
            if len(waiting) < self._p:
                waiting = rng.permutation(len(self._cameras)).tolist()
            chosen, waiting = waiting[: self._p], waiting[self._p :]
            yield [self._sample_clip(index, rng) for person in chosen for index in self._tracklets_of(person, rng)]

    def _tracklets_of(self, person: int, rng: np.random.Generator) -> Iterator[int]:
        """Choose K tracklets: one per camera, then a second one per camera, and so on; start over when all are used."""
        cameras = [rng.permutation(camera).tolist() for camera in self._cameras[person]]
        rounds = zip_longest(*(cameras[i] for i in rng.permutation(len(cameras))))
        return islice(cycle([index for turn in rounds for index in turn if index is not None]), self._k)


class OfficialSampler(IdentitySampler):
    """Yield batches of P identities with K clips each as in the authors' code, which samples without replacement.

    Each pass groups the tracklets of every identity into sets of K, without replacement: a set takes one tracklet from
    each camera that has any left, the cameras in random order, then a second one, until it has K. A last set that the
    identity's tracklets do not fill is filled by sampling among all of its tracklets again. A batch takes one set each
    of P identities, sampled from those with sets left; the pass ends when fewer than P identities have any. So epochs
    may differ in length.

    A clip is a contiguous window of T frames at a random start; tracklets with fewer frames are left out.

    With `batches` None an epoch is one pass; otherwise it is as many passes as the batches need.
    """

    def _min_frames(self, frames_per_clip: int) -> int:
        return frames_per_clip

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, and sample its batches, which do not depend on earlier ones."""
        super().set_epoch(epoch)
        rng = self._generator()
        passes = repeat(rng, 1) if self._batches is None else repeat(rng)
        self._order = list(islice(chain.from_iterable(map(self._sample_pass, passes)), self._batches))

    def __len__(self) -> int:
        """Batches of the chosen epoch."""
        return len(self._order)

    def _global_batches(self) -> Iterator[list[Clip]]:
        return iter(self._order)

    def _sample_pass(self, rng: np.random.Generator) -> Iterator[list[Clip]]:
        """Yield the batches of one pass."""
        left = {person: list(self._sets_of(person, rng)) for person in range(len(self._cameras))}
        while len(left) >= self._p:
            chosen = rng.choice(list(left), self._p, replace=False).tolist()
            yield [self._sample_clip(index, rng) for person in chosen for index in left[person].pop()]
            left = {person: sets for person, sets in left.items() if sets}

    def _sets_of(self, person: int, rng: np.random.Generator) -> Iterator[list[int]]:
        """Group an identity's tracklets into sets of K."""
        cameras = self._cameras[person]
        unused = [rng.permutation(camera).tolist() for camera in cameras]
        while unused:
            chosen: list[int] = []
            while unused and len(chosen) < self._k:
                turns = rng.permutation(len(unused))[: self._k - len(chosen)]
                chosen += [unused[turn].pop() for turn in turns]
                unused = [camera for camera in unused if camera]
            missing = self._k - len(chosen)
            yield chosen + rng.choice(list(chain(*cameras)), missing).tolist()
