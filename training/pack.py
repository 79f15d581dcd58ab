"""Put a dataset into one file: `python -m training.pack --dataset mars --data-root DIR --output mars.pack`."""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("train")

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import tyro
from PIL import Image

from training.data import Dataset, PridPeople, is_packed, load_split, reader_options
from training.data.pack_file import PARTS, NotAPack, Pack, PackedFrame, to_ppm, write_pack
from training.data.tracklets import Split, Tracklet, decode, encoded
from training.runtime.atomic_files import fsync_path, temp_path
from training.runtime.command import run_command
from training.runtime.errors import NoSuchSplit, UserError
from training.runtime.terminal import say, track

Source: TypeAlias = "Path | np.ndarray"


@dataclass
class Options:
    """Put a dataset into one file, to be given as the data root in the place of its folder."""

    dataset: Dataset
    """The dataset."""
    output: Path
    """The file. One that is there is checked and left, or made again if it is of other options, or damaged."""
    data_root: Path | None = None
    """The dataset's folder; only the synthetic one has a default."""
    splits: tuple[int, ...] | None = None
    """Indices of its splits; all, if not given. A frame of several is stored once."""
    prid: PridPeople = "paper-21"
    """PRID-2011's people, as in training.train."""
    check_counts: bool = True
    """Require the published counts of iLIDS-VID, PRID-2011 and MARS."""
    pixels: bool = False
    """Store decoded frames (PPM): more room on the disk, and training decodes nothing."""


class _Content(NamedTuple):
    """Content of a pack to be: distinct frames, and the arrays and texts of its index."""

    sources: list[Source]
    arrays: dict[str, np.ndarray]
    about: dict[str, Any]


def pack(options: Options) -> None:
    """Make the file, unless it is there.

    Raises:
        UserError: the dataset cannot be read, a frame is no image, or the file cannot be written or is something else.
    """
    content = _read(options)
    output = options.output
    size = f"{len(content.sources)} frames of {len(content.about['names'])} tracklets"
    if output.exists():
        difference = _difference(output, content)
        if difference is None:
            say(f"{output}: {size}, each checked; left as it is")
            return
        say(f"{output}: {difference}; made again")
    try:
        _write(output, content)
    except OSError as error:
        raise UserError(f"output: {output} cannot be written ({error})") from None
    say(f"{output}: {size}, {output.stat().st_size / 2**20:.1f} MiB")


def _read(options: Options) -> _Content:
    """Read the splits, and number their distinct frames and tracklets in the order in which they come."""
    if options.data_root is not None and is_packed(options.dataset, options.data_root):
        raise UserError(f"data_root: got the file {options.data_root}, wanted a dataset's folder")
    chosen = {"prid": options.prid, "check_counts": options.check_counts}
    sources: list[Source] = []
    frame_numbers: dict[Any, int] = {}
    tracklet_numbers: dict[tuple[int, int, str, tuple[int, ...]], int] = {}

    def frame_number(frame: Any) -> int:
        # Arrays of one split are not those of another read, though they hold the same.
        key = (frame.shape, sha256(frame.tobytes()).digest()) if isinstance(frame, np.ndarray) else frame
        if key not in frame_numbers:
            frame_numbers[key] = len(sources)
            sources.append(frame)
        return frame_numbers[key]

    def tracklet_number(tracklet: Tracklet) -> int:
        key = (tracklet.person, tracklet.camera, tracklet.name, tuple(map(frame_number, tracklet.frames)))
        return tracklet_numbers.setdefault(key, len(tracklet_numbers))

    arrays: dict[str, np.ndarray] = {}
    splits: dict[str, dict[str, Any]] = {}
    for number, split in _splits(options, chosen):
        splits[str(number)] = {"protocol": split.protocol, "description": split.description}
        if split.names:
            splits[str(number)]["names"] = {str(person): name for person, name in split.names.items()}
        for part, tracklets in zip(PARTS, (split.train, split.query, split.gallery), strict=True):
            arrays[f"{number}.{part}"] = np.array(list(map(tracklet_number, tracklets)), np.uint32)
    arrays |= {
        "frames": np.fromiter(chain.from_iterable(frames for *_, frames in tracklet_numbers), np.uint32),
        "starts": np.cumsum([0, *(len(frames) for *_, frames in tracklet_numbers)], dtype=np.uint64),
        "people": np.array([person for person, *_ in tracklet_numbers], np.int64),
        "cameras": np.array([camera for _, camera, *_ in tracklet_numbers], np.int64),
    }
    about = {
        "dataset": options.dataset,
        "read": reader_options(options.dataset, **chosen),
        "pixels": options.pixels,
        "names": [name for _, _, name, _ in tracklet_numbers],
        "splits": splits,
    }
    return _Content(sources, arrays, about)


