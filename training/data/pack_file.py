"""A packed dataset: one file of frames, as encoded or as PPM, with an index of them and of the splits' tracklets.

    header    HEADER, once all else is on the disk
    frames    image files, one after another
    index     arrays, by safetensors

Arrays, where there are N frames, M distinct tracklets and R references of tracklets to frames:

    offsets (N + 1,) uint64        where in the file each frame begins, and the last ends
    checksums (N,) uint32          zlib.crc32 of each frame
    frames (R,) uint32             the frames of the tracklets, one tracklet after another
    starts (M + 1,) uint64         where in `frames` each tracklet begins, and the last ends
    people, cameras (M,) int64
    K.train, K.probe, K.gallery    uint32, the tracklets of split K
    about                          uint8, JSON: what was read and how it is kept, names of tracklets, what each split is
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from training.runtime.errors import UserError

MAGIC = b"RRUPACK\x01"  # the last byte is the format's version
HEADER = struct.Struct("<8sQQII")  # magic, where the index begins, its length, its crc32, crc32 of all before
CHECKSUM = struct.Struct("<I")
PARTS = ("train", "probe", "gallery")
_REMEDY = "make it again with python -m training.pack"


class Pack:
    """An open packed dataset; it survives fork and pickling.

    Args:
        path: the file.

    Raises:
        UserError: it cannot be read, is something else, or is cut short or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
            size = os.fstat(self._file.fileno()).st_size
            header = self._read(0, HEADER.size)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if header[: len(MAGIC)] != MAGIC[: len(header)]:
            raise UserError(
                f"{path}: not a packed dataset; wanted a dataset's folder, or what training.pack makes of it"
            )
        if len(header) < HEADER.size or zlib.crc32(header[: -CHECKSUM.size]) != HEADER.unpack(header)[-1]:
            raise UserError(f"{path}: got {size} bytes without a whole header; {_REMEDY}")
        _, begin, length, self._checksum, _ = HEADER.unpack(header)
        if size != begin + length:
            raise UserError(f"{path}: got {size} bytes, wanted {begin + length}; {_REMEDY}")
        index = self._read(begin, length)
        if zlib.crc32(index) != self._checksum:
            raise UserError(f"{path}: its index is damaged; {_REMEDY}")
        try:
            self.arrays = safetensors.numpy.load(index)
            self.about: dict[str, Any] = json.loads(self.arrays["about"].tobytes())
        except (SafetensorError, ValueError, KeyError) as error:  # with its checksum right, of another program's make
            raise UserError(f"{path}: its index cannot be read ({error}); {_REMEDY}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self._checksum)

    def frames_of(self, tracklet: int) -> PackedFrames:
        """The frames of a tracklet, by its number."""
        first, end = self.arrays["starts"][tracklet : tracklet + 2].tolist()
        return PackedFrames(self, range(first, end))

    def encoded(self, number: int) -> bytes:
        """The image file of a frame, by its number.

        Raises:
            UserError: it cannot be read, or is not what was packed.
        """
        first, end = self.arrays["offsets"][number : number + 2].tolist()
        try:
            # Not by a memory map: there a disk that fails kills the process.
            content = self._read(first, end - first)
        except OSError as error:
            raise UserError(f"frame {self.name_of(number)}: cannot be read ({error.strerror}); {_REMEDY}") from None
        if zlib.crc32(content) != self.arrays["checksums"][number]:
            raise UserError(f"frame {self.name_of(number)}: damaged, its checksum is another; {_REMEDY}")
        return content

    def name_of(self, number: int) -> str:
        """What to call a frame in messages: its place in the first tracklet that has it."""
        place = int(np.flatnonzero(self.arrays["frames"] == number)[0])
        tracklet = int(np.searchsorted(self.arrays["starts"], place, side="right")) - 1
        inside = place - int(self.arrays["starts"][tracklet])
        return f"{inside} of {self.about['names'][tracklet]} in {self.path}"

    def _read(self, first: int, length: int) -> bytes:
        """As many bytes as there are, whatever other processes read by the same descriptor."""
        parts = []
        while length and (part := os.pread(self._file.fileno(), length, first)):
            parts.append(part)
            first, length = first + len(part), length - len(part)
        return b"".join(parts)


def _reopen(path: Path, checksum: int) -> Pack:
    pack = Pack(path)
    if pack._checksum != checksum:
        raise UserError(f"{path}: made again while it was in use; start again")
    return pack


@dataclass(frozen=True)
class PackedFrame:
    """A frame of a packed dataset, by its number there."""

    pack: Pack
    number: int

    def encoded(self) -> bytes:
        """Its image file; raises a UserError where that is damaged."""
        return self.pack.encoded(self.number)

    def __str__(self) -> str:
        return self.pack.name_of(self.number)


@dataclass(frozen=True)
class PackedFrames(Sequence[PackedFrame]):
    """The frames of a tracklet, made as they are asked for: a dataset may have a million.

    pack: where they are.
    places: where in its array `frames` their numbers are.
    """

    pack: Pack
    places: range

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, item: int) -> PackedFrame: ...

    @overload
    def __getitem__(self, item: slice) -> PackedFrames: ...

    def __getitem__(self, item: int | slice) -> PackedFrame | PackedFrames:
        if isinstance(item, slice):
            return PackedFrames(self.pack, self.places[item])
        return PackedFrame(self.pack, int(self.pack.arrays["frames"][self.places[item]]))
