"""A person as the synthetic dataset draws one: what stays the same about them, and how they look in mid-step."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, sin

import numpy as np
from PIL import ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

SKIN: tuple[Colour, ...] = ((236, 200, 172), (206, 160, 126), (150, 104, 76), (98, 66, 48))
HAIR: tuple[Colour, ...] = ((28, 24, 22), (70, 46, 30), (132, 92, 50), (186, 160, 104), (140, 138, 136))
CLOTH: tuple[Colour, ...] = (
    (34, 34, 38),
    (226, 224, 218),
    (130, 132, 136),
    (36, 50, 92),
    (156, 40, 44),
    (54, 96, 66),
    (196, 164, 96),
    (88, 126, 172),
)
LEGWEAR: tuple[Colour, ...] = ((30, 30, 34), (40, 52, 84), (92, 114, 148), (152, 136, 108), (104, 102, 100))
SHOES: tuple[Colour, ...] = ((24, 22, 22), (206, 204, 200), (96, 62, 40))


@dataclass(frozen=True)
class Person:
    """What stays with a person from one camera to the other; lengths are relative to an average person."""

    skin: Colour
    hair: Colour
    hair_style: str
    top: Colour
    trim: Colour
    pattern: str
    short_sleeves: bool
    legwear: Colour
    legwear_style: str
    shoes: Colour
    bag: str
    bag_colour: Colour
    height: float
    build: float
    stride: float
    cadence: float  # radians of gait a frame

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Person:
        """Choose a person; the palettes are small, so that people share colours."""

        def one_of(palette: tuple[Colour, ...]) -> Colour:
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
            bag_colour=one_of(CLOTH),
            height=rng.uniform(0.9, 1.06),
            build=rng.uniform(0.82, 1.22),
            stride=rng.uniform(0.75, 1.2),
            cadence=rng.uniform(0.42, 0.62),
        )


@dataclass(frozen=True)
class View:
    """From where a person is seen."""

    yaw: float  # between the way people walk and the image plane, radians
    facing: int  # +1 if they walk to the right, -1 to the left
    unit: float  # the height of an average person, pixels


def draw_person(
    canvas: ImageDraw.ImageDraw, person: Person, view: View, centre: float, ground: float, phase: float
) -> None:
    """Draw a person standing at (centre, ground), in the canvas's pixels, at a phase of the gait in radians."""
    unit = view.unit * person.height
    side, front = cos(view.yaw), sin(view.yaw)
    ahead = view.facing * side  # how far one step ahead is to the right
    shadow = 0.2 * unit
    canvas.ellipse((centre - shadow, ground - shadow * 0.07, centre + shadow, ground + shadow * 0.18), (74, 72, 70))
    ground -= abs(sin(phase)) * 0.012 * unit
    hip, shoulder, chin = ground - 0.49 * unit, ground - 0.80 * unit, ground - 0.855 * unit
    half = (0.085 * side + 0.125 * front) * person.build * unit  # of the shoulders
    swing = 0.34 * person.stride * sin(phase)
    leg, arm = 0.092 * unit * person.build, 0.066 * unit * person.build
    darker = shade(person.legwear, 0.72)

    def limb_from(x: float, y: float, angle: float, length: float) -> Point:
        return x + ahead * sin(angle) * length, y + cos(angle) * length

    def draw_leg(angle: float, apart: float, colour: Colour) -> None:
        start = (centre + apart, hip)
        bend = 0.35 * max(-angle, 0.0) + 0.06
        knee = limb_from(*start, angle + bend * 0.3, 0.25 * unit)
        foot = limb_from(*knee, angle - bend, 0.215 * unit)
        bare = person.legwear_style != "trousers"
        _stroke(canvas, start, knee, leg, colour)
        _stroke(canvas, knee, foot, leg * 0.8, person.skin if bare else colour)
        toe = (foot[0] + (ahead * 0.05 + view.facing * 0.01) * unit, foot[1] + 0.01 * unit)
        _stroke(canvas, foot, toe, 0.046 * unit, person.shoes)

    def draw_arm(angle: float, apart: float, light: float) -> Point:
        start = (centre + apart, shoulder + 0.035 * unit)
        elbow = limb_from(*start, angle, 0.165 * unit)
        hand = limb_from(*elbow, angle + 0.35, 0.15 * unit)
        sleeve = shade(person.trim if person.pattern == "two-tone" else person.top, light)
        _stroke(canvas, elbow, hand, arm * 0.85, shade(person.skin, light) if person.short_sleeves else sleeve)
        _stroke(canvas, start, elbow, arm, sleeve)
        _dot(canvas, hand, arm * 0.5, shade(person.skin, light))
        return hand

    apart = 0.05 * front * unit
    draw_arm(swing * 1.1, -view.facing * half * front * 1.1, 0.72)
    draw_leg(-swing, -view.facing * apart, darker)
    draw_leg(swing, view.facing * apart, person.legwear)
    if person.legwear_style == "skirt":
        waist, hem, high, low = half * 0.8, half * 1.15, hip - 0.04 * unit, hip + 0.2 * unit
        corners = [(centre - waist, high), (centre + waist, high), (centre + hem, low), (centre - hem, low)]
        canvas.polygon(corners, fill=person.legwear)
    if person.bag == "backpack":
        back = centre - ahead * half * 1.05
        box = (back - 0.075 * unit, shoulder + 0.02 * unit, back + 0.075 * unit, shoulder + 0.24 * unit)
        canvas.rounded_rectangle(box, 0.03 * unit, fill=person.bag_colour)
    _draw_torso(canvas, person, ahead, centre, half, (shoulder, hip + 0.025 * unit))
    if person.bag in ("backpack", "shoulder"):  # straps; a shoulder bag's crosses the chest
        reach = -0.9 if person.bag == "shoulder" else 0.15
        strap = [(centre + ahead * half * 0.5, shoulder), (centre + ahead * half * reach, hip - 0.02 * unit)]
        canvas.line(strap, fill=shade(person.bag_colour, 0.8), width=round(0.022 * unit))
    if person.bag == "shoulder":
        at = centre - ahead * half * 0.9
        box = (at - 0.065 * unit, hip - 0.05 * unit, at + 0.065 * unit, hip + 0.08 * unit)
        canvas.rounded_rectangle(box, 0.02 * unit, fill=person.bag_colour)
    hand = draw_arm(-swing * 1.1, view.facing * half * front * 1.1, 0.9)
    if person.bag == "hand":
        box = (hand[0] - 0.06 * unit, hand[1], hand[0] + 0.06 * unit, hand[1] + 0.13 * unit)
        canvas.rounded_rectangle(box, 0.015 * unit, fill=person.bag_colour)
    _draw_head(canvas, person, ahead, centre, chin, unit)


