from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from training.data.ilids_vid import SPLITS, load
from training.data.tracklets import read_frame
from training.errors import UserError

SEQUENCES = Path("i-LIDS-VID/sequences")


def test_the_first_half_of_a_row_is_tested_on_and_the_second_trained_on(ilids: Path) -> None:
    split = load(ilids, 0, check_counts=False)  # ordinals 4 1 | 3 2 into the folders 1, 2, 4, 319
    assert split.train_people == (2, 4)
    assert [(t.person, t.camera) for t in split.train] == [(2, 1), (2, 2), (4, 1), (4, 2)]
    assert [(t.person, t.camera) for t in split.probe] == [(1, 1), (319, 1)]
    assert [(t.person, t.camera) for t in split.gallery] == [(1, 2), (319, 2)]
    assert split.protocol == "single-shot"
    assert load(ilids, 1, check_counts=False).train_people == (1, 319)


def test_frames_are_in_the_order_of_their_numbers(ilids: Path) -> None:
    probe = load(ilids, 0, check_counts=False).probe[1]
    assert probe.name == "cam1/person319"
    assert [read_frame(frame)[:, 0, 0].tolist() for frame in probe.frames] == [[63, 1, 9], [63, 1, 10], [63, 1, 101]]


def test_a_folder_nested_twice_reads_the_same(ilids: Path) -> None:
    plain = load(ilids, 0, check_counts=False)
    (ilids / "i-LIDS-VID").rename(ilids / "inner")
    (ilids / "i-LIDS-VID").mkdir()
    (ilids / "inner").rename(ilids / "i-LIDS-VID/i-LIDS-VID")
    nested = load(ilids, 0, check_counts=False)
    assert [t.name for t in nested.train + nested.probe] == [t.name for t in plain.train + plain.probe]
    assert nested.probe[0].frames[0] == ilids / "i-LIDS-VID" / SEQUENCES / "cam1/person001/cam1_person001_9.png"


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
