"""A synthetic person: clothes, proportions and gait, which stay the same under every camera."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Color = tuple[int, int, int]

SKIN: tuple[Color, ...] = ((236, 200, 172), (206, 160, 126), (150, 104, 76), (98, 66, 48))
HAIR: tuple[Color, ...] = ((28, 24, 22), (70, 46, 30), (132, 92, 50), (186, 160, 104), (140, 138, 136))
CLOTH: tuple[Color, ...] = (
    (34, 34, 38),
    (226, 224, 218),
    (130, 132, 136),
    (36, 50, 92),
    (156, 40, 44),
    (54, 96, 66),
    (196, 164, 96),
    (88, 126, 172),
)
LEGWEAR: tuple[Color, ...] = ((30, 30, 34), (40, 52, 84), (92, 114, 148), (152, 136, 108), (104, 102, 100))
SHOES: tuple[Color, ...] = ((24, 22, 22), (206, 204, 200), (96, 62, 40))


@dataclass(frozen=True)
class Person:
    """Appearance and gait of a person, the same under every camera; lengths are relative to an average person."""

    skin: Color
    hair: Color
    hair_style: str
    top: Color
    trim: Color
    pattern: str
    short_sleeves: bool
    legwear: Color
    legwear_style: str
    shoes: Color
    bag: str
    bag_color: Color
    height: float
    build: float
    stride: float
    cadence: float  # radians of gait per frame

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Person:
        """Sample a person; the palettes are small, so that people share colors."""

        def one_of(palette: tuple[Color, ...]) -> Color:
            return palette[rng.integers(len(palette))]

        return cls(
            skin=one_of(SKIN),
            hair=one_of(HAIR),
            hair_style=str(rng.choice(["short", "long", "bald", "cap"], p=[0.45, 0.3, 0.1, 0.15])),
            top=one_of(CLOTH),
            trim=one_of(CLOTH),
            pattern=str(rng.choice(["plain", "hoops", "stripes", "two-tone", "jacket"])),
            short_sleeves=bool(rng.random() < 0.3),
            legwear=one_of(LEGWEAR),
            legwear_style=str(rng.choice(["trousers", "shorts", "skirt"], p=[0.65, 0.18, 0.17])),
            shoes=one_of(SHOES),
            bag=str(rng.choice(["none", "backpack", "shoulder", "hand"], p=[0.35, 0.25, 0.2, 0.2])),
            bag_color=one_of(CLOTH),
            height=rng.uniform(0.9, 1.06),
            build=rng.uniform(0.82, 1.22),
            stride=rng.uniform(0.75, 1.2),
            cadence=rng.uniform(0.42, 0.62),
        )
