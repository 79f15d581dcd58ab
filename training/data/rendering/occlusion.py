"""Occluders that pass between a person and the camera, at a given rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import ImageDraw

from training.data.rendering.figures import View, draw_person, shade
from training.data.rendering.person import CLOTH, Color, Person

WIDTH, HEIGHT = 64, 128  # of a frame, pixels
SCALE = 2  # drawn this much larger, then reduced: the figures get soft edges
MIDDLE = 20  # columns in the middle of a frame, where the person's trunk is
HALF_WIDTH = {"none": 0, "post": 7, "passer-by": 14, "luggage": 15}  # by kind; for a passer-by, of the trunk
OUTSIDE = 16  # pixels outside the frame at which an occluder's middle starts and ends a crossing


@dataclass(frozen=True)
class Occluder:
    """An object that crosses the frame between person and camera; kind "none" is no object."""

    kind: str
    start: float  # frame at which its middle is OUTSIDE pixels before the frame
    speed: float  # pixels per frame, to the right if positive
    color: Color
    passer_by: Person

    @classmethod
    def sample(cls, frames: int, rng: np.random.Generator) -> Occluder:
        """Sample the occluder of a tracklet of the default set; three in ten are of kind "none"."""
        return cls(
            kind=str(rng.choice(["none", "post", "passer-by", "luggage"], p=[0.3, 0.25, 0.3, 0.15])),
            start=rng.uniform(-2, 0.6 * frames),
            speed=rng.uniform(3, 8) * rng.choice([-1, 1]),
            color=CLOTH[rng.integers(len(CLOTH))],
            passer_by=Person.sample(rng),
        )

    def middle(self, t: float) -> float:
        """Return the x coordinate of its middle at frame t, in pixels."""
        return (-OUTSIDE if self.speed > 0 else WIDTH + OUTSIDE) + self.speed * (t - self.start)

    def covers(self, t: float) -> bool:
        """Return True if it reaches into the MIDDLE columns at frame t; of a passer-by, the trunk must."""
        return self.kind != "none" and abs(self.middle(t) - WIDTH / 2) < MIDDLE / 2 + HALF_WIDTH[self.kind]

    def draw_on(self, canvas: ImageDraw.ImageDraw, view: View, t: int) -> None:
        """Draw it at frame t on a canvas SCALE times as large as a frame."""
        x, bottom = self.middle(t) * SCALE, HEIGHT * SCALE
        match self.kind:
            case "post":
                canvas.rectangle((x - 7 * SCALE, 0, x + 7 * SCALE, bottom), fill=shade(self.color, 0.7))
                canvas.rectangle((x - 7 * SCALE, 0, x - 4 * SCALE, bottom), fill=self.color)
            case "passer-by":
                nearer = replace(view, facing=1 if self.speed > 0 else -1, unit=view.unit * 1.12)
                draw_person(canvas, self.passer_by, nearer, x, bottom + 6 * SCALE, self.passer_by.cadence * t)
            case "luggage":
                box = (x - 15 * SCALE, bottom - 46 * SCALE, x + 15 * SCALE, bottom - 4 * SCALE)
                canvas.rounded_rectangle(box, 4 * SCALE, fill=self.color, outline=shade(self.color, 0.6), width=4)
                canvas.rectangle((x - 6 * SCALE, box[1] - 8 * SCALE, x + 6 * SCALE, box[1]), outline=(40, 40, 40))


def crossings(share: float, frames: int, rng: np.random.Generator) -> Iterator[Occluder]:
    """Sample occluders that cross one after another and cover the MIDDLE in an expected share of the frames.

    Covered stretches alternate with clear ones; a clear stretch is (1 - share) / share times as long as the covered
    one before it, give or take a half.

    Args:
        share: 0 to 1.
        frames: length of the tracklet.
        rng: a generator of its own, so that other random choices do not depend on `share`.

    Yields:
        Occluders in order of time.
    """
    if share == 0:
        return
    # Start long before the tracklet, so that its first frame is covered as often as any other.
    t = -rng.uniform(50, 100) / share
    while t < frames:
        sampled = Occluder.sample(frames, rng)
        if sampled.kind == "none":
            continue
        reach, speed = MIDDLE / 2 + HALF_WIDTH[sampled.kind], abs(sampled.speed)
        if t + 2 * WIDTH / speed > 0:  # still visible at the tracklet's first frame
            yield replace(sampled, start=t - (WIDTH / 2 + OUTSIDE - reach) / speed)
        covered = 2 * reach / speed
        t += covered + covered * (1 - share) / share * rng.uniform(0.5, 1.5)
