"""Decode the frames of a video file, upright, as players show them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.filter
import numpy as np
from av.error import FFmpegError
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition

from training.runtime.errors import UserError

_ONE_DEGREE = 0.0175  # writers round sines and cosines


class VideoInfo(NamedTuple):
    """Frame rate and length of a video, as the file states them.

    frame_rate: frames per second, on average.
    length: number of frames, about; None where the file gives neither that nor its duration.
    """

    frame_rate: float
    length: int | None


def probe(path: Path) -> VideoInfo:
    """Read a video's frame rate and about its length, without decoding it.

    Raises:
        UserError: it cannot be read, or has no video stream or several.
    """
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            stream = _video_stream(path, container)
            rate = _frame_rate(stream)
            length = stream.frames or None
            if length is None and stream.duration and stream.time_base:
                length = round(float(stream.duration * stream.time_base) * rate)
            elif length is None and container.duration:
                length = round(container.duration / av.time_base * rate)
    except FFmpegError as error:
        raise UserError(f"{path}: not a readable video ({_reason(error)})") from None
    return VideoInfo(rate, length)


def decode_video(path: Path, skipped: Callable[[], None] | None = None) -> Iterator[tuple[float, np.ndarray]]:
    """Decode a video to its end, each frame rotated and flipped by its display matrix.

    Cover pictures are ignored. Of several video streams, the one marked as default is decoded.

    Args:
        path: the file.
        skipped: called for each damaged packet, which is then skipped; None for an error.

    Yields:
        The time in seconds, ascending, as a player shows it, and (h, w, 3) uint8 RGB.

    Raises:
        UserError: the file cannot be decoded, has no video stream or several, or a frame rotated by other than a
            multiple of 90 degrees.
    """
    number = 0
    try:
        with av.open(str(path), metadata_errors="replace") as container:  # do not fail on a title in Latin-1
            stream = _video_stream(path, container)
            period = 1 / _frame_rate(stream)
            begin, before = (container.start_time or 0) / av.time_base, -period
            for number, frame in enumerate(_frames(container, stream, skipped), start=1):
                seconds = before + period if frame.time is None else frame.time - begin
                before = seconds = seconds if seconds > before else before + period  # time stamps may be damaged
                pixels, matrix = frame.to_ndarray(format="rgb24"), _display_matrix(frame)
                yield seconds, pixels if matrix is None else _upright(pixels, matrix, f"{path}, frame {number}")
    except FFmpegError as error:
        raise UserError(f"{path}: cannot be decoded after frame {number} ({_reason(error)})") from None


def read_video(path: Path, count: int) -> Iterator[tuple[float, np.ndarray]]:
    """Decode the first frames of a video, as `decode_video` does.

    Args:
        path: the file.
        count: the number of frames.

    Yields:
        The time in seconds, and (h, w, 3) uint8 RGB.

    Raises:
        UserError: those of `decode_video`, or there are fewer frames.
    """
    number = 0
    for number, frame in enumerate(decode_video(path), start=1):
        yield frame
        if number == count:
            return
    raise UserError(f"{path}: got {number} frames, wanted {count}, the seqLength of seqinfo.ini")


def _frames(container: Any, stream: Any, skipped: Callable[[], None] | None) -> Iterator[av.VideoFrame]:
    """Yield the frames of a stream, all that can be decoded if damaged packets are to be skipped."""
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except FFmpegError:
            if skipped is None:
                raise
            skipped()


def _frame_rate(stream: Any) -> float:
    return float(stream.average_rate or stream.guessed_rate or 25)


def _reason(error: FFmpegError) -> str:
    """Return the message of an error without FFmpeg's number."""
    return re.sub(r"^\[Errno \d+\] ", "", " ".join(str(error).split()))


def _video_stream(path: Path, container: Any) -> Any:
    """Return the only video stream that is not a cover picture, or the default one of several."""
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    default = [stream for stream in streams if stream.disposition & Disposition.default]
    for candidates in (streams, default):
        if len(candidates) == 1:
            return candidates[0]
    if not streams:
        raise UserError(f"{path}: got no video stream, wanted one")
    marked = f"{len(default)} of them marked as default"
    raise UserError(f"{path}: got {len(streams)} video streams, {marked}, wanted one, or one marked as default")


def _display_matrix(frame: av.VideoFrame) -> bytes | None:
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV cannot list kinds that it has no name for, such as the EXIF of motion JPEG
        matrix = _without_unnamed(frame).side_data.get("DISPLAYMATRIX")
    return None if matrix is None else bytes(matrix)


def _without_unnamed(frame: av.VideoFrame) -> av.VideoFrame:
    """Return a frame of the same data without the side data types that PyAV has no name for."""
    graph = av.filter.Graph()
    size = {"width": frame.width, "height": frame.height}
    filters = [graph.add_buffer(**size, format=frame.format.name, time_base=Fraction(1))]
    unnamed = set(range(48)) - {kind.value for kind in SideDataType}
    filters += [graph.add("sidedata", f"mode=delete:type={kind}") for kind in sorted(unnamed)]
    filters.append(graph.add("buffersink"))
    for one, other in pairwise(filters):
        one.link_to(other)
    graph.configure()
    graph.push(frame)
    return graph.pull()


def _upright(pixels: np.ndarray, matrix: bytes, where: str) -> np.ndarray:
    """Rotate and flip an image by a display matrix, which shows pixel (x, y) at (a x + c y, b x + d y)."""
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if a == b == c == d == 0:  # left empty by some writers
        return pixels
    shown = ", ".join(f"{value / 2**16:.3g}" for value in (a, b, c, d))
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels = pixels.swapaxes(0, 1)
        a, b, c, d = c, d, a, b
    if max(abs(b), abs(c)) >= _ONE_DEGREE * min(abs(a), abs(d)):
        raise UserError(f"{where}: got the display matrix {shown}, wanted a rotation by a multiple of 90 degrees")
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
