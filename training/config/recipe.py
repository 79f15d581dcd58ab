"""What a training run consists of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from training.data import Dataset
from training.runtime.errors import UserError

MOST = 10**9  # of anything that is counted
_NAMES = {bool: "True or False", int: "an integer", float: "a number", str: "a text", int | None: "an integer or None"}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run, but for the data's place and the machine.

    Where the paper and its authors' code differ, each difference is a field of its own, to be switched alone.

    Raises:
        UserError: a number is out of range, or the parts do not go together.
    """

    name: str
    # Whose values the fields below start from, the paper's or its authors' code's: a result shows it.
    preset: Literal["paper", "official"]
    dataset: Dataset
    # The people of PRID-2011; other datasets do not ask. "paper-21": seen for more than 21 frames by both cameras.
    # "official-27": at least 27 frames in both cameras, the 178 people of the published splits.
    prid: Literal["paper-21", "official-27"]
    backbone: Literal["inception_v3", "tiny"]
    weights: str  # "imagenet", "random", or a file
    # What the auxiliary classifier of Inception-v3 judges; the tiny backbone has none, and asks neither this nor the
    # weight. "frames": the Mixed_6e maps of each frame, as torchvision's own. "clip": their mean over a clip's frames.
    auxiliary: Literal["frames", "clip"]
    auxiliary_weight: float  # of its cross-entropy in the loss, where that of the identity is 1
    rru: Literal["none", "both", "spatial", "channel"]  # its attention
    rru_inputs: Literal["appearance+motion", "appearance", "raw"]
    # Consecutive groups of clips with batch statistics of their own, in every batch norm of the network: 1 for plain
    # batch norm, G for G replicas under DataParallel.
    bn_groups: int
    head: Literal["baseline", "lstm", "stim"]
    head_width: int  # channels of an LSTM or STIM feature
    # "paper": FC, BN, ReLU, dropout 0.5, FC. "official": LeakyReLU 0.1 in it, and the BN's weight from N(1, 0.02).
    classifier: Literal["paper", "official"]
    classifier_width: int
    video_loss: bool  # L_v
    part_loss: bool  # L_p
    margin: float  # of both triplet losses
    # "pk": everybody in turn, with K clips drawn anew each time. "official": a person's tracklets without replacement,
    # and people until fewer than P have any left; epochs differ in length.
    sampler: Literal["pk", "official"]
    people: int  # P, distinct people a batch
    clips: int  # K, clips a person
    frames: int  # T, frames a clip
    strict_people: bool  # too few people for P is an error, not a smaller P
    batches: int | None  # an epoch; None: as many as the sampler has before it begins anew
    epochs: int
    learning_rate: float  # never decays
    learning_rate_pretrained: float  # of layers that come out of a weights file
    weight_decay: float  # on every parameter, norms and biases too
    eval_every: int | None  # epochs; None: before and after training only
    eval_from: int  # the first epoch that eval_every counts from; 0: from the beginning
    seed: int
    compare_ops: bool  # end by timing a step with the fast operators against the reference ones

    def __post_init__(self) -> None:
        for field, kind in get_type_hints(Recipe).items():
            value = getattr(self, field)
            if get_origin(kind) is Literal:
                if value not in get_args(kind):
                    raise UserError(f"{field}: got {value!r}, wanted one of {', '.join(get_args(kind))}")
            elif not _is_a(value, kind):
                raise UserError(f"{field}: got {value!r}, wanted {_NAMES[kind]}")
        least = {"people": 2, "clips": 2, "eval_from": 0}  # batch-hard mining compares people, and clips of one
        for field in ("people", "clips", "frames", "batches", "epochs", "eval_every", "eval_from", "bn_groups"):
            value = getattr(self, field)
            if value is not None and value < least.get(field, 1):
                raise UserError(f"{field}: got {value}, wanted at least {least.get(field, 1)}")
            if value is not None and value > MOST:
                raise UserError(f"{field}: got {value}, wanted at most {MOST}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed: got {self.seed}, wanted 0 to {2**32 - 1}")
        if not 0 <= self.auxiliary_weight < math.inf:
            raise UserError(f"auxiliary_weight: got {self.auxiliary_weight}, wanted a number, at least 0")
        if self.part_loss and self.rru == "none":
            raise UserError("part_loss: got True with rru='none', wanted an RRU: the strips come out of it")
        clips = self.people * self.clips
        if clips % self.bn_groups:
            raise UserError(f"bn_groups: got {self.bn_groups}, which does not divide {clips} clips")
        if clips == self.bn_groups:
            raise UserError(
                f"bn_groups: got {self.bn_groups} for {clips} clips, wanted at least 2 clips a group: "
                "the classifier's batch norm has no statistics of one"
            )

    def tested_after(self, epoch: int) -> bool:
        """Whether the network is tested after so many epochs; before training (0) and at its end it always is."""
        since = epoch - self.eval_from
        between = self.eval_every is not None and since >= 0 and since % self.eval_every == 0
        return between or epoch in (0, self.epochs)


def _is_a(value: object, kind: Any) -> bool:
    """Whether a value is of a field's type; an integer is a number too, and a truth value is neither."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)
