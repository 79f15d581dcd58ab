from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from training.data.datasets.ilids_vid import SPLITS, load
from training.data.tracklets import read_frame
from training.runtime.errors import UserError

SEQUENCES = Path("i-LIDS-VID/sequences")


def test_the_first_half_of_a_row_is_tested_on_and_the_second_trained_on(ilids: Path) -> None:
    split = load(ilids, 0, check_counts=False)  # ordinals 4 1 | 3 2 into the folders 1, 2, 4, 319
    assert split.train_people == (2, 4)
    assert [(t.person, t.camera) for t in split.train] == [(2, 1), (2, 2), (4, 1), (4, 2)]
    assert [(t.person, t.camera) for t in split.query] == [(1, 1), (319, 1)]
    assert [(t.person, t.camera) for t in split.gallery] == [(1, 2), (319, 2)]
    assert split.protocol == "single-shot"
    assert load(ilids, 1, check_counts=False).train_people == (1, 319)


def test_frames_are_in_the_order_of_their_numbers(ilids: Path) -> None:
    query = load(ilids, 0, check_counts=False).query[1]
    assert query.name == "cam1/person319"
    assert [read_frame(frame)[:, 0, 0].tolist() for frame in query.frames] == [[63, 1, 9], [63, 1, 10], [63, 1, 101]]


def test_a_folder_nested_twice_reads_the_same(ilids: Path) -> None:
    plain = load(ilids, 0, check_counts=False)
    (ilids / "i-LIDS-VID").rename(ilids / "inner")
    (ilids / "i-LIDS-VID").mkdir()
    (ilids / "inner").rename(ilids / "i-LIDS-VID/i-LIDS-VID")
    nested = load(ilids, 0, check_counts=False)
    assert [t.name for t in nested.train + nested.query] == [t.name for t in plain.train + plain.query]
    assert nested.query[0].frames[0] == ilids / "i-LIDS-VID" / SEQUENCES / "cam1/person001/cam1_person001_9.png"


def test_stray_files_are_no_people_and_no_frames(ilids: Path) -> None:
    plain = load(ilids, 0, check_counts=False)
    (ilids / SEQUENCES / "cam1/.DS_Store").touch()
    (ilids / SEQUENCES / "cam1/person001/._cam1_person001_9.png").touch()
    (ilids / SEQUENCES / "cam1/person001/Thumbs.db").touch()
    assert load(ilids, 0, check_counts=False) == plain


@pytest.mark.parametrize("gone", ["i-LIDS-VID", SPLITS, SEQUENCES / "cam2", SEQUENCES / "cam2/person004"])
def test_a_missing_path_is_named_with_the_layout_wanted(ilids: Path, gone: str | Path) -> None:
    path = ilids / gone
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}.*: not found; wanted") as caught:
        load(ilids, 0, check_counts=False)
    assert "\n" not in str(caught.value)


def test_a_person_without_frames_is_named(ilids: Path) -> None:
    folder = ilids / SEQUENCES / "cam2/person004"
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=rf"{folder}: no frames"):
        load(ilids, 0, check_counts=False)


def test_a_frame_without_a_number_is_named(ilids: Path) -> None:
    (ilids / SEQUENCES / "cam1/person001/cover.png").touch()
    with pytest.raises(UserError, match=r"cover\.png: no frame number"):
        load(ilids, 0, check_counts=False)


@pytest.mark.parametrize("split", [-1, 2])
def test_a_split_that_is_not_there_is_refused(ilids: Path, split: int) -> None:
    with pytest.raises(UserError, match=f"got {split}, wanted 0 to 1"):
        load(ilids, split, check_counts=False)


@pytest.mark.parametrize("row", [[0, 1, 2, 3], [1, 2, 3, 5], [1, 2, 3, 3], [1, 2, 3]])
def test_ordinals_that_do_not_fit_the_folders_are_refused(ilids: Path, row: list[int]) -> None:
    savemat(ilids / SPLITS, {"ls_set": np.array([row])})
    with pytest.raises(UserError, match="wanted each of 1 to 4 once"):
        load(ilids, 0, check_counts=False)


def test_a_split_file_without_ls_set_is_refused(ilids: Path) -> None:
    savemat(ilids / SPLITS, {"other": np.eye(2)})
    with pytest.raises(UserError, match="no key ls_set"):
        load(ilids, 0, check_counts=False)


