from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from training.data.rendering import occlusion
from training.data.rendering.occlusion import HEIGHT, MIDDLE, SCALE, WIDTH, Occluder, crossings
from training.data.rendering.person import Person
from training.data.rendering.walk import CAMERAS, render_walk


def walks(occluded: float | None, blur: float | None, tracklets: int = 20) -> np.ndarray:
    """Return the frames of tracklets of 16 frames each, (16 N, h, w, 3), which depend on number and rates alone."""
    frames = []
    for number in range(tracklets):
        rng = np.random.default_rng(number)
        person, camera = Person.sample(rng), CAMERAS[number % 2]
        frames += [np.asarray(frame) for frame in render_walk(person, camera, 16, rng, occluded, blur)]
    return np.stack(frames)


def covered(occluders: list[Occluder], frames: int) -> float:
    return float(np.mean([any(occluder.covers(t) for occluder in occluders) for t in range(frames)]))


@pytest.fixture
def _passers_by_unsampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip sampling the passers-by: it takes most of an occluder's time and does not affect its motion."""
    monkeypatch.setattr(occlusion.Person, "sample", lambda rng: None)


@pytest.mark.parametrize("frames", [pytest.param(16, marks=pytest.mark.exhaustive), 40])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.25, 0.5, 0.8, 1.0])
@pytest.mark.usefixtures("_passers_by_unsampled")
def test_the_middle_is_covered_in_the_share_of_frames_asked_for(share: float, frames: int) -> None:
    generators = [np.random.default_rng((number, frames)) for number in range(400)]
    shares = [covered(list(crossings(share, frames, rng)), frames) for rng in generators]
    deviation = np.std(shares) / np.sqrt(len(shares))
    assert np.mean(shares) == pytest.approx(share, abs=4 * deviation)
    assert deviation < 0.025, "too few tracklets to tell"


@pytest.mark.usefixtures("_passers_by_unsampled")
def test_a_tracklets_last_frames_are_covered_as_often_as_its_first() -> None:
    occluders = [list(crossings(0.3, 40, np.random.default_rng(number))) for number in range(400)]
    first, last = ([any(o.covers(t) for o in crossing) for crossing in occluders] for t in (0, 39))
    assert np.mean(first) == pytest.approx(np.mean(last), abs=0.1)


def test_the_default_set_is_crossed_in_seven_tracklets_of_ten_and_covered_in_a_fifth_of_its_frames() -> None:
    sampled = [Occluder.sample(28, np.random.default_rng(number)) for number in range(1000)]
    assert np.mean([occluder.kind != "none" for occluder in sampled]) == pytest.approx(0.7, abs=0.04)
    assert np.mean([covered([occluder], 28) for occluder in sampled]) == pytest.approx(0.2, abs=0.02)


def drawn_in_the_middle(kind: str) -> list[tuple[bool, dict[int, float]]]:
    """For occluders at many frames: `covers()`, and the painted share of the middle columns by their number."""
    view = replace(CAMERAS[0].view, unit=SCALE * CAMERAS[0].view.unit)
    found = []
    for number in range(20):
        occluder = replace(Occluder.sample(28, np.random.default_rng(number)), kind=kind)
        for t in range(-10, 50):
            image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "lime")
            occluder.draw_on(ImageDraw.Draw(image), view, t)
            painted = {}
            for columns in (MIDDLE - 2, MIDDLE, MIDDLE + 2):
                middle = slice((WIDTH - columns) * SCALE // 2, (WIDTH + columns) * SCALE // 2)
                painted[columns] = float((np.asarray(image)[:, middle] != (0, 255, 0)).any(-1).mean())
            found.append((occluder.covers(t), painted))
    return found


@pytest.mark.parametrize("kind", ["post", "luggage"])
def test_what_covers_the_middle_is_drawn_there_and_what_does_not_is_not(kind: str) -> None:
    drawn = drawn_in_the_middle(kind)
    assert {covers for covers, _ in drawn} == {True, False}
    assert all(painted[MIDDLE + 2] > 0 for covers, painted in drawn if covers)
    assert all(painted[MIDDLE - 2] == 0 for covers, painted in drawn if not covers)


def test_a_passer_by_covers_the_middle_with_the_trunk_as_hands_and_feet_swing_further() -> None:
    covering, not_covering = (
        np.mean([painted[MIDDLE] for covers, painted in drawn_in_the_middle("passer-by") if covers == which])
        for which in (True, False)
    )
    assert not_covering < 0.05 * covering


@pytest.mark.parametrize("share", [pytest.param(0.0, marks=pytest.mark.exhaustive), 0.3, 0.8])
def test_rendered_frames_have_an_occluder_in_their_middle_in_the_share_asked_for(share: float) -> None:
    middle = slice(WIDTH // 2 - MIDDLE // 2, WIDTH // 2 + MIDDLE // 2)
    seen, clear = (walks(rate, 0.0)[:, :, middle] for rate in (share, 0.0))
    changed = (seen != clear).any(-1).mean((1, 2))
    assert (changed > 0.05).mean() == pytest.approx(share, abs=0.05)


# 0 and 1 are nearly covered by 0.3 already, which compares with the frames at both.
@pytest.mark.parametrize("share", [0.3, *(pytest.param(share, marks=pytest.mark.exhaustive) for share in (0.0, 1.0))])
def test_the_share_of_frames_asked_for_is_blurred_and_the_rest_is_sharp(share: float) -> None:
    sharp, blurred, frames = (walks(0.5, blur) for blur in (0.0, 1.0, share))
    is_sharp, is_blurred = ((frames == other).all((1, 2, 3)) for other in (sharp, blurred))
    assert np.all(is_sharp ^ is_blurred)
    assert is_blurred.mean() == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / len(frames)))
