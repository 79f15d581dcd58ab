"""The readers of people in folders and in a table."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data import load_split
from training.data.datasets.csv import COLUMNS
from training.data.tracklets import Split, read_pixels
from training.pack import Options as PackOptions
from training.pack import pack
from training.runtime.errors import NoSuchSplit, UserError

PEOPLE = ("anna", "bob", "cleo", "dan", "eve", "fay")
CAMERAS = ("door", "yard")


def image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 8), (value, value, value)).save(path)


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Six people by two cameras, twice by the second; frames 1, 2 and 10, whose value is their number."""
    root = tmp_path / "people"
    for person in PEOPLE:
        for folder in ("door", "yard/first", "yard/second"):
            for number in (1, 2, 10):
                image(root / person / folder / f"{number}.png", number)
    (root / "notes.txt").write_text("not a person")
    (root / ".hidden").mkdir()
    return root


def table(path: Path, rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def names(split: Split, part: str) -> list[str]:
    return [tracklet.name for tracklet in split.part(part)]


def test_half_of_the_people_are_held_out(people: Path) -> None:
    split = load_split("folder", people, 0)
    tested = {name.partition("/")[0] for name in names(split, "gallery")}
    assert len(tested) == 3
    assert names(split, "train") == [
        f"{p}/{f}" for p in PEOPLE if p not in tested for f in ("door", "yard/first", "yard/second")
    ]
    assert names(split, "query") == [f"{p}/{f}" for p in PEOPLE if p in tested for f in ("door", "yard/first")]
    assert [query in split.gallery for query in split.query] == [True] * 6
    assert {t.person for t in split.part("all")} == {1, 2, 3, 4, 5, 6}
    assert {(t.name.split("/")[1], t.camera) for t in split.part("all")} == {("door", 1), ("yard", 2)}
    assert split.protocol == "mars-standard-ap"
    assert [int(read_pixels(frame)[0, 0, 0]) for frame in split.train[0].frames] == [1, 2, 10]
    assert "3 people to train on (9 tracklets), 3 other people held out, 6 queries" in split.description


def test_names_are_of_the_numbers(people: Path) -> None:
    split = load_split("folder", people, 0)
    assert split.names == dict(enumerate(PEOPLE, start=1))
    assert split.names_of(split.query) == {name.partition("/")[0] for name in names(split, "query")}


def test_the_halves_are_seeded(people: Path) -> None:
    halves = [tuple(sorted({t.person for t in load_split("folder", people, number).query})) for number in range(10)]
    assert halves == [tuple(sorted({t.person for t in load_split("folder", people, n).query})) for n in range(10)]
    assert len(set(halves)) > 3
    with pytest.raises(NoSuchSplit, match="split: got 10, wanted 0 to 9, the random halves"):
        load_split("folder", people, 10)


def test_someone_of_one_camera_is_trained_on(people: Path) -> None:
    for number in range(4):
        image(people / f"guest{number}" / "door" / "1.png")
    for number in range(10):
        split = load_split("folder", people, number)
        assert not {t.person for t in split.query} & {t.person for t in split.train}
        assert not any("guest" in name for name in names(split, "gallery"))
        assert len({t.person for t in split.query}) == 3


def test_parts_of_ones_own_are_kept(people: Path, tmp_path: Path) -> None:
    root = tmp_path / "parted"
    for part, who in (("train", "anna"), ("train", "bob"), ("query", "cleo"), ("gallery", "cleo"), ("gallery", "dan")):
        camera = "yard" if part == "gallery" else "door"
        image(root / part / who / camera / "1.png")
    split = load_split("folder", root, 0)
    assert names(split, "train") == ["anna/door", "bob/door"]
    assert names(split, "query") == ["cleo/door"]
    assert names(split, "gallery") == ["cleo/yard", "dan/yard"]
    assert split.query[0].person == split.gallery[0].person
    with pytest.raises(NoSuchSplit, match="got 1, wanted 0"):
        load_split("folder", root, 1)
    image(root / "train" / "cleo" / "door" / "1.png")
    with pytest.raises(UserError, match=r"cleo is in train and in query, wanted people .* that are not trained on"):
        load_split("folder", root, 0)


def test_a_query_and_gallery_alone_can_be_evaluated(tmp_path: Path) -> None:
    for part, camera in (("query", "door"), ("gallery", "yard")):
        image(tmp_path / part / "cleo" / camera / "1.png")
    split = load_split("folder", tmp_path, 0)
    assert (split.train, len(split.query), len(split.gallery)) == ((), 1, 1)


def test_names_that_are_numbers_are_the_numbers(tmp_path: Path) -> None:
    for person in ("007", "12", "3"):
        for camera in ("1", "4"):
            image(tmp_path / person / camera / "1.png")
    split = load_split("folder", tmp_path, 0)
    assert {t.person for t in split.part("all")} == {3, 7, 12}
    assert {t.camera for t in split.part("all")} == {1, 4}
    image(tmp_path / "7" / "1" / "1.png")  # and 007 is another
    assert {t.person for t in load_split("folder", tmp_path, 0).part("all")} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("rm", "ROOT: not found; wanted a folder with anna/entrance/0001.png, or anna/entrance/first-visit/0001.png"),
        ("mkdir", "ROOT: got no folder in it, wanted a folder for each person, as anna/entrance/0001.png"),
        ("mkdir anna", "ROOT/anna: got no folder in it, wanted a folder for each camera, as anna/entrance/0001.png"),
        ("mkdir anna/door", "ROOT/anna/door: got no image, wanted anna/entrance/0001.png"),
        ("image 1.png", "ROOT: got the image 1.png, wanted a folder for each person, as anna/entrance/0001.png"),
        ("image anna/1.png", "ROOT/anna: got the image 1.png, wanted a folder for each camera"),
        ("image anna/door/1.png anna/door/a/1.png", "ROOT/anna/door: got 1.png next to a/, wanted anna/entrance"),
        ("image anna/door/1.png anna/yard/1.png", "people in folders in ROOT: got 1 people, 1 of them by two cameras"),
        ("image a/1/1.png b/1/1.png c/1/1.png", "people in folders in ROOT: got 3 people, 0 of them by two cameras"),
        ("image train/anna/door/1.png", "people in folders in ROOT: got nothing as query, wanted train, query and gal"),
        ("image query/anna/door/1.png", "people in folders in ROOT: got nothing as gallery"),
        (
            "image Query/anna/a/1.png gallery/anna/a/2.png",
            "people in folders in ROOT: got no query with the same person",
        ),
        (
            "image query/anna/a/1.png gallery/bob/b/2.png",
            "people in folders in ROOT: got no query with the same person",
        ),
        ("image query/anna/door/1.png bob/door/1.png", "ROOT: got bob/ next to query/, wanted only train/, query/ and"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(tmp_path: Path, spoil: str, message: str) -> None:
    root = tmp_path / "people"
    how, *paths = spoil.split()
    if how == "mkdir":
        (root / "".join(paths)).mkdir(parents=True)
    for path in paths if how == "image" else ():
        image(root / path)
    with pytest.raises(UserError, match="^" + re.escape(message.replace("ROOT", str(root)))) as raised:
        load_split("folder", root, 0)
    assert "\n" not in str(raised.value)


def test_a_table_is_what_it_says(people: Path, tmp_path: Path) -> None:
    rows = [
        (f"people/{person}/door/{number}.png", person, "door", "", "")
        for person in PEOPLE
        for number in (10, 1, 2)  # in this order
    ]
    rows += [
        (f"people/{person}/yard/{visit}", person, "yard", visit, "")
        for person in PEOPLE
        for visit in ("first", "second")
    ]
    path = table(tmp_path / "people.csv", rows)
    by_table, by_folder = load_split("csv", path, 3), load_split("folder", people, 3)
    assert set(names(by_table, "query")) == set(names(by_folder, "query"))
    assert set(names(by_table, "gallery")) == set(names(by_folder, "gallery"))
    (first,) = (t for t in by_table.part("all") if t.name == "anna/door")
    assert [int(read_pixels(frame)[0, 0, 0]) for frame in first.frames] == [10, 1, 2]
    (visit,) = (t for t in by_table.part("all") if t.name == "anna/yard/first")
    assert [int(read_pixels(frame)[0, 0, 0]) for frame in visit.frames] == [1, 2, 10]


def test_a_table_has_parts_and_columns_in_any_order(people: Path, tmp_path: Path) -> None:
    rows = [
        ("train", "x", "1", "people/anna/door/1.png", "door", "anna"),
        ("query", "x", "1", "people/bob/door/1.png", "door", "bob"),
        ("gallery", "x", "1", "people/bob/yard/first", "yard", "bob"),
    ]
    path = table(tmp_path / "people.csv", rows, ("Part", "other", " tracklet", "path", "camera", "PERSON"))
    # As a spreadsheet saves it.
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b",", b";").replace(b"train;", b" Train;"))
    split = load_split("csv", path, 0)
    assert [names(split, part) for part in ("train", "query", "gallery")] == [
        ["anna/door/1"],
        ["bob/door/1"],
        ["bob/yard/1"],
    ]


