from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from training.data.datasets import ilids_vid, synthetic
from training.data.tracklets import Tracklet, read_frame
from training.runtime.command import run_command
from training.runtime.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "eight"
    synthetic.generate(folder, people=8, seed=5)
    return folder


def contents(root: Path) -> dict[Path, bytes]:
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_reader_of_the_real_layout_reads_it(root: Path) -> None:
    splits = [ilids_vid.load(root, split, check_counts=False) for split in range(10)]
    assert len({split.train_people for split in splits}) > 5
    for split in splits:
        assert len(split.train) == 8
        assert len(split.query) == len(split.gallery) == 4
        assert {t.person for t in split.query} == {t.person for t in split.gallery}
        assert not {t.person for t in split.query} & set(split.train_people)
        for tracklet in split.train:
            assert 16 <= len(tracklet.frames) <= 40
            assert read_frame(tracklet.frames[-1]).shape == (3, 128, 64)


def test_the_same_seed_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    synthetic.generate(tmp_path / "again", people=8, seed=5)
    assert contents(tmp_path / "again") == contents(root)


def test_the_default_pictures_are_those_of_the_readmes_figures(tmp_path: Path) -> None:
    synthetic.generate(tmp_path / "set", people=2)
    digest = hashlib.sha256()
    for path in sorted((tmp_path / "set").rglob("*.png")):
        digest.update(read_frame(path).numpy().tobytes())  # the pixels: how well zlib packs them is its own affair
    assert digest.hexdigest() == "9006b6a6e0102c5398313e29b8ead07911f69e3fbbbbe4d64000fe8d08c4212b", (
        "raise RENDERER, and measure the README's figures again"
    )
    assert json.loads((tmp_path / "set" / synthetic.MANIFEST).read_text()) == {"people": 2, "seed": 0, "renderer": 1}


def test_a_set_records_its_rates_and_is_not_taken_for_one_of_others(tmp_path: Path) -> None:
    asked = {"people": 2, "seed": 0, "occlusion": 0.5, "blur": 0.3}
    synthetic.generate(tmp_path / "set", **asked)
    assert json.loads((tmp_path / "set" / synthetic.MANIFEST).read_text()) == {**asked, "renderer": 1}
    for other in ({**asked, "occlusion": 0.6}, {**asked, "blur": None}, {"people": 2}):
        with pytest.raises(UserError, match=r"holds a synthetic set of .*'occlusion': 0\.5, 'blur': 0\.3}, wanted"):
            synthetic.generate(tmp_path / "set", **other)


@pytest.mark.parametrize("rate", [-0.1, 1.01, float("nan")])
@pytest.mark.parametrize("name", ["occlusion", "blur"])
def test_rates_that_are_no_shares_are_refused(tmp_path: Path, name: str, rate: float) -> None:
    with pytest.raises(UserError, match=f"^{name}: got {rate}, wanted a share of frames, 0 to 1$"):
        synthetic.generate(tmp_path / "set", people=2, **{name: rate})


def test_a_person_looks_the_same_in_a_smaller_set_and_not_with_another_seed(root: Path, tmp_path: Path) -> None:
    synthetic.generate(tmp_path / "smaller", people=2, seed=5)
    synthetic.generate(tmp_path / "other", people=2, seed=6)
    frame = ilids_vid.EXAMPLE
    assert (tmp_path / "smaller" / frame).read_bytes() == (root / frame).read_bytes()
    assert (tmp_path / "other" / frame).read_bytes() != (root / frame).read_bytes()


def test_the_mean_color_of_one_frame_does_not_identify_a_person(root: Path) -> None:
    def mean_color(tracklet: Tracklet) -> np.ndarray:
        return read_frame(tracklet.frames[0]).float().mean(dim=(1, 2)).numpy()

    split = ilids_vid.load(root, 0, check_counts=False)
    query, gallery = (np.stack([mean_color(t) for t in side]) for side in (split.query, split.gallery))
    distances = np.linalg.norm(query[:, None] - gallery, axis=-1)
    same, other = np.diag(distances).mean(), distances[~np.eye(4, dtype=bool)].mean()
    assert same > 0.8 * other, "the cameras' light and color must outweigh the clothes in a plain mean"


def test_a_tracklet_moves(root: Path) -> None:
    for tracklet in ilids_vid.load(root, 0, check_counts=False).train:
        first, later = (read_frame(tracklet.frames[t]).float() for t in (0, 8))
        assert (first - later).abs().mean() > 8


def test_a_set_that_is_there_is_left_alone(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    synthetic.generate(root, people=8, seed=5)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_set_made_otherwise_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"holds a synthetic set of .*'seed': 5.*, wanted .*'seed': 0"):
        synthetic.load(root, 0)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"has no readable synthetic\.json"):
        synthetic.generate(tmp_path, people=2)
    assert contents(tmp_path) == {Path("thesis.txt"): b"mine"}


def test_an_interrupted_set_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "render_walk", interrupt)
    with pytest.raises(KeyboardInterrupt):
        synthetic.generate(tmp_path / "set", people=2)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        synthetic.generate(tmp_path / "file" / "set", people=2)


@pytest.mark.parametrize(("people", "seed", "name"), [(1, 0, "people"), (4, -1, "seed")])
def test_arguments_out_of_range_are_named(tmp_path: Path, people: int, seed: int, name: str) -> None:
    with pytest.raises(UserError, match=f"^{name}: got"):
        synthetic.generate(tmp_path / "set", people, seed)


def test_the_command_line_makes_a_set(tmp_path: Path) -> None:
    options = ["--root", str(tmp_path / "set"), "--people", "2", "--occlusion", "0.5", "--blur", "0.3"]
    command = [sys.executable, "-m", "training.data.synthetic", *options]
    made = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert made.stdout == f"rendered people in the iLIDS-VID layout: {tmp_path / 'set'}\n"
    assert "Warning" not in made.stderr
    assert len(ilids_vid.load(tmp_path / "set", 9, check_counts=False).train) == 2
    synthetic.generate(tmp_path / "set", people=2, occlusion=0.5, blur=0.3)  # which refuses a set of other options


def test_the_command_line_refuses_in_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: synthetic.generate(root, people=3))
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {root}: holds")
    assert message.count("\n") == 1
