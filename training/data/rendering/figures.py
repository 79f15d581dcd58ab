"""Draw a person in mid-step."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, sin

from PIL import ImageDraw

from training.data.rendering.person import Color, Person

Point = tuple[float, float]


@dataclass(frozen=True)
class View:
    """Viewpoint of a camera."""

    yaw: float  # between the walking direction and the image plane, radians
    facing: int  # +1 if they walk to the right, -1 to the left
    unit: float  # the height of an average person, pixels


def draw_person(
    canvas: ImageDraw.ImageDraw, person: Person, view: View, center: float, ground: float, phase: float
) -> None:
    """Draw a person with the feet at (center, ground), in pixels of the canvas, at a gait phase in radians."""
    unit = view.unit * person.height
    side, front = cos(view.yaw), sin(view.yaw)
    ahead = view.facing * side  # of one step ahead, the part to the right
    shadow = 0.2 * unit
    canvas.ellipse((center - shadow, ground - shadow * 0.07, center + shadow, ground + shadow * 0.18), (74, 72, 70))
    ground -= abs(sin(phase)) * 0.012 * unit
    hip, shoulder, chin = ground - 0.49 * unit, ground - 0.80 * unit, ground - 0.855 * unit
    half = (0.085 * side + 0.125 * front) * person.build * unit  # of the shoulders
    swing = 0.34 * person.stride * sin(phase)
    leg, arm = 0.092 * unit * person.build, 0.066 * unit * person.build
    darker = shade(person.legwear, 0.72)

    def limb_from(x: float, y: float, angle: float, length: float) -> Point:
        return x + ahead * sin(angle) * length, y + cos(angle) * length

    def draw_leg(angle: float, offset: float, color: Color) -> None:
        start = (center + offset, hip)
        bend = 0.35 * max(-angle, 0.0) + 0.06
        knee = limb_from(*start, angle + bend * 0.3, 0.25 * unit)
        foot = limb_from(*knee, angle - bend, 0.215 * unit)
        bare = person.legwear_style != "trousers"
        _stroke(canvas, start, knee, leg, color)
        _stroke(canvas, knee, foot, leg * 0.8, person.skin if bare else color)
        toe = (foot[0] + (ahead * 0.05 + view.facing * 0.01) * unit, foot[1] + 0.01 * unit)
        _stroke(canvas, foot, toe, 0.046 * unit, person.shoes)

    def draw_arm(angle: float, offset: float, light: float) -> Point:
        start = (center + offset, shoulder + 0.035 * unit)
        elbow = limb_from(*start, angle, 0.165 * unit)
        hand = limb_from(*elbow, angle + 0.35, 0.15 * unit)
        sleeve = shade(person.trim if person.pattern == "two-tone" else person.top, light)
        _stroke(canvas, elbow, hand, arm * 0.85, shade(person.skin, light) if person.short_sleeves else sleeve)
        _stroke(canvas, start, elbow, arm, sleeve)
        _dot(canvas, hand, arm * 0.5, shade(person.skin, light))
        return hand

    stance = 0.05 * front * unit
    draw_arm(swing * 1.1, -view.facing * half * front * 1.1, 0.72)
    draw_leg(-swing, -view.facing * stance, darker)
    draw_leg(swing, view.facing * stance, person.legwear)
    if person.legwear_style == "skirt":
        waist, hem, high, low = half * 0.8, half * 1.15, hip - 0.04 * unit, hip + 0.2 * unit
        corners = [(center - waist, high), (center + waist, high), (center + hem, low), (center - hem, low)]
        canvas.polygon(corners, fill=person.legwear)
    if person.bag == "backpack":
        back = center - ahead * half * 1.05
        box = (back - 0.075 * unit, shoulder + 0.02 * unit, back + 0.075 * unit, shoulder + 0.24 * unit)
        canvas.rounded_rectangle(box, 0.03 * unit, fill=person.bag_color)
    _draw_torso(canvas, person, ahead, center, half, (shoulder, hip + 0.025 * unit))
    if person.bag in ("backpack", "shoulder"):  # straps; a shoulder bag's crosses the chest
        reach = -0.9 if person.bag == "shoulder" else 0.15
        strap = [(center + ahead * half * 0.5, shoulder), (center + ahead * half * reach, hip - 0.02 * unit)]
        canvas.line(strap, fill=shade(person.bag_color, 0.8), width=round(0.022 * unit))
    if person.bag == "shoulder":
        at = center - ahead * half * 0.9
        box = (at - 0.065 * unit, hip - 0.05 * unit, at + 0.065 * unit, hip + 0.08 * unit)
        canvas.rounded_rectangle(box, 0.02 * unit, fill=person.bag_color)
    hand = draw_arm(-swing * 1.1, view.facing * half * front * 1.1, 0.9)
    if person.bag == "hand":
        box = (hand[0] - 0.06 * unit, hand[1], hand[0] + 0.06 * unit, hand[1] + 0.13 * unit)
        canvas.rounded_rectangle(box, 0.015 * unit, fill=person.bag_color)
    _draw_head(canvas, person, ahead, center, chin, unit)


def _draw_torso(
    canvas: ImageDraw.ImageDraw, person: Person, ahead: float, center: float, half: float, span: Point
) -> None:
    top, bottom = span
    waist = half * 0.86

    def band(low: float, high: float, color: Color) -> None:
        """Fill the torso between two fractions of its height."""
        sides = [(half + (waist - half) * part, top + (bottom - top) * part) for part in (low, high)]
        (w0, y0), (w1, y1) = sides
        canvas.polygon([(center - w0, y0), (center + w0, y0), (center + w1, y1), (center - w1, y1)], fill=color)

    canvas.ellipse((center - half, top - half * 0.35, center + half, top + half * 0.5), fill=person.top)
    band(0, 1, person.top)
    match person.pattern:
        case "hoops":
            for stripe in range(4):
                band(0.1 + 0.23 * stripe, 0.2 + 0.23 * stripe, person.trim)
        case "stripes":
            for across in (-0.6, -0.1, 0.4):
                x = center + across * half
                canvas.rectangle((x, top, x + half * 0.22, bottom), fill=person.trim)
        case "two-tone":
            band(0.48, 1, person.trim)
        case "jacket":  # open in front: the visible width of the shirt depends on the view
            x = center + ahead * half * 0.6
            canvas.rectangle((x - half * 0.25, top, x + half * 0.25, bottom - half * 0.3), fill=person.trim)


def _draw_head(
    canvas: ImageDraw.ImageDraw, person: Person, ahead: float, center: float, chin: float, unit: float
) -> None:
    wide, tall = 0.056 * unit, 0.072 * unit
    center += ahead * 0.012 * unit
    middle = chin - tall * 0.85
    behind = center - ahead * wide * 0.55
    _stroke(canvas, (center, chin - 0.02 * unit), (center, chin + 0.06 * unit), 0.055 * unit, shade(person.skin, 0.85))
    if person.hair_style == "long":
        canvas.ellipse((behind - wide, middle - tall, behind + wide, chin + tall * 1.1), fill=person.hair)
    canvas.ellipse((center - wide, middle - tall, center + wide, middle + tall), fill=person.skin)
    if person.hair_style in ("short", "long"):
        canvas.pieslice((center - wide, middle - tall, center + wide, middle + tall), 180, 360, fill=person.hair)
        canvas.ellipse((behind - wide * 0.75, middle - tall, behind + wide * 0.75, middle + tall * 0.5), person.hair)
    elif person.hair_style == "cap":
        canvas.pieslice(
            (center - wide * 1.1, middle - tall * 1.1, center + wide * 1.1, middle + tall), 180, 360, fill=person.trim
        )
        peak = (center + ahead * wide * 1.9, middle - tall * 0.1)
        _stroke(canvas, (center, middle - tall * 0.1), peak, 0.022 * unit, person.trim)


def _stroke(canvas: ImageDraw.ImageDraw, start: Point, end: Point, width: float, color: Color) -> None:
    canvas.line((start, end), fill=color, width=round(width))
    _dot(canvas, start, width / 2, color)
    _dot(canvas, end, width / 2, color)


def _dot(canvas: ImageDraw.ImageDraw, at: Point, radius: float, color: Color) -> None:
    canvas.ellipse((at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius), fill=color)


def shade(color: Color, by: float) -> Color:
    """Return `color`, scaled by a factor."""
    red, green, blue = (round(channel * by) for channel in color)
    return red, green, blue
