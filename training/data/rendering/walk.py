"""Render a person who walks past a surveillance camera: the frames of a synthetic tracklet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import cos, pi

import numpy as np
from PIL import Image, ImageDraw

from training.data.rendering.figures import View, draw_person
from training.data.rendering.occlusion import HEIGHT, SCALE, WIDTH, Occluder, crossings
from training.data.rendering.person import Person

PANORAMA = 6 * WIDTH  # width of a camera's background, pixels


@dataclass(frozen=True)
class Camera:
    """A camera: viewpoint, exposure, color cast, sensor noise and surroundings."""

    view: View
    gain: float
    cast: tuple[float, float, float]  # factors of red, green and blue
    noise: float  # standard deviation, in levels of 0 to 255
    indoors: bool


CAMERAS = (
    Camera(View(yaw=0.25, facing=1, unit=108.0), gain=0.9, cast=(1.07, 1.0, 0.86), noise=5.0, indoors=True),
    Camera(View(yaw=0.8, facing=-1, unit=100.0), gain=1.12, cast=(0.92, 1.0, 1.1), noise=7.0, indoors=False),
)


def render_walk(
    person: Person,
    camera: Camera,
    frames: int,
    rng: np.random.Generator,
    occlusion: float | None = None,
    blur: float | None = None,
) -> Iterator[Image.Image]:
    """Render a person walking past a camera; walk, background, light and noise do not depend on the rates.

    Args:
        person: the person.
        camera: the camera.
        frames: number of frames.
        rng: source of background position, occluders, lighting, blur and noise.
        occlusion: expected share of the frames in which an occluder covers the MIDDLE, 0 to 1; `None`: seven tracklets
            in ten are crossed once, which makes it a fifth.
        blur: expected share of the frames that are blurred along the motion, 0 to 1; `None`: 0.05 in one half of the
            tracklets, 0.35 in the other.

    Yields:
        WIDTH x HEIGHT RGB images, in order of time.
    """
    background = draw_background(camera)
    pace = 5.0 * person.stride * cos(camera.view.yaw)  # the crop follows the person, so the background moves
    begin = rng.uniform(0, PANORAMA)
    phase = rng.uniform(0, 2 * pi)
    unit = SCALE * camera.view.unit * rng.uniform(0.94, 1.05)
    view = replace(camera.view, yaw=camera.view.yaw + rng.normal(0, 0.12), unit=unit)
    occluders = [Occluder.sample(frames, rng)]
    if occlusion is not None:
        occluders = list(crossings(occlusion, frames, rng.spawn(1)[0]))
    light = camera.gain * rng.uniform(0.82, 1.15)
    threshold, default_blur = rng.random(frames), rng.choice([0.05, 0.35])
    blurred = threshold < (default_blur if blur is None else blur)
    jitter_x, jitter_y = rng.normal(0, 1.2, (2, frames))
    for t in range(frames):
        image = _crop(background, begin + camera.view.facing * pace * t)
        canvas = ImageDraw.Draw(image)
        center = (WIDTH / 2 + jitter_x[t]) * SCALE
        ground = (HEIGHT - 7 + jitter_y[t]) * SCALE
        draw_person(canvas, person, view, center, ground, phase + person.cadence * t)
        for occluder in occluders:
            occluder.draw_on(canvas, view, t)
        light += 0.25 * (camera.gain - light) + rng.normal(0, 0.05)
        yield _expose(image, camera, light, 5 if blurred[t] else 1, rng)


def draw_background(camera: Camera) -> Image.Image:
    """Draw a camera's background: PANORAMA pixels wide, seamless where it repeats."""
    image = Image.new("RGB", (PANORAMA * SCALE, HEIGHT * SCALE), (172, 170, 162) if camera.indoors else (150, 156, 164))
    canvas = ImageDraw.Draw(image)
    wide, tall = image.size
    floor = round(tall * (0.66 if camera.indoors else 0.58))
    if camera.indoors:  # an airport hall: panels, doors and a sign on the wall, tiles on the floor
        for x in range(0, wide, 48 * SCALE):
            canvas.rectangle((x, 0, x + 2, floor), fill=(140, 138, 130))
        for x in range(60 * SCALE, wide, 128 * SCALE):
            canvas.rectangle((x, floor * 0.18, x + 40 * SCALE, floor), fill=(108, 116, 124), outline=(70, 74, 80))
            canvas.rectangle((x - 44 * SCALE, 10 * SCALE, x - 8 * SCALE, 24 * SCALE), fill=(206, 172, 60))
        canvas.rectangle((0, floor, wide, tall), fill=(126, 120, 112))
        for x in range(0, wide, 32 * SCALE):
            canvas.line((x, floor, x - 20 * SCALE, tall), fill=(108, 102, 96), width=2)
    else:  # a street: shop windows, a hedge, a curb
        for x in range(0, wide, 96 * SCALE):
            canvas.rectangle((x, 0, x + 54 * SCALE, floor), fill=(134, 94, 78))
            canvas.rectangle((x + 8 * SCALE, 14 * SCALE, x + 46 * SCALE, floor * 0.7), fill=(64, 82, 98))
            canvas.rectangle((x + 62 * SCALE, floor * 0.45, x + 90 * SCALE, floor), fill=(62, 88, 56))
        canvas.rectangle((0, floor, wide, tall), fill=(120, 122, 124))
        canvas.rectangle((0, tall * 0.88, wide, tall * 0.91), fill=(176, 174, 168))
    return image


def _crop(background: Image.Image, x: float) -> Image.Image:
    left = round(x * SCALE) % background.width
    crop = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE))
    crop.paste(background, (-left, 0))
    crop.paste(background, (background.width - left, 0))
    return crop


def _expose(image: Image.Image, camera: Camera, light: float, blur: int, rng: np.random.Generator) -> Image.Image:
    """Downscale, blur by `blur` pixels along the motion, apply exposure, and add sensor noise."""
    pixels = np.asarray(image.reduce(SCALE), dtype=np.float32)
    pixels = sum(np.roll(pixels, shift - blur // 2, axis=1) for shift in range(blur)) / np.float32(blur)
    pixels = pixels * np.float32(light) * np.asarray(camera.cast, np.float32)
    pixels = pixels + rng.standard_normal(pixels.shape, np.float32) * np.float32(camera.noise)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
