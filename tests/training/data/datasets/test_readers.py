from __future__ import annotations

from pathlib import Path

import pytest

from training.data.datasets import ilids_vid, prid_2011
from training.data.datasets.readers import numbered_frames, person_folders
from training.runtime.errors import UserError


def test_frames_are_in_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("a10.png", "b9.png", "c011.png"):
        (tmp_path / name).touch()
    assert [path.name for path in numbered_frames(tmp_path, "1.png")] == ["b9.png", "a10.png", "c011.png"]


@pytest.mark.parametrize("name", ["frame\u0661.png", "frame.png", "1\n.png"])
def test_digits_of_other_scripts_number_no_frame(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"no frame number; wanted a name like 1\.png"):
        numbered_frames(tmp_path, "1.png")


def test_person_folders_have_the_number_they_end_in(tmp_path: Path) -> None:
    for name in ("person001", "person12", "person\u0661", "person", "notes"):
        (tmp_path / name).mkdir()
    assert person_folders(tmp_path, "person") == {"person001": 1, "person12": 12}


def test_two_folders_of_one_number_are_no_two_people(ilids: Path) -> None:
    for camera in (1, 2):
        folder = ilids / f"i-LIDS-VID/sequences/cam{camera}"
        (folder / "person002").rename(folder / "person01")
    with pytest.raises(UserError, match=r"\A.*cam1: person001 and person01 are both person 1, wanted one\Z"):
        ilids_vid.load(ilids, 0, check_counts=False)


def test_a_person_beyond_int64_is_one_line(ilids: Path) -> None:
    for camera in (1, 2):
        folder = ilids / f"i-LIDS-VID/sequences/cam{camera}"
        (folder / "person319").rename(folder / f"person{2**63}")
    with pytest.raises(UserError, match=rf"\Atracklet cam./person{2**63}: got person {2**63}, wanted .* int64\Z"):
        ilids_vid.load(ilids, 0, check_counts=False)


def test_splits_nested_too_deep_are_one_line(prid: Path) -> None:
    (prid / "splits_prid2011.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"\A.*splits_prid2011\.json: not readable JSON \(.*\); copy it again, or .*\Z"):
        prid_2011.load(prid, 0, check_counts=False)