def _draw_torso(
    canvas: ImageDraw.ImageDraw, person: Person, ahead: float, centre: float, half: float, span: Point
) -> None:
    top, bottom = span
    waist = half * 0.86

    def band(low: float, high: float, colour: Colour) -> None:
        """Fill a part of the torso's height, as fractions of it."""
        sides = [(half + (waist - half) * part, top + (bottom - top) * part) for part in (low, high)]
        (w0, y0), (w1, y1) = sides
        canvas.polygon([(centre - w0, y0), (centre + w0, y0), (centre + w1, y1), (centre - w1, y1)], fill=colour)

    canvas.ellipse((centre - half, top - half * 0.35, centre + half, top + half * 0.5), fill=person.top)
    band(0, 1, person.top)
    match person.pattern:
        case "hoops":
            for stripe in range(4):
                band(0.1 + 0.23 * stripe, 0.2 + 0.23 * stripe, person.trim)
        case "stripes":
            for across in (-0.6, -0.1, 0.4):
                x = centre + across * half
                canvas.rectangle((x, top, x + half * 0.22, bottom), fill=person.trim)
        case "two-tone":
            band(0.48, 1, person.trim)
        case "jacket":  # open in front: how much of the shirt shows depends on the view
            x = centre + ahead * half * 0.6
            canvas.rectangle((x - half * 0.25, top, x + half * 0.25, bottom - half * 0.3), fill=person.trim)


def _draw_head(
    canvas: ImageDraw.ImageDraw, person: Person, ahead: float, centre: float, chin: float, unit: float
) -> None:
    wide, tall = 0.056 * unit, 0.072 * unit
    centre += ahead * 0.012 * unit
    middle = chin - tall * 0.85
    behind = centre - ahead * wide * 0.55
    _stroke(canvas, (centre, chin - 0.02 * unit), (centre, chin + 0.06 * unit), 0.055 * unit, shade(person.skin, 0.85))
    if person.hair_style == "long":
        canvas.ellipse((behind - wide, middle - tall, behind + wide, chin + tall * 1.1), fill=person.hair)
    canvas.ellipse((centre - wide, middle - tall, centre + wide, middle + tall), fill=person.skin)
    if person.hair_style in ("short", "long"):
        canvas.pieslice((centre - wide, middle - tall, centre + wide, middle + tall), 180, 360, fill=person.hair)
        canvas.ellipse((behind - wide * 0.75, middle - tall, behind + wide * 0.75, middle + tall * 0.5), person.hair)
    elif person.hair_style == "cap":
        canvas.pieslice(
            (centre - wide * 1.1, middle - tall * 1.1, centre + wide * 1.1, middle + tall), 180, 360, fill=person.trim
        )
        peak = (centre + ahead * wide * 1.9, middle - tall * 0.1)
        _stroke(canvas, (centre, middle - tall * 0.1), peak, 0.022 * unit, person.trim)


def _stroke(canvas: ImageDraw.ImageDraw, start: Point, end: Point, width: float, colour: Colour) -> None:
    canvas.line((start, end), fill=colour, width=round(width))
    _dot(canvas, start, width / 2, colour)
    _dot(canvas, end, width / 2, colour)


def _dot(canvas: ImageDraw.ImageDraw, at: Point, radius: float, colour: Colour) -> None:
    canvas.ellipse((at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius), fill=colour)


def shade(colour: Colour, by: float) -> Colour:
    """Return `colour`, darker by a factor."""
    red, green, blue = (round(channel * by) for channel in colour)
    return red, green, blue