ROW = ("people/anna/door/1.png", "anna", "door", "1", "")
OTHER = "people/anna/door/2.png"


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        (
            COLUMNS[:4],
            [ROW[:4]],
            "PATH: got no column part in 'path,person,camera,tracklet', wanted the lines path,person",
        ),
        (("file", *COLUMNS[1:]), [ROW], "PATH: got no column path in 'file,person,camera,tracklet,part'"),
        ((), [], "PATH: got no column path in '', wanted the lines path,person,camera,tracklet,part and anna/0001"),
        (COLUMNS, [], "PATH: got no line after the columns, wanted path,person,camera,tracklet,part and anna"),
        (COLUMNS, [("", "anna", "door", "1", "")], "PATH, line 2: got no path, wanted a line as path,person"),
        (COLUMNS, [ROW, ("people/anna/door/1.png", "", "door", "1", "")], "PATH, line 3: got no person"),
        (COLUMNS, [ROW[:2]], "PATH, line 2: got no camera"),
        (
            COLUMNS,
            [("people/gone.png", *ROW[1:])],
            "PATH, line 2: there is no ROOT/people/gone.png, wanted an image, or",
        ),
        (COLUMNS, [ROW, ROW], "PATH, line 3: ROOT/people/anna/door/1.png is in line 2 already, wanted each frame once"),
        (COLUMNS, [("people.csv", *ROW[1:])], "PATH, line 2: got ROOT/people.csv, wanted an image, or a folder of im"),
        (COLUMNS, [("people/anna", *ROW[1:])], "PATH, line 2: got no image in ROOT/people/anna, wanted the frames"),
        (COLUMNS, [(*ROW[:4], "test")], "PATH, line 2: got part 'test', wanted train, query, gallery, or none in any"),
        (
            COLUMNS,
            [ROW, (OTHER, *ROW[1:4], "query")],
            "PATH: got lines with a part and lines without, wanted all or none",
        ),
        (COLUMNS, [ROW], "people in PATH: got 1 people, 0 of them by two cameras or more, wanted at least 3 and 2"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line(
    people: Path, tmp_path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]], message: str
) -> None:
    path = table(tmp_path / "people.csv", rows, columns)
    wanted = message.replace("PATH", str(path)).replace("ROOT", str(tmp_path))
    with pytest.raises(UserError, match="^" + re.escape(wanted)) as raised:
        load_split("csv", path, 0)
    assert "\n" not in str(raised.value)


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"got a folder, wanted a .csv file with the lines path,person"):
        load_split("csv", tmp_path, 0)
    (tmp_path / "utf16.csv").write_bytes("path,person".encode("utf-16"))
    with pytest.raises(UserError, match=r"utf16.csv: got a file that is not UTF-8, wanted one, with the lines path,"):
        load_split("csv", tmp_path / "utf16.csv", 0)
    with pytest.raises(UserError, match=r"none.csv: not found; wanted a .csv file with the lines path,person"):
        load_split("csv", tmp_path / "none.csv", 0)