def _splits(options: Options, chosen: dict[str, Any]) -> Iterator[tuple[int, Split]]:
    for number in count() if options.splits is None else dict.fromkeys(options.splits):
        try:
            yield number, load_split(options.dataset, options.data_root, number, **chosen)
        except NoSuchSplit:
            if options.splits is not None:
                raise
            return


def _difference(path: Path, content: _Content) -> str | None:
    """Describe one difference between a file and the one that would be made now; raise unless it is a pack."""
    foreign = UserError(f"output: {path} is something else than a packed dataset; wanted a new file")
    if not path.is_file():
        raise foreign
    try:
        made = Pack(path)
    except NotAPack:
        raise foreign from None
    except UserError as error:
        return str(error).removeprefix(f"{path}: ").partition(";")[0]
    was, now = (
        {**about, **about["read"], "splits": ", ".join(about["splits"])} for about in (made.about, content.about)
    )
    for name in ("dataset", "pixels", *made.about["read"], "splits"):
        if was.get(name) != now.get(name):
            return f"made with {name} {was.get(name)!r}, not {now.get(name)!r}"
    if made.about["splits"] != content.about["splits"]:
        return f"made of {next(iter(made.about['splits'].values()))['description']}"
    if was != now or any(not np.array_equal(made.arrays[name], array) for name, array in content.arrays.items()):
        return "made of other tracklets"
    for number, source in enumerate(track(content.sources, "Checking frames", len(content.sources))):
        frame = PackedFrame(made, number)
        try:
            image_file = frame.encoded()
        except UserError as error:
            return str(error).partition(";")[0]
        if image_file != _image_file(source, made.has_pixels):
            return f"frame {frame} is another"
    return None


def _write(path: Path, content: _Content) -> None:
    """Put the file in its place in one step, whole and on the disk."""
    new = temp_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new.unlink(missing_ok=True)  # left by a kill
    try:
        with new.open("xb") as file:
            write_pack(file, _image_files(content), content.arrays, content.about)
            ours = os.fstat(file.fileno())
    except BaseException:
        new.unlink(missing_ok=True)  # it may be many GB
        raise
    if not new.exists() or not os.path.samestat(ours, new.stat()):
        raise UserError(f"output: {path} is being made by another process too; wanted one at a time")
    new.replace(path)
    fsync_path(path.parent)


def _image_files(content: _Content) -> Iterator[bytes]:
    """Yield all frames to be written, each checked to be an image."""
    pixels = content.about["pixels"]
    for source in track(content.sources, "Packing frames", len(content.sources)):
        image_file = _image_file(source, pixels)
        if isinstance(source, Path) and not pixels:
            decode(image_file, source)
        yield image_file


def _image_file(source: Source, pixels: bool) -> bytes:
    """Return a frame as PPM if its pixels are wanted, else as its own file, or as PNG if it is an array."""
    if isinstance(source, Path) and not pixels:
        return encoded(source)
    frame = decode(encoded(source), source) if isinstance(source, Path) else source
    if pixels:
        return to_ppm(frame)
    png = BytesIO()
    Image.fromarray(frame).save(png, "PNG", compress_level=6)
    return png.getvalue()


if __name__ == "__main__":
    run_command(lambda: pack(tyro.cli(Options, prog="python -m training.pack")))
