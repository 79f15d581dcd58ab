"""What a training run consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from training.data import Dataset, PridPeople
from training.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run, but for the data's place and the machine.

    Raises:
        UserError: a number is out of range, or the parts do not go together.
    """

    name: str
    dataset: Dataset
    backbone: Literal["inception_v3", "tiny"]
    weights: str  # "imagenet", "random", or a file
    rru: Literal["none", "both", "spatial", "channel"]  # its attention
    rru_inputs: Literal["appearance+motion", "appearance", "raw"]
    bn_groups: int  # groups of clips with batch statistics of their own in the RRU
    head: Literal["baseline", "lstm", "stim"]
    head_width: int  # channels of an LSTM or STIM feature
    classifier_width: int
    video_loss: bool  # L_v
    part_loss: bool  # L_p
    margin: float  # of both triplet losses
    people: int  # P, distinct people a batch
    clips: int  # K, clips a person
    frames: int  # T, frames a clip
    strict_people: bool  # too few people for P is an error, not a smaller P
    batches: int | None  # an epoch; None: as many as the people allow without meeting one twice
    epochs: int
    learning_rate: float
    learning_rate_pretrained: float  # of layers that come out of a weights file
    weight_decay: float
    eval_every: int | None  # epochs; None: before and after training only
    eval_from: int  # the first epoch after which eval_every counts
    prid: PridPeople  # which of PRID-2011's people
    seed: int
    compare_ops: bool  # end by timing a step with the fast operators against the reference ones

    def __post_init__(self) -> None:
        for field, kind in get_type_hints(Recipe).items():
            value = getattr(self, field)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise UserError(f"{field}: got {value!r}, wanted one of {', '.join(get_args(kind))}")
        for field in ("people", "clips", "frames", "batches", "epochs", "eval_every", "bn_groups"):
            least = 2 if field in ("people", "clips") else 1  # batch-hard mining compares people, and clips of one
            value = getattr(self, field)
            if value is not None and value < least:
                raise UserError(f"{field}: got {value}, wanted at least {least}")
        if self.eval_from < 0:
            raise UserError(f"eval_from: got {self.eval_from}, wanted 0 or more")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed: got {self.seed}, wanted 0 to {2**32 - 1}")
        if self.part_loss and self.rru == "none":
            raise UserError("part_loss: got True with rru='none', wanted an RRU: the strips come out of it")
        if self.people * self.clips % self.bn_groups:
            raise UserError(f"bn_groups: got {self.bn_groups}, which does not divide {self.people * self.clips} clips")