@pytest.mark.parametrize("content", [b"", b"not a MATLAB file", b"\0" * 200, b"\x89HDF\r\n\x1a\n" * 30])
def test_a_split_file_of_something_else_is_refused_in_one_line(ilids: Path, content: bytes) -> None:
    (ilids / SPLITS).write_bytes(content)
    with pytest.raises(UserError, match="not a readable MATLAB file") as caught:
        load(ilids, 0, check_counts=False)
    assert "\n" not in str(caught.value)


def test_a_truncated_split_file_is_refused(ilids: Path) -> None:
    (ilids / SPLITS).write_bytes((ilids / SPLITS).read_bytes()[:-20])
    with pytest.raises(UserError, match=re.escape(SPLITS.name)):
        load(ilids, 0, check_counts=False)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 2.5, 2 + 1j])
def test_ordinals_that_are_not_whole_numbers_are_refused(ilids: Path, wrong: complex) -> None:
    savemat(ilids / SPLITS, {"ls_set": np.array([[4, 1, 3, wrong]])})
    with pytest.raises(UserError, match=rf"{re.escape(SPLITS.name)}: ls_set has"):
        load(ilids, 0, check_counts=False)


def test_a_split_file_cut_short_anywhere_is_one_line(ilids: Path) -> None:
    whole = (ilids / SPLITS).read_bytes()
    for length in range(len(whole)):
        (ilids / SPLITS).write_bytes(whole[:length])
        with pytest.raises(UserError, match=re.escape(SPLITS.name)) as caught:
            load(ilids, 0, check_counts=False)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of the real dataset with its counts, of empty files: reading opens none."""
    root = tmp_path_factory.mktemp("published")
    for camera in (1, 2):
        for ordinal in range(300):
            person = ordinal + 1 if ordinal < 281 else ordinal + 20  # a gap, up to 319
            folder = root / SEQUENCES / f"cam{camera}/person{person:03d}"
            folder.mkdir(parents=True)
            for frame in range(192 if ordinal == camera else 23):
                (folder / f"cam{camera}_person{person:03d}_{frame + 1:05d}.png").touch()
    (root / SPLITS).parent.mkdir()
    rows = [np.random.default_rng(row).permutation(300) + 1 for row in range(10)]
    savemat(root / SPLITS, {"ls_set": np.stack(rows).astype(np.uint16)})
    return root


def test_a_whole_set_has_the_published_counts_in_each_split(published: Path) -> None:
    for number in (0, 9):
        split = load(published, number)
        assert (len(split.train), len(split.query), len(split.gallery)) == (300, 150, 150)
        assert len(split.train_people) == 150
        assert not {t.person for t in split.query} & set(split.train_people)
        assert {len(t.frames) for t in split.train + split.query + split.gallery} == {23, 192}
    with pytest.raises(UserError, match=r"got 10, wanted 0 to 9"):
        load(published, 10)


def test_a_person_too_few_is_reported_and_what_to_do(ilids: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(ilids, 0)
    assert str(caught.value) == (
        f"{ilids / SEQUENCES}: got 4 person folders a camera, wanted 300; copy the dataset again, or read a part of it "
        "with --no-check-counts"
    )


def test_a_split_too_few_is_reported(published: Path, tmp_path: Path) -> None:
    (tmp_path / "i-LIDS-VID").symlink_to(published / "i-LIDS-VID")
    (tmp_path / SPLITS).parent.mkdir()
    savemat(tmp_path / SPLITS, {"ls_set": np.stack([np.arange(300) + 1] * 9)})
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / SPLITS))}: got 9 splits, wanted 10; copy"):
        load(tmp_path, 0)
    assert len(load(tmp_path, 8, check_counts=False).train) == 300


@pytest.mark.parametrize("frames", [22, 193])
def test_a_tracklet_of_another_length_than_published_is_named(published: Path, frames: int) -> None:
    folder = published / SEQUENCES / "cam2/person319"
    whole = sorted(folder.iterdir())
    added = [folder / f"cam2_person319_{frame + 1:05d}.png" for frame in range(len(whole), frames)]
    for path in added:
        path.touch()
    for path in whole[frames:]:
        path.unlink()
    try:
        with pytest.raises(UserError, match=rf"^{folder}: got {frames} frames, wanted 23 to 192; copy the dataset"):
            load(published, 0)
    finally:
        for path in added:
            path.unlink()
        for path in whole:
            path.touch()


def test_an_unreadable_frame_is_one_line_that_says_what_to_do(ilids: Path) -> None:
    frame = load(ilids, 0, check_counts=False).query[0].frames[0]
    assert isinstance(frame, Path)
    frame.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=rf"\Aframe {frame}: not a readable image \(.*\); copy it again\Z"):
        read_frame(frame)
