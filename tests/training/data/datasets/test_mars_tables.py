from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from tests.helpers.small_sets import write_mars
from training.data.datasets.mars_tables import PUBLISHED, QUERY, TEST, TRAIN, Tables, count, read_tables
from training.runtime.errors import UserError

KEYS = {TRAIN: "track_train_info", TEST: "track_test_info", QUERY: "query_IDX"}


@pytest.fixture
def real(shared_dir: Path) -> Path:
    return shared_dir / "data/mars-info"


@pytest.fixture
def tables(real: Path) -> Tables:
    return read_tables(real)


@pytest.mark.shared
def test_the_real_train_table(tables: Tables) -> None:
    train = tables.train
    people, tracklets = np.unique(train.person, return_counts=True)
    cameras = {int(person): set(train.camera[train.person == person].tolist()) for person in people}
    assert (len(train.person), len(people), train.lengths.sum()) == (8298, 625, 509_914)
    assert (tracklets.min(), tracklets.max()) == (1, 271)
    assert sum(len(seen) == 1 for seen in cameras.values()) == 6
    assert set.union(*cameras.values()) == {1, 2, 3, 4, 5, 6}
    assert (train.lengths >= 8).sum() == 8212
    assert people.min() > 0


@pytest.mark.shared
def test_the_real_test_table(tables: Tables) -> None:
    test = tables.test
    assert (len(test.person), test.lengths.sum()) == (12_180, 681_089)
    assert (test.lengths.min(), test.lengths.max()) == (2, 920)
    assert ((test.person == -1).sum(), (test.person == 0).sum()) == (870, 3248)
    assert test.person.min() == -1


@pytest.mark.shared
def test_the_real_tables_take_each_row_of_the_name_lists_once(tables: Tables) -> None:
    for tracks, frames in ((tables.train, 509_914), (tables.test, 681_089)):
        assert tracks.start[0] == 0 and tracks.end[-1] == frames
        assert np.array_equal(tracks.start[1:], tracks.end[:-1])


@pytest.mark.shared
def test_the_real_queries_are_each_person_and_camera_once_and_stand_in_the_gallery(tables: Tables) -> None:
    asked = list(zip(tables.test.person[tables.query], tables.test.camera[tables.query], strict=True))
    assert (len(asked), len(set(asked)), len({person for person, _ in asked})) == (1980, 1980, 626)
    gallery = set(tables.gallery.tolist())
    assert len(gallery) == 11_310
    assert len(gallery - set(tables.query.tolist())) == 9330
    assert set(tables.query.tolist()) < gallery
    assert not set(tables.test.person[tables.query]) & set(tables.train.person)


@pytest.mark.shared
def test_the_counts_asserted_are_those_of_the_real_tables(tables: Tables) -> None:
    assert count(tables) == PUBLISHED


@pytest.mark.shared
@pytest.mark.parametrize(
    ("file", "change", "got"),
    [
        (TRAIN, lambda table: table[:-1], "got 8297 tracklets, wanted 8298"),
        (TRAIN, lambda table: np.where(table == 1499, 1, table), "got 624 people, wanted 625"),
        (TRAIN, lambda table: table - (table == 509_914), "got 509913 frames, wanted 509914"),
        (TEST, lambda table: np.vstack([table, table[-1:]]), "got 12181 tracklets, wanted 12180"),
        (TEST, lambda table: np.where(table == -1, 0, table), "got 0 junk tracklets .*, wanted 870"),
        (QUERY, lambda table: table[:, :-1], "got 1979 queries, wanted 1980"),
        (
            QUERY,
            lambda table: np.where(table == 12_180, 12_178, table),
            "got 1979 pairs of person and camera, wanted 1980",
        ),
    ],
)
def test_a_wrong_count_names_the_file_and_says_what_to_do(
    real: Path, tmp_path: Path, file: str, change: Any, got: str
) -> None:
    info = Path(shutil.copytree(real, tmp_path / "info", copy_function=shutil.copyfile))
    info.chmod(0o755)
    savemat(info / file, {KEYS[file]: change(loadmat(real / file)[KEYS[file]].astype(int))})
    with pytest.raises(UserError, match=rf"\A{info / file}: {got}; copy the dataset .* --no-check-counts\Z"):
        read_tables(info)
    assert len(read_tables(info, check_counts=False).query) > 1970


def read(mars: Path) -> Tables:
    return read_tables(mars / "info", check_counts=False)


def test_rows_count_from_0_and_the_junk_is_no_gallery(mars: Path) -> None:
    tables = read(mars)
    assert (tables.train.start[0], tables.train.end[0], tables.train.lengths[-1]) == (0, 8, 12)
    assert tables.query.tolist() == [3, 5, 6, 7]
    assert tables.gallery.tolist() == [2, 3, 4, 5, 6, 7]


