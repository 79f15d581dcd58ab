"""Put a dataset into one file: `python -m training.pack --dataset mars --data-root DIR --output mars.pack`."""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("train")

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import safetensors.numpy
import tyro
from PIL import Image

from training.data import Dataset, PridPeople, load_split, reader_options
from training.data.pack_file import CHECKSUM, HEADER, MAGIC, PARTS, Pack
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
    """What to pack."""
    output: Path
    """The file. One that is there is checked and left, or made again if it is of other options, or damaged."""
    data_root: Path | None = None
    """The dataset's folder; only the synthetic one has a default."""
    splits: tuple[int, ...] | None = None
    """Which of its splits, from 0; all, if not given. A frame of several is kept once."""
    prid: PridPeople = "paper-21"
    """Which of PRID-2011's people."""
    check_counts: bool = True
    """Whether iLIDS-VID, PRID-2011 and MARS must hold as much as published."""
    pixels: bool = False
    """Whether frames are decoded once, here, and kept as pixels (PPM): more room on the disk, less work in training."""


@dataclass
class _Content:
    """What is to be in a pack: distinct frames, and the arrays of its index that tell of tracklets and splits.

    pixels: whether each frame is to be kept as its pixels, not as the image file it was.
    """

    pixels: bool
    sources: list[Source] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def pack(options: Options) -> None:
    """Make the file, unless it is there.

    Raises:
        UserError: the dataset cannot be read, a frame is no image, or the file cannot be written or is something else.
    """
    content = _read(options)
    output = options.output
    size = f"{len(content.sources)} frames of {len(content.about['names'])} tracklets"
    if output.exists():
        why = _differs(output, content)
        if why is None:
            say(f"{output}: {size}, each checked; left as it is")
            return
        say(f"{output}: {why}; made again")
    try:
        _write(output, content)
    except OSError as error:
        raise UserError(f"output: {output} cannot be written ({error})") from None
    say(f"{output}: {size}, {output.stat().st_size / 2**20:.1f} MiB")


def _read(options: Options) -> _Content:
    """Read the splits, and number their distinct frames and tracklets in the order in which they come."""
    if options.data_root is not None and options.data_root.is_file():
        raise UserError(f"data_root: got the file {options.data_root}, wanted a dataset's folder")
    chosen = {"prid": options.prid, "check_counts": options.check_counts}
    numbers: dict[Any, int] = {}  # by what tells a frame from others
    tracklets: dict[Any, int] = {}
    frames: list[int] = []
    starts, people, cameras, names = [0], [], [], []
    content = _Content(options.pixels)

    def number_of(frame: Any) -> int:
        # Arrays of one split are not those of another read, though they hold the same.
        key = (frame.shape, sha256(frame.tobytes()).digest()) if isinstance(frame, np.ndarray) else frame
        if key not in numbers:
            numbers[key] = len(numbers)
            content.sources.append(frame)
        return numbers[key]

    def add(tracklet: Tracklet) -> int:
        own = tuple(map(number_of, tracklet.frames))
        key = (tracklet.person, tracklet.camera, tracklet.name, own)
        if key not in tracklets:
            tracklets[key] = len(tracklets)
            frames.extend(own)
            starts.append(len(frames))
            people.append(tracklet.person)
            cameras.append(tracklet.camera)
            names.append(tracklet.name)
        return tracklets[key]

    splits = {}
    for number, split in _splits(options, chosen):
        splits[str(number)] = {"protocol": split.protocol, "description": split.description}
        for part, of_part in zip(PARTS, (split.train, split.query, split.gallery), strict=True):
            rows = [add(tracklet) for tracklet in of_part]
            content.arrays[f"{number}.{part}"] = np.array(rows, np.uint32)
    content.arrays |= {
        "frames": np.array(frames, np.uint32),
        "starts": np.array(starts, np.uint64),
        "people": np.array(people, np.int64),
        "cameras": np.array(cameras, np.int64),
    }
    content.about = {
        "dataset": options.dataset,
        "read": reader_options(options.dataset, **chosen),
        "pixels": options.pixels,
        "names": names,
        "splits": splits,
    }
    return content


