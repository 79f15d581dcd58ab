"""What comes between a person and the camera, and how often."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import ImageDraw

from training.data.rendering.figures import CLOTH, Colour, Person, View, draw_person, shade

WIDTH, HEIGHT = 64, 128  # of a frame, pixels
SCALE = 2  # drawn this much larger, then reduced: the figures get soft edges
MIDDLE = 20  # columns in the middle of a frame, where the person's trunk is
HALF_WIDTH = {"none": 0, "post": 7, "passer-by": 14, "luggage": 15}  # by kind; of a passer-by, the trunk's
OUTSIDE = 16  # from the frame's side to the middle of what starts or ends a crossing


@dataclass(frozen=True)
class Occluder:
    """What passes between person and camera, from one side of the frame to the other; kind "none" is nothing.

    start is the frame at which its middle is OUTSIDE the frame, speed in pixels a frame, to the right if positive.
    """

    kind: str
    start: float
    speed: float
    colour: Colour
    passer_by: Person

    @classmethod
    def draw(cls, frames: int, rng: np.random.Generator) -> Occluder:
        """Choose the one that a tracklet of the default set has; in three of ten it is nothing."""
        return cls(
            kind=str(rng.choice(["none", "post", "passer-by", "luggage"], p=[0.3, 0.25, 0.3, 0.15])),
            start=rng.uniform(-2, 0.6 * frames),
            speed=rng.uniform(3, 8) * rng.choice([-1, 1]),
            colour=CLOTH[rng.integers(len(CLOTH))],
            passer_by=Person.draw(rng),
        )

    def middle(self, t: float) -> float:
        """Its middle at frame t, pixels from the left side."""
        return (-OUTSIDE if self.speed > 0 else WIDTH + OUTSIDE) + self.speed * (t - self.start)

    def covers(self, t: float) -> bool:
        """Whether it reaches into the MIDDLE columns at frame t; a passer-by does with the trunk, not with a hand."""
        return self.kind != "none" and abs(self.middle(t) - WIDTH / 2) < MIDDLE / 2 + HALF_WIDTH[self.kind]

    def draw_on(self, canvas: ImageDraw.ImageDraw, view: View, t: int) -> None:
        """Draw it as it is at frame t on a canvas SCALE times as large as a frame."""
        x, bottom = self.middle(t) * SCALE, HEIGHT * SCALE
        match self.kind:
            case "post":
                canvas.rectangle((x - 7 * SCALE, 0, x + 7 * SCALE, bottom), fill=shade(self.colour, 0.7))
                canvas.rectangle((x - 7 * SCALE, 0, x - 4 * SCALE, bottom), fill=self.colour)
            case "passer-by":
                nearer = replace(view, facing=1 if self.speed > 0 else -1, unit=view.unit * 1.12)
                draw_person(canvas, self.passer_by, nearer, x, bottom + 6 * SCALE, self.passer_by.cadence * t)
            case "luggage":
                box = (x - 15 * SCALE, bottom - 46 * SCALE, x + 15 * SCALE, bottom - 4 * SCALE)
                canvas.rounded_rectangle(box, 4 * SCALE, fill=self.colour, outline=shade(self.colour, 0.6), width=4)
                canvas.rectangle((x - 6 * SCALE, box[1] - 8 * SCALE, x + 6 * SCALE, box[1]), outline=(40, 40, 40))


def crossings(share: float, frames: int, rng: np.random.Generator) -> Iterator[Occluder]:
    """Choose occluders that cross one after another, so that one covers the MIDDLE in an expected share of the frames.

    Stretches that are covered alternate with clear ones; a clear one is (1 - share) / share times as long as the one
    before it, give or take a half.

    Args:
        share: 0 to 1.
        frames: of the tracklet.
        rng: theirs alone.
    """
    if share == 0:
        return
    # Begun so long before the tracklet that its first frame is a frame like any other.
    t = -rng.uniform(50, 100) / share
    while t < frames:
        drawn = Occluder.draw(frames, rng)
        if drawn.kind == "none":
            continue
        reach, speed = MIDDLE / 2 + HALF_WIDTH[drawn.kind], abs(drawn.speed)
        if t + 2 * WIDTH / speed > 0:  # not gone before the tracklet begins
            yield replace(drawn, start=t - (WIDTH / 2 + OUTSIDE - reach) / speed)
        covered = 2 * reach / speed
        t += covered + covered * (1 - share) / share * rng.uniform(0.5, 1.5)
