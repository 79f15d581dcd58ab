from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from tests.helpers.small_sets import PRID_SPLITS
from training.data import PridPeople
from training.data.datasets import prid_2011
from training.data.tracklets import Split, Tracklet, read_frame
from training.runtime.errors import UserError

MULTI_SHOT = Path("prid_2011/multi_shot")
PROTOCOLS: tuple[PridPeople, ...] = ("paper-21", "official-27")


def load(root: Path, split: int = 0, prid: PridPeople = "paper-21") -> Split:
    return prid_2011.load(root, split, prid=prid, check_counts=False)


def people(tracklets: tuple[Tracklet, ...]) -> list[int]:
    return [tracklet.person for tracklet in tracklets]


def write_json(root: Path, splits: Any) -> Path:
    path = root / "splits_prid2011.json"
    path.write_text(splits if isinstance(splits, str) else json.dumps(splits))
    return path


def test_official_people_have_27_frames_and_the_first_half_of_a_row_is_tested_on(prid: Path) -> None:
    split = load(prid, 0, "official-27")  # ordinals 4 1 | 3 2 into the folders 1, 3, 7, 200
    assert [(t.person, t.camera) for t in split.train] == [(3, 1), (3, 2), (7, 1), (7, 2)]
    assert [(t.person, t.camera) for t in split.query] == [(1, 1), (200, 1)]
    assert [(t.person, t.camera) for t in split.gallery] == [(1, 2), (200, 2)]
    assert split.protocol == "single-shot"
    assert split.query[0].name == "cam_a/person_0001"
    assert load(prid, 1, "official-27").train_people == (1, 200)


def test_the_paper_counts_people_with_more_than_21_frames_under_both_cameras(prid: Path) -> None:
    for number in range(10):
        split = load(prid, number)
        assert sorted(people(split.query) + list(split.train_people)) == [1, 2, 3, 7, 200]
        assert people(split.query) == people(split.gallery)
        assert (len(split.query), len(split.train)) == (2, 6)


def test_random_halves_are_the_same_each_time_and_differ_from_split_to_split(prid: Path) -> None:
    halves = [people(load(prid, number).query) for number in range(10)]
    assert halves == [people(load(prid, number).query) for number in range(10)]
    assert len({tuple(half) for half in halves}) > 4


def test_frames_are_in_order(prid: Path) -> None:
    tracklet = load(prid, 0, "official-27").gallery[1]
    pixels = [read_frame(frame)[:, 0, 0].tolist() for frame in tracklet.frames]
    assert pixels == [[200, 2, frame] for frame in range(1, 29)]


@pytest.mark.parametrize("prid_people", PROTOCOLS)
def test_equal_numbers_above_200_are_different_people(prid: Path, prid_people: PridPeople) -> None:
    split = load(prid, 0, prid_people)
    assert max(people(split.train + split.query)) == 200


def test_the_description_says_which_people_and_which_halves(prid: Path) -> None:
    assert "paper-21 (people with 22 frames or more under both cameras: 5 of 6), random halves 3 of 10 (seed 2011)" in (
        load(prid, 3).description
    )
    official = load(prid, 1, "official-27").description
    assert "official-27 (people with 27 frames or more under both cameras: 4 of 6), split 1 of 2 in " in official
    assert "train_test_splits_prid.mat: 2 people to train on (4 tracklets), 2 other people held out" in official
    write_json(prid, [{"train": ["person_0001"], "test": ["person_0002"]}])
    assert "split 0 of 1 in splits_prid2011.json" in load(prid).description


def test_official_splits_are_found_where_the_ilids_archive_has_them(prid: Path) -> None:
    plain = load(prid, 0, "official-27")
    (prid / "train-test people splits").mkdir()
    (prid / PRID_SPLITS).rename(prid / "train-test people splits" / PRID_SPLITS)
    assert load(prid, 0, "official-27") == plain


def test_the_splits_of_torchreid_are_read_when_they_are_there(prid: Path) -> None:
    write_json(prid, [{}, {"test": ["person_0200", "person_0002"], "train": ["person_0007", "person_0001"]}])
    split = load(prid, 1)
    assert (people(split.query), split.train_people) == ([2, 200], (1, 7))
    assert load(prid, 1, "official-27").train_people == (1, 200), "they are of paper-21 alone"


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ("[{", "not readable JSON"),
        ("\xff", "not readable JSON"),
        ({"train": []}, "got no list of splits"),
        ([], "got no list of splits"),
        ([7], "got no list of folder names as 'test'"),
        ([{"test": ["person_0001"], "train": []}], "got no list of folder names as 'train'"),
        ([{"test": ["person_0001"], "train": [2]}], "got no list of folder names as 'train'"),
        ([{"test": ["person_0001"], "train": ["person_0001"]}], "person_0001 is named twice"),
        ([{"test": ["person_0001"], "train": ["person_0005"]}], "person_0005 is not a folder with 22 frames or more"),
        ([{"test": ["person_0201"], "train": ["person_0001"]}], "person_0201 is not a folder with 22 frames or more"),
    ],
)
def test_a_damaged_json_is_one_line(prid: Path, splits: Any, message: str) -> None:
    path = write_json(prid, splits)
    with pytest.raises(UserError, match=rf"\A{re.escape(str(path))}.*{message}.*\Z"):
        load(prid)


