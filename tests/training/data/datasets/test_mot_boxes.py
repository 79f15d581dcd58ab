from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from training.data.datasets.mot import load
from training.data.datasets.mot_boxes import parse_int64, read_boxes
from training.runtime.errors import UserError

Write = Callable[..., Path]
LARGEST = 2**63 - 1


def tracks_of(root: Path, *lines: str) -> tuple[list[int], tuple[str, ...]]:
    """Return the tracks of the boxes read from a gt.txt of these lines, and the notes."""
    (root / "gt.txt").write_text("\n".join(lines))
    boxes, notes = read_boxes(root / "gt.txt", 60)
    return [box.track for frame in sorted(boxes) for box in boxes[frame]], notes


def retrack(root: Path, change: Callable[[str], str]) -> None:
    """Replace the track of each line of the written gt.txt."""
    path = root / "gt/gt.txt"
    lines = (line.split(",") for line in path.read_text().splitlines())
    path.write_text("\n".join(",".join([line[0], change(line[1]), *line[2:]]) for line in lines))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12),
        (" 12 ", 12),
        ("0012", 12),
        ("12.", 12),
        ("12.0", 12),
        ("1.2e1", 12),
        ("120E-1", 12),
        ("-0", 0),
        ("-1", -1),
        (str(2**53 + 1), 2**53 + 1),
        (f"{2**53 + 1}.000", 2**53 + 1),
        (str(LARGEST), LARGEST),
        (str(LARGEST + 1), None),
        (str(-LARGEST - 1), -LARGEST - 1),
        (str(-LARGEST - 2), None),
        ("1e400", None),
        ("1e999999999999", None),
        ("1e" + "9" * 99, None),
        ("1e-" + "9" * 99, None),
        ("9" * 5000, None),
        ("1.5", None),
        (f"{2**53}.5", None),
        ("nan", None),
        ("snan", None),
        ("inf", None),
        ("1_0", None),
        ("\u0661", None),
        ("0x1", None),
        ("", None),
        ("1\n2", None),
    ],
)
def test_a_whole_number_is_read_exactly_or_not_at_all(text: str, number: int | None) -> None:
    assert parse_int64(text) == number


@pytest.mark.parametrize("first", [2**53, LARGEST - 1])
def test_neighboring_track_numbers_stay_two_people(mot: Write, first: int) -> None:
    root = mot({0: range(1, 41), 1: range(5, 45)})
    retrack(root, lambda track: str(first + int(track)))
    assert [t.person for t in load(root, 0).train] == [first, first + 1]
    (root / "identities.csv").write_text(f"track,person\n{first},Ann\n{first + 1},Bob\n")
    with pytest.raises(UserError, match="2 tracks of 2 people"):
        load(root, 0)


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("value", [str(LARGEST + 1), "1e400", "nan", "inf", "-inf", "1.5", "1e" + "9" * 99])
def test_a_frame_or_track_that_is_not_whole_or_beyond_int64_is_one_line(
    tmp_path: Path, column: int, value: str
) -> None:
    line = ["1", "1", "1", "1", "9", "9", "1"]
    line[column] = value
    with pytest.raises(UserError, match=r"\A.*gt\.txt, line 2: got '.*', wanted finite numbers, .* within int64\Z"):
        tracks_of(tmp_path, "2,1,1,1,9,9,1", ",".join(line))


@pytest.mark.parametrize("line", ["1,\u0661,1,1,9,9,1", "1,1,\u0661,1,9,9,1", "1,1_0,1,1,9,9,1", "1,1,1_0,1,9,9,1"])
def test_digits_of_other_scripts_and_underscores_are_no_numbers(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError, match=r"\A.*gt\.txt, line 1: got '.*', wanted frame,track,left,.*\Z"):
        tracks_of(tmp_path, line)


def test_boxes_without_an_identity_are_nobody_and_counted(mot: Write) -> None:
    root = mot({1: range(1, 41), 2: range(1, 31)})
    retrack(root, lambda track: {"1": "1", "2": "-1"}[track])
    split = load(root, 0)
    assert [t.person for t in split.train] == [1]
    assert split.description.endswith("; 30 boxes without an identity (-1) left out")
    assert "1 tracks, each taken for a person (0 tracks dropped" in split.description


def test_many_boxes_without_an_identity_may_share_a_frame(tmp_path: Path) -> None:
    tracks, notes = tracks_of(tmp_path, "1,-1,1,1,9,9,1", "1,-1.0,5,1,9,9,1", "1,7,1,1,9,9,1", "1,-1,5,1,9,9,0")
    assert (tracks, notes) == ([7], ("2 boxes without an identity (-1) left out",))


def test_a_file_of_detections_is_one_line(mot: Write) -> None:
    root = mot({1: range(1, 41), 2: range(1, 31)})
    retrack(root, lambda track: "-1")
    with pytest.raises(UserError, match=r"\A.*gt\.txt: no box is left .*: 70 boxes without an identity .* left out\Z"):
        load(root, 0)