def test_a_small_set_is_no_whole_one(mars: Path) -> None:
    with pytest.raises(UserError, match=rf"{mars / 'info' / TRAIN}: got 8 tracklets, wanted 8298"):
        read_tables(mars / "info")


@pytest.mark.parametrize("file", [TRAIN, TEST, QUERY])
def test_a_missing_table_is_named_with_those_wanted(mars: Path, file: str) -> None:
    (mars / "info" / file).unlink()
    with pytest.raises(
        UserError, match=rf"\A{mars / 'info' / file}: not found; wanted {TRAIN}, {TEST} and {QUERY} in .*"
    ):
        read(mars)


@pytest.mark.parametrize("file", [TRAIN, TEST, QUERY])
def test_an_unreadable_table_is_one_line(mars: Path, file: str) -> None:
    path = mars / "info" / file
    whole = path.read_bytes()
    for content in (b"", b"not a MATLAB file", whole[:-9]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"\A{path}: .*\Z"):
            read(mars)


@pytest.mark.parametrize(
    ("file", "table", "message"),
    [
        (TRAIN, np.ones((3, 3)), "has 3 columns, wanted 4: start, end, person, camera"),
        (TRAIN, [[0, 8, 1, 1]], r"row 1: got \[0, 8, 1, 1\], wanted 1 <= start <= end"),
        (TRAIN, [[1, 8, 1, 1], [9, 8, 1, 1]], r"row 2: got \[9, 8, 1, 1\]"),
        (TRAIN, [[1, 8, 0, 1]], "a person from 1"),
        (TEST, [[1, 8, -2, 1]], "a person from -1"),
        (TEST, [[1, 8, 2, 0]], "a camera from 1"),
        (TEST, [[1.5, 8, 2, 1]], "numbers that are not whole"),
        (QUERY, [[0, 4]], "got row 0, wanted 1 to 8"),
        (QUERY, [[4, 9]], "got row 9, wanted 1 to 8"),
        (QUERY, [[4, 1]], r"row 1 of tracks_test_info\.mat is person -1, wanted a person from 1"),
        (QUERY, [[3, 4]], r"row 3 of tracks_test_info\.mat is person 0, wanted a person from 1"),
        (QUERY, [[4, 4]], "twice, wanted each query once"),
        (QUERY, [[]], "has shape"),
    ],
)
def test_numbers_that_make_no_sense_are_named(mars: Path, file: str, table: Any, message: str) -> None:
    path = mars / "info" / file
    savemat(path, {KEYS[file]: np.array(table)})
    with pytest.raises(UserError, match=rf"\A{re.escape(str(path))}.*{message}.*\Z"):
        read(mars)


@pytest.mark.parametrize(
    ("table", "number"),
    [
        (np.array([[1, 8, 2**63, 1]], np.uint64), "9223372036854775808 of uint64"),
        (np.array([[1, 8, 2**53, 1]], np.float64), "9007199254740992.0 of float64"),
        (np.array([[1, 8, 2**24, 1]], np.float32), "16777216.0 of float32"),
        (np.array([[1, 8, np.inf, 1]]), "inf of float64"),
    ],
)
def test_a_number_that_may_have_been_rounded_or_is_beyond_int64_is_named(
    mars: Path, table: np.ndarray, number: str
) -> None:
    path = mars / "info" / TRAIN
    savemat(path, {KEYS[TRAIN]: table})
    with pytest.raises(UserError, match=rf"\A{path}: .* has the number {number}; wanted .*, exact and within int64\Z"):
        read(mars)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_whole_numbers_are_read_exactly(mars: Path, dtype: type) -> None:
    people = [2**53, 2**53 + 1, 2**63 - 1]
    savemat(mars / "info" / TRAIN, {KEYS[TRAIN]: np.array([[1, 8, person, 1] for person in people], dtype)})
    assert read(mars).train.person.tolist() == people


def test_the_least_number_is_out_of_range_like_any_other(mars: Path) -> None:
    savemat(mars / "info" / TRAIN, {KEYS[TRAIN]: np.array([[1, 8, -(2**63), 1]], np.int64)})
    with pytest.raises(UserError, match=r"row 1: got \[1, 8, -9223372036854775808, 1\], wanted"):
        read(mars)
    write_mars(mars / "other")
    savemat(mars / "other/info" / QUERY, {KEYS[QUERY]: np.array([[4, -(2**63)]], np.int64)})
    with pytest.raises(UserError, match="got row -9223372036854775808, wanted 1 to 8"):
        read(mars / "other")


def test_a_table_under_another_key_is_refused(mars: Path) -> None:
    savemat(mars / "info" / TEST, {"tracks": np.ones((2, 4))})
    with pytest.raises(UserError, match=f"{TEST}: no key track_test_info; wanted an array of tracklets by start"):
        read(mars)
