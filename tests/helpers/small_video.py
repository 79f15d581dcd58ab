"""A small video of rendered people who cross the image, with their boxes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from training.data.rendering.person import Person
from training.data.rendering.walk import CAMERAS, render_walk

SIZE = 240, 320  # height and width
RATE = 10


class Visit(NamedTuple):
    """A person's way through the image.

    track: its number.
    person: seed of the person.
    first, frames: number of the first frame, from 1, and how many there are.
    left, step: of the box in the first frame, and how far it moves per frame.
    """

    track: int
    person: int
    first: int
    frames: int
    left: int = 0
    step: int = 4


# Person 1 comes back as track 5; of the others, each is there once.
VISITS = (Visit(1, 1, 1, 24), Visit(2, 2, 5, 24, 220, -4), Visit(3, 4, 28, 20), Visit(5, 1, 30, 24, 220, -4))


def write_video(path: Path, visits: Sequence[Visit] = VISITS, frames: int = 60, boxes: str | None = "gt.txt") -> Path:
    """Write a video at RATE, and next to it, if named, the boxes: 64 wide and 128 high, top 61."""
    images = np.full((frames, *SIZE, 3), 128, np.uint8)
    images += np.random.default_rng(0).integers(0, 24, images.shape[1:], dtype=np.uint8)
    lines = []
    for visit in visits:
        person, rng = Person.sample(np.random.default_rng((0, visit.person))), np.random.default_rng(visit.track)
        for place, crop in enumerate(render_walk(person, CAMERAS[0], visit.frames, rng, occlusion=0, blur=0)):
            number, left = visit.first + place, visit.left + visit.step * place
            images[number - 1, 60:188, left : left + 64] = np.asarray(crop)
            lines.append((number, f"{number},{visit.track},{left + 1},61,64,128,1,-1,-1,-1\n"))
    encode(path, images)
    if boxes is not None:
        (path.parent / boxes).write_text("".join(line for _, line in sorted(lines)))
    return path


def encode(path: Path, images: np.ndarray, seconds: Sequence[float] | None = None) -> None:
    """Write images (T, h, w, 3) as a video, at RATE or at the given times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4 * 10**6
        if seconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if seconds is not None:
                frame.pts, frame.time_base = round(1000 * seconds[number]), stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