@pytest.mark.parametrize("dataset", ["folder", "csv"])
def test_own_people_are_packed(people: Path, tmp_path: Path, dataset: str) -> None:
    rows = [(f"people/{p}/{f}", p, f[:4], f[5:], "") for p in PEOPLE for f in ("door", "yard/first", "yard/second")]
    root = people if dataset == "folder" else table(tmp_path / "people.csv", rows)
    pack(PackOptions(dataset, tmp_path / "own.pack", root))  # type: ignore[arg-type]
    for number in (0, 9):
        packed, read = (load_split(dataset, path, number) for path in (tmp_path / "own.pack", root))
        assert names(packed, "all") == names(read, "all")
        assert (packed.description, packed.names) == (read.description, read.names)
        pixels = [[read_pixels(frame) for t in split.part("all") for frame in t.frames] for split in (packed, read)]
        assert all(np.array_equal(a, b) for a, b in zip(*pixels, strict=True))


def test_a_pack_is_no_table_to_pack(people: Path, tmp_path: Path) -> None:
    rows = [(f"people/{p}/{f}", p, f[:4], f[5:], "") for p in PEOPLE for f in ("door", "yard/first")]
    path = table(tmp_path / "people.csv", rows)
    pack(PackOptions("csv", tmp_path / "own.pack", path))
    with pytest.raises(UserError, match=r"^data_root: got the file .*own.pack, wanted a dataset's folder"):
        pack(PackOptions("csv", tmp_path / "other.pack", tmp_path / "own.pack"))