@pytest.mark.parametrize("gone", ["prid_2011", MULTI_SHOT / "cam_a", MULTI_SHOT / "cam_b"])
def test_a_missing_folder_is_named_with_the_layout_wanted(prid: Path, gone: str | Path) -> None:
    shutil.rmtree(prid / gone)
    with pytest.raises(UserError, match=rf"\A{prid / gone}.*: not found; wanted .*cam_a/person_0001/0001\.png.*\Z"):
        load(prid)


def test_a_missing_split_file_is_named_with_where_it_comes_from(prid: Path) -> None:
    (prid / PRID_SPLITS).unlink()
    with pytest.raises(UserError, match=rf"\A{prid / PRID_SPLITS}: not found; .*the iLIDS-VID archive.*paper-21.*\Z"):
        load(prid, 0, "official-27")


@pytest.mark.parametrize("content", [b"", b"not a MATLAB file", b"\0" * 200])
def test_an_unreadable_split_file_is_one_line(prid: Path, content: bytes) -> None:
    (prid / PRID_SPLITS).write_bytes(content)
    with pytest.raises(UserError, match=rf"\A{prid / PRID_SPLITS}: not a readable MATLAB file .*; copy it again\Z"):
        load(prid, 0, "official-27")


def test_ordinals_that_do_not_fit_the_people_are_refused(prid: Path) -> None:
    savemat(prid / PRID_SPLITS, {"ls_set": np.array([[1, 2, 3, 4, 5]])})
    with pytest.raises(
        UserError, match=rf"{prid / PRID_SPLITS}, split 0: got 5 ordinals .* wanted each of 1 to 4 once"
    ):
        load(prid, 0, "official-27")


@pytest.mark.parametrize(("prid_people", "last"), [("paper-21", 9), ("official-27", 1)])
def test_a_split_that_is_not_there_is_refused(prid: Path, prid_people: PridPeople, last: int) -> None:
    for number in (-1, last + 1):
        with pytest.raises(UserError, match=rf"^split: got {number}, wanted 0 to {last}, the "):
            load(prid, number, prid_people)


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(UserError, match="prid: got 'paper', wanted one of paper-21, official-27"):
        prid_2011.load(Path(), 0, prid="paper")  # type: ignore[arg-type]


def test_a_person_without_frames_is_named(prid: Path) -> None:
    folder = prid / MULTI_SHOT / "cam_b/person_0003"
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=rf"^{folder}: no frames; wanted images like 0001\.png"):
        load(prid)


def test_too_few_people_are_reported(prid: Path) -> None:
    for person in (1, 3, 7):
        shutil.rmtree(prid / MULTI_SHOT / f"cam_a/person_{person:04d}")
    with pytest.raises(UserError, match=rf"{prid / MULTI_SHOT}: got 1 people with 27 frames or more"):
        load(prid, 0, "official-27")


def test_stray_files_are_no_people_and_no_frames(prid: Path) -> None:
    plain = load(prid)
    for stray in ("cam_a/.DS_Store", "cam_a/0009", "cam_a/person_0001/._0001.png", "cam_a/person_0001/Thumbs.db"):
        (prid / MULTI_SHOT / stray).touch()
    assert load(prid) == plain


def test_an_unreadable_frame_is_one_line_that_says_what_to_do(prid: Path) -> None:
    frame = load(prid).query[0].frames[0]
    assert isinstance(frame, Path)
    frame.write_bytes(frame.read_bytes()[:40])
    with pytest.raises(UserError, match=rf"\Aframe {frame}: not a readable image \(.*\); copy it again\Z"):
        read_frame(frame)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of the real dataset, for people of either protocol, of empty files: reading opens none."""
    root = tmp_path_factory.mktemp("published")
    for camera in ("cam_a", "cam_b"):
        for person in range(1, 211):
            folder = root / MULTI_SHOT / camera / f"person_{person:04d}"
            folder.mkdir(parents=True)
            for frame in range(1, 1 + (27 if person <= 178 or camera == "cam_a" else 24)):
                (folder / f"{frame:04d}.png").touch()
    rows = [np.random.default_rng(row).permutation(178) + 1 for row in range(10)]
    savemat(root / PRID_SPLITS, {"ls_set": np.stack(rows)})
    return root


def test_a_whole_set_has_178_official_people_89_of_them_to_train_on(published: Path) -> None:
    for number in (0, 9):
        split = prid_2011.load(published, number, prid="official-27")
        assert (len(split.train), len(split.query), len(split.gallery)) == (178, 89, 89)
    assert len(prid_2011.load(published, 9).query) == 100


def test_another_number_of_official_people_is_reported(published: Path) -> None:
    frame = published / MULTI_SHOT / "cam_b/person_0100/0027.png"
    frame.unlink()
    try:
        with pytest.raises(UserError) as caught:
            prid_2011.load(published, 0, prid="official-27")
    finally:
        frame.touch()
    assert str(caught.value) == (
        f"{published / MULTI_SHOT}: got 177 people with 27 frames or more under both cameras, wanted 178; copy the "
        "dataset again, or read a part of it with --no-check-counts"
    )


@pytest.mark.parametrize("prid_people", PROTOCOLS)
def test_fewer_than_200_common_people_are_reported_by_camera(prid: Path, prid_people: PridPeople) -> None:
    with pytest.raises(UserError, match=rf"^{prid / MULTI_SHOT}/cam_a: got 6 person folders .*, wanted 200; copy"):
        prid_2011.load(prid, 0, prid=prid_people)
