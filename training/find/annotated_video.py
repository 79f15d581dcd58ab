"""A video of the matches: the parts of the footage that show them, with a box, the rank and the score of each."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image, ImageDraw, ImageFont

from build_tools.palette import BLUE, GREEN, ORANGE, PURPLE, RED, SKY
from training.data.footage import TimedFrame
from training.find.matches import Match
from training.runtime.clock import clock
from training.runtime.errors import UserError

COLORS = (ORANGE, SKY, GREEN, PURPLE, RED, BLUE)
MARGIN = 0.5  # seconds shown before and after a match
_TICKS = 90_000  # per second, of the file's time stamps
CODECS = ("libx264", "mpeg4")  # the first that this FFmpeg has


class AnnotatedVideo:
    """An .mp4 file that is written frame by frame; close it, or use it as a context manager.

    Args:
        path: a new file.
        matches: to be shown.
        frame_rate: of the footage, about.
    """

    def __init__(self, path: Path, matches: Sequence[Match], frame_rate: float) -> None:
        self._path, self._matches, self._period = path, matches, 1 / frame_rate
        self._stream: av.VideoStream | None = None
        self._seconds = 0.0
        self._before: tuple[int, float] | None = None  # number and time of the frame before
        try:
            self._container = av.open(str(path), "w")
        except (FFmpegError, OSError) as error:
            raise UserError(f"output: {path}: {error}") from error

    def __enter__(self) -> AnnotatedVideo:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def add(self, frame: TimedFrame) -> None:
        """Append a frame if it shows a match, or is just before or after one; frames come in order.

        Raises:
            UserError: it cannot be encoded, or the disk is full.
        """
        shown = [match for match in self._matches if match.track.is_near(frame, MARGIN)]
        if not shown:
            return
        # As long after the frame before as in the footage, unless some were left out between them.
        if self._before is not None:
            number, seconds = self._before
            self._seconds += frame.seconds - seconds if frame.number == number + 1 else self._period
        self._before = frame.number, frame.seconds
        try:
            self._encode(self._drawn(frame, shown))
        except (FFmpegError, OSError) as error:
            raise UserError(f"output: {self._path}: {error}") from error

    def is_over(self, seconds: float) -> bool:
        """Return True if no later frame is shown."""
        return seconds > max(match.track.seconds[-1] for match in self._matches) + MARGIN

    def close(self) -> None:
        """Complete the file.

        Raises:
            UserError: it cannot be written.
        """
        try:
            if self._stream is not None:
                self._container.mux(self._stream.encode())
            self._container.close()
        except (FFmpegError, OSError) as error:
            raise UserError(f"output: {self._path}: {error}") from error

    def _drawn(self, frame: TimedFrame, matches: Sequence[Match]) -> np.ndarray:
        """Return the frame with boxes, of even width and height, as the codec wants them."""
        height, width = frame.pixels.shape[:2]
        image = Image.fromarray(np.pad(frame.pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))
        draw = ImageDraw.Draw(image)
        size = max(12, round(height / 32))
        font, line = ImageFont.load_default(size), max(2, round(height / 240))
        for match in reversed(matches):  # the best on top
            box = match.track.box_at(frame)
            if box is None:
                continue
            color = COLORS[(match.rank - 1) % len(COLORS)]
            left, top = box.left - 1, box.top - 1
            draw.rectangle((left, top, left + box.width, top + box.height), outline=color, width=line)
            label = f" {match.rank} " if match.score is None else f" {match.rank}  {match.score:.3f} "
            _label(draw, label, (left, top - 1.3 * size), font, color)
        _label(draw, f" {clock(frame.seconds)} ", (0, height), font, "black")
        return np.asarray(image)

    def _encode(self, pixels: np.ndarray) -> None:
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        if self._stream is None:
            codec = next((name for name in CODECS if name in av.codecs_available), CODECS[-1])
            rate = Fraction(1 / self._period).limit_denominator(1001)
            self._stream = self._container.add_stream(codec, rate=rate)
            self._stream.width, self._stream.height = picture.width, picture.height
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = Fraction(1, _TICKS)
            if codec == "libx264":
                self._stream.options = {"crf": "23", "preset": "veryfast"}
            else:
                self._stream.bit_rate = 4_000_000
        picture.pts, picture.time_base = round(self._seconds * _TICKS), Fraction(1, _TICKS)
        self._container.mux(self._stream.encode(picture))


def _label(
    draw: ImageDraw.ImageDraw,
    text: str,
    place: tuple[float, float],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    color: str,
) -> None:
    """Write a text on a colored ground, as near to a place as the image allows."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = draw.im.size
    x = min(max(place[0], 0), max(0, width - right))
    y = min(max(place[1], 0), max(0, height - bottom - 2))
    draw.rectangle((x + left, y + top - 2, x + right, y + bottom + 2), fill=color)
    draw.text((x, y), text, fill="white" if color == "black" else "black", font=font)
