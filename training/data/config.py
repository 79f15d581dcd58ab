"""Options of the data and of its batches; the defaults are the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from training.data import Dataset, PridPeople
from training.data.resizing import Resize
from training.runtime.fields import Config, Switch, check_count


@dataclass(frozen=True)
class DataConfig(Config):
    """The data.

    Raises:
        UserError: an option has no such value.
    """

    dataset: Dataset = "ilids-vid"
    """The dataset."""
    prid: PridPeople = "paper-21"
    """PRID-2011's people: of more than 21 frames by both cameras, or the 178 of at least 27 in the published splits."""


@dataclass(frozen=True)
class SourceConfig(Config):
    """Place of the data, and the way it is read.

    Raises:
        UserError: an option has no such value.
    """

    data_root: Path | None = None
    """The dataset's folder, or a file made of it by training.pack; only the synthetic one has a default."""
    check_counts: bool = True
    """Assert that iLIDS-VID, PRID-2011 and MARS hold as much as published."""
    resize: Resize = "device"
    """Resize frames on the device that computes, a batch at once, or by Pillow, as they are read."""


@dataclass(frozen=True)
class BatchConfig(Config):
    """Batches of P people with K clips of T frames.

    Raises:
        UserError: an option has no such value, or a number is out of range.
    """

    sampler: Literal["pk", "official"] = "pk"
    """The order of training: P people in turn with K clips each, or that of the authors' code, tracklets used up."""
    people: int = 10
    """P, distinct people per batch."""
    clips: int = 2
    """K, clips per person."""
    frames: int = 8
    """T, frames per clip."""
    strict_people: Switch = True
    """Raise an error where there are too few people for P, in place of a smaller P."""
    batches: int | None = None
    """Batches per epoch; None for as many as the sampler has before it begins anew."""

    def validate(self) -> None:
        check_count("people", self.people, 2)  # batch-hard mining compares people, and clips of one
        check_count("clips", self.clips, 2)
        check_count("frames", self.frames)
        check_count("batches", self.batches)