@pytest.mark.parametrize("track", ["-2", "-7.0", str(-LARGEST - 1)])
def test_another_negative_track_is_named(tmp_path: Path, track: str) -> None:
    number = int(track.removesuffix(".0"))
    with pytest.raises(UserError, match=rf"line 1: got track {number}, wanted one from 0, or -1 for no identity\Z"):
        tracks_of(tmp_path, f"1,{track},1,1,9,9,1")


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""])
def test_a_byte_order_mark_is_skipped(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "gt.txt").write_bytes(mark + b"1,1,1,1,9,9,1\r\n2,1,1,1,9,9,1\r\n")
    assert sorted(read_boxes(tmp_path / "gt.txt", 60)[0]) == [1, 2]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_a_file_of_another_encoding_is_one_line(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "gt.txt").write_bytes("1,1,1,1,9,9,1\r\n2,1,1,1,9,9,1\r\n".encode(encoding))
    with pytest.raises(UserError, match=r"\A.*gt\.txt, line 1: got '.*', wanted frame,track,left,.*\Z"):
        read_boxes(tmp_path / "gt.txt", 60)


MOT16 = [f"1,{track},1,1,9,9,{confidence},{kind},0.3" for track, confidence, kind in
         ((1, 1, 1), (2, 1, 3), (3, 1, 1), (4, 1, 7), (5, 0, 12), (6, 1, 3))]  # fmt: skip


def test_only_pedestrians_of_several_classes_are_read_and_the_rest_counted(tmp_path: Path) -> None:
    note = "class 1 of 1, 3, 7 read: 3 boxes of other classes left out"
    assert tracks_of(tmp_path, *MOT16) == ([1, 3], (note,))
    assert tracks_of(tmp_path, *(line.replace(",3,0.3", ",3.0,1") for line in MOT16)) == ([1, 3], (note,))


def test_the_description_counts_boxes_of_other_classes(mot: Write) -> None:
    root = mot({1: range(1, 41), 2: range(1, 31)})
    path = root / "gt/gt.txt"
    lines = [line.split(",") for line in path.read_text().splitlines()]
    path.write_text("\n".join(",".join([*line[:7], {"1": "1", "2": "3"}[line[1]], "1"]) for line in lines))
    split = load(root, 0)
    assert [t.person for t in split.train] == [1]
    assert split.description.endswith("; class 1 of 1, 3 read: 30 boxes of other classes left out")


@pytest.mark.parametrize("kind", [1, 3, -1])
def test_a_file_of_one_class_is_read_entirely(tmp_path: Path, kind: int) -> None:
    assert tracks_of(tmp_path, *(f"1,{track},1,1,9,9,1,{kind},0" for track in (1, 2))) == ([1, 2], ())


@pytest.mark.parametrize(
    "rest",
    [
        ("1,0,0", "4,0,0"),  # VisDrone's ten columns
        ("1", "3"),  # no visibility
        ("1,2", "3,2,0"),  # of several widths
    ],
)
def test_classes_are_read_from_any_number_of_columns(tmp_path: Path, rest: tuple[str, str]) -> None:
    lines = (f"1,{track},1,1,9,9,1,{columns}" for track, columns in enumerate(rest, start=1))
    tracks, (note,) = tracks_of(tmp_path, *lines)
    assert tracks == [1]
    assert note.endswith("read: 1 boxes of other classes left out")


@pytest.mark.parametrize("rest", [("1,2.5,0", "3.5,2,0"), ("1,2,0", "100,2,0"), ("-1,-1,-1", "-2,3,0")])
def test_world_coordinates_are_not_classes(tmp_path: Path, rest: tuple[str, str]) -> None:
    lines = (f"1,{track},1,1,9,9,1,{columns}" for track, columns in enumerate(rest, start=1))
    assert tracks_of(tmp_path, *lines) == ([1, 2], ())


def test_a_class_that_is_not_a_whole_number_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 2: got '1.5' in column 8, wanted a class, a whole number"):
        tracks_of(tmp_path, *MOT16[:1], "1,2,1,1,9,9,1,1.5,1")


def test_classes_of_boxes_without_an_identity_are_not_counted_twice(tmp_path: Path) -> None:
    note = "1 boxes without an identity (-1) left out"
    assert tracks_of(tmp_path, "1,-1,1,1,9,9,1,3,1", "1,2,1,1,9,9,1,1,1") == ([2], (note,))


def test_classes_without_pedestrians_are_one_line(tmp_path: Path) -> None:
    message = r"\A.*gt\.txt: got the classes 3, 7 in column 8, wanted 1 \(pedestrian\) or a single class\Z"
    with pytest.raises(UserError, match=message):
        tracks_of(tmp_path, *MOT16[1:2], *MOT16[3:4])


def test_pedestrians_without_an_identity_leave_nobody_and_both_reasons_are_given(tmp_path: Path) -> None:
    reasons = "1 boxes without an identity (-1) left out; class 1 of 1, 3 read: 1 boxes of other classes left out"
    with pytest.raises(UserError, match=re.escape(reasons) + r"\Z"):
        tracks_of(tmp_path, "1,-1,1,1,9,9,1,1,1", "1,2,1,1,9,9,1,3,1")


def test_a_track_may_have_two_boxes_in_a_frame_if_one_is_of_another_class(tmp_path: Path) -> None:
    assert tracks_of(tmp_path, "1,1,1,1,9,9,1,1,1", "1,1,1,1,9,9,1,3,1")[0] == [1]