def _splits(options: Options, chosen: dict[str, Any]) -> Iterator[tuple[int, Split]]:
    if options.splits is not None:
        for number in dict.fromkeys(options.splits):
            yield number, load_split(options.dataset, options.data_root, number, **chosen)
        return
    for number in count():
        try:
            split = load_split(options.dataset, options.data_root, number, **chosen)
        except NoSuchSplit:
            return
        yield number, split


def _differs(path: Path, content: _Content) -> str | None:
    """In what a file is not what would be made now; raises where it is no pack at all."""
    foreign = UserError(f"output: {path} is something else than a packed dataset; wanted a new file")
    if not path.is_file():
        raise foreign
    with path.open("rb") as file:
        if not MAGIC.startswith(file.read(len(MAGIC))):  # cut short it may be, or empty
            raise foreign
    try:
        made = Pack(path)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ").partition(";")[0]
    was, now = made.about, content.about
    options = [{**{name: about.get(name) for name in ("dataset", "pixels")}, **about["read"]} for about in (was, now)]
    for name, value in options[0].items():
        if value != options[1].get(name):
            return f"made with {name} {value!r}, not {options[1].get(name)!r}"
    if list(was["splits"]) != list(now["splits"]):
        return f"made of splits {', '.join(was['splits'])}, not {', '.join(now['splits'])}"
    if was["splits"] != now["splits"]:
        return f"made of {next(iter(was['splits'].values()))['description']}"
    if was != now or any(not np.array_equal(made.arrays[name], array) for name, array in content.arrays.items()):
        return "made of other tracklets"
    for number, source in enumerate(track(content.sources, "Checking frames", len(content.sources))):
        try:
            image_file = made.encoded(number)
        except UserError as error:
            return str(error).partition(";")[0]
        if image_file != _image_file(source, content.pixels):
            return f"frame {made.name_of(number)} is another"
    return None


def _write(path: Path, content: _Content) -> None:
    """Put the file in its place in one step, whole and on the disk."""
    new = temp_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new.unlink(missing_ok=True)  # left by a kill
    try:
        with new.open("xb") as file:
            _fill(file, content)
            ours = os.fstat(file.fileno())
    except BaseException:
        new.unlink(missing_ok=True)  # it may be many GB
        raise
    if not os.path.samestat(ours, new.stat()):
        raise UserError(f"output: {path} is being made by another process too; wanted one at a time")
    new.replace(path)
    fsync_path(path.parent)


def _fill(file: BinaryIO, content: _Content) -> None:
    """Write frames, index and, once these are on the disk, the header."""
    offsets, checksums = [HEADER.size], []
    file.write(bytes(HEADER.size))
    for source in track(content.sources, "Packing frames", len(content.sources)):
        image_file = _image_file(source, content.pixels)
        if isinstance(source, Path) and not content.pixels:
            decode(image_file, source)  # else it was by now: what cannot be read is not packed
        file.write(image_file)
        offsets.append(offsets[-1] + len(image_file))
        checksums.append(zlib.crc32(image_file))
    arrays = {
        **content.arrays,
        "offsets": np.array(offsets, np.uint64),
        "checksums": np.array(checksums, np.uint32),
        "about": np.frombuffer(json.dumps(content.about).encode(), np.uint8),
    }
    index = safetensors.numpy.save(arrays)
    file.write(index)
    _sync(file)
    header = HEADER.pack(MAGIC, offsets[-1], len(index), zlib.crc32(index), 0)[: -CHECKSUM.size]
    file.seek(0)
    file.write(header + CHECKSUM.pack(zlib.crc32(header)))
    _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _image_file(source: Source, pixels: bool) -> bytes:
    """The bytes of a frame as an image: its own file's, where it has one; a PNG's, where it is an array; or a PPM's,
    where its pixels are to be kept."""
    if isinstance(source, Path) and not pixels:
        return encoded(source)
    frame = decode(encoded(source), source) if isinstance(source, Path) else source
    made = BytesIO()
    if pixels:
        Image.fromarray(frame).save(made, "PPM")
    else:
        Image.fromarray(frame).save(made, "PNG", compress_level=6)
    return made.getvalue()


if __name__ == "__main__":
    run_command(lambda: pack(tyro.cli(Options, prog="python -m training.pack")))
