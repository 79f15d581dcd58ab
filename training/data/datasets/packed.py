"""Reader of packed datasets: a split as the dataset's own reader makes it of the folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from training.data.pack_file import PARTS, Pack, PackedFrames
from training.data.tracklets import Split, Tracklet
from training.runtime.errors import NoSuchSplit, UserError


def load(path: Path, dataset: str, split: int, asked: dict[str, Any]) -> Split:
    """Read one split; no frame is looked at.

    Args:
        path: the file.
        dataset: the one that is wanted of it.
        split: which split, from 0.
        asked: the options that the dataset's reader takes.

    Raises:
        UserError: the file is not a whole packed dataset, or holds another dataset, split or people.
    """
    pack = Pack(path)
    about = pack.about
    if about["dataset"] != dataset:
        raise UserError(f"dataset: got {dataset!r}, but {path} holds {about['dataset']!r}")
    if about["read"].get("prid") != asked.get("prid"):
        raise UserError(f"prid: got {asked['prid']!r}, but {path} holds {about['read']['prid']!r}")
    if asked.get("check_counts") and not about["read"]["check_counts"]:
        raise UserError(
            f"{path}: packed with --no-check-counts; read it with --no-check-counts too, or pack the whole dataset"
        )
    if str(split) not in about["splits"]:
        raise NoSuchSplit(f"split: got {split}, wanted one of {', '.join(about['splits'])}, which {path} holds")

    @cache  # a query of the gallery is the very same object
    def read(number: int) -> Tracklet:
        frames = PackedFrames(pack, range(*pack.arrays["starts"][number : number + 2].tolist()))
        person, camera = int(pack.arrays["people"][number]), int(pack.arrays["cameras"][number])
        return Tracklet(person, camera, frames, about["names"][number])

    train, query, gallery = (tuple(map(read, pack.arrays[f"{split}.{part}"].tolist())) for part in PARTS)
    texts = about["splits"][str(split)]
    names = {int(person): name for person, name in texts["names"].items()} if "names" in texts else None
    return Split(train, query, gallery, texts["protocol"], texts["description"], names)
