from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.datasets.mot_boxes import Box
from training.data.footage import TimedFrame
from training.data.rendering.person import Person as Rendered
from training.data.rendering.walk import CAMERAS, render_walk
from training.engine.feature_extractor import FeatureExtractor
from training.find.looks_human import LEAST, best_score
from training.find.matches import at_the_same_time, rank
from training.find.person import Person, read_person
from training.find.scan import Track
from training.runtime.errors import UserError


def track(number: int, begin: float, end: float) -> Track:
    made = Track(number)
    for frame in range(round(10 * begin), round(10 * end) + 1):
        made.append(TimedFrame(frame + 1, frame / 10, np.zeros((1, 1, 3))), Box(number, 1, 1, 20, 50))
    return made


def test_numbers_are_tracks_and_all_else_is_crops(tmp_path: Path) -> None:
    assert read_person(("7", "12", "7")) == Person(tracks=(7, 12))
    for name in ("10.png", "9.png", "7"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, "png")
    assert read_person((str(tmp_path),)) == Person((tmp_path / "9.png", tmp_path / "10.png"))
    given = (str(tmp_path / "10.png"), str(tmp_path / "7"))
    assert read_person(given) == Person((tmp_path / "10.png", tmp_path / "7")), "in the order in which they are given"
    assert str(read_person((str(tmp_path),))) == f"2 crops in {tmp_path}"
    assert str(Person(tracks=(7, 12))) == "track 7, 12"


def test_of_several_tracks_the_mean_direction_counts() -> None:
    features = {1: np.array([3.0, 0, 0]), 2: np.array([0, 0.5, 0]), 3: np.array([0.0, 0, 9])}
    extractor = FeatureExtractor(device="cpu")
    feature = Person(tracks=(1, 2)).feature(features, extractor)
    np.testing.assert_allclose(feature, [np.sqrt(0.5), np.sqrt(0.5), 0])
    with pytest.raises(UserError, match="track 1: its feature is zero"):
        Person(tracks=(1,)).feature({1: np.zeros(3)}, extractor)


def test_ranks_are_by_cosine_and_of_equal_ones_by_time() -> None:
    tracks = {number: track(number, begin, begin + 1) for number, begin in ((1, 5.0), (2, 3.0), (3, 1.0))}
    features = {1: np.array([2.0, 0]), 2: np.array([5.0, 0]), 3: np.array([1.0, 1])}
    matches = rank(np.array([1.0, 0]), features, tracks)
    assert [(m.rank, m.track.number) for m in matches] == [(1, 2), (2, 1), (3, 3)]
    assert [m.score for m in matches] == pytest.approx([1, 1, np.sqrt(0.5)])


def test_nobody_is_at_two_places_for_more_than_a_second() -> None:
    tracks = {1: track(1, 0, 10), 2: track(2, 9.2, 20), 3: track(3, 8.8, 20), 4: track(4, 12, 15), 5: track(5, 2, 4)}
    assert at_the_same_time(tracks, [tracks[1]]) == {1, 3, 5}
    assert at_the_same_time(tracks, []) == set()
    twice = track(6, 0, 1)
    for frame in range(100, 120):
        twice.append(TimedFrame(frame + 1, frame / 10, np.zeros((1, 1, 3))), Box(6, 1, 1, 20, 50))
    assert at_the_same_time({5: tracks[5]}, [twice]) == set(), "5 is there while 6 is away"


def test_people_score_higher_than_what_is_nobody() -> None:
    rng = np.random.default_rng(3)
    for seed in range(5):
        walk = render_walk(Rendered.sample(np.random.default_rng(seed)), CAMERAS[0], 8, rng, occlusion=0, blur=0)
        assert best_score([np.asarray(image) for image in walk]) > LEAST
    flat = np.full((100, 40, 3), 128, np.uint8)
    slope = np.broadcast_to(np.arange(0, 240, 2, dtype=np.uint8)[:, None, None], (120, 300, 3))
    for nobody in (flat, slope, slope.swapaxes(0, 1)):
        assert best_score([nobody] * 3) < LEAST


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (3, 2)])
def test_crops_of_any_size_are_scored(size: tuple[int, int]) -> None:
    assert np.isfinite(best_score([np.zeros((*size, 3), np.uint8)]))
