from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.small_sets import MARS_TEST, MARS_TRAIN, write_mars
from training.data.datasets import mars as reader
from training.data.datasets.mars_tables import Tracks, read_tables
from training.data.tracklets import Split, Tracklet, read_frame
from training.runtime.errors import UserError


def load(root: Path) -> Split:
    return reader.load(root, 0, check_counts=False)


def facts(tracklets: tuple[Tracklet, ...]) -> list[tuple[int, int, int]]:
    return [(t.person, t.camera, len(t.frames)) for t in tracklets]


def test_training_tracklets_under_8_frames_are_dropped(mars: Path) -> None:
    split = load(mars)
    assert facts(split.train) == [tracklet for tracklet in MARS_TRAIN if tracklet[2] >= 8]
    assert split.train_people == (1, 3, 12)
    assert split.train[1].name == "bbox_train/0001C2T0002"


def test_the_gallery_has_queries_and_distractors_and_no_junk(mars: Path) -> None:
    split = load(mars)
    assert facts(split.gallery) == [tracklet for tracklet in MARS_TEST if tracklet[0] != -1]
    assert split.gallery[0].person == 0
    assert split.protocol == "mars-official"


def test_probes_are_the_very_objects_in_the_gallery(mars: Path) -> None:
    split = load(mars)
    assert facts(split.query) == [(2, 1, 4), (2, 3, 2), (11, 2, 3), (11, 5, 4)]
    rows = [next(row for row, other in enumerate(split.gallery) if other is query) for query in split.query]
    assert rows == [1, 3, 4, 5]


def test_frames_are_the_tracklets_own_in_order(mars: Path) -> None:
    for t in load(mars).train + load(mars).gallery:
        number = int(t.name[-4:])
        for frame, path in enumerate(t.frames, start=1):
            wanted = [5 * t.person, 20 * t.camera + number, 10 * frame]
            assert [abs(a - b) <= 3 for a, b in zip(read_frame(path)[:, 0, 0].tolist(), wanted, strict=True)] == [
                True
            ] * 3


def test_a_name_list_in_disorder_still_gives_frames_in_order(mars: Path) -> None:
    before = load(mars)
    path = mars / "info/train_name.txt"
    names = path.read_text().splitlines()
    path.write_text("\n".join(names[7::-1] + names[8:]))  # the first tracklet, backwards; no CR either
    assert load(mars) == before


def test_with_name_lists_no_image_is_touched(mars: Path) -> None:
    before = load(mars)
    for part in ("train", "test"):
        shutil.rmtree(mars / f"bbox_{part}")
        (mars / f"bbox_{part}").mkdir()
    after = load(mars)
    assert after == before
    with pytest.raises(UserError, match=r"frame .*0001C1T0001F001\.jpg: no such file"):
        read_frame(after.train[0].frames[0])


def test_missing_name_lists_are_rebuilt_from_the_folders_and_the_run_says_so(mars: Path, tmp_path: Path) -> None:
    given = load(mars)
    bare = write_mars(tmp_path / "bare", name_lists=False)
    rebuilt = load(bare)
    for stray in ("bbox_test/.DS_Store", "bbox_test/0002/._0002C1T0001F001.jpg", "bbox_test/0002/Thumbs.db"):
        (bare / stray).touch()
    assert load(bare) == rebuilt
    for new, old in ((rebuilt.train, given.train), (rebuilt.gallery, given.gallery), (rebuilt.query, given.query)):
        assert facts(new) == facts(old)
        assert [[p.relative_to(bare) for p in t.frames] for t in new] == [  # type: ignore[union-attr]
            [p.relative_to(mars) for p in t.frames]  # type: ignore[union-attr]
            for t in old
        ]
    assert rebuilt.description.endswith("train_name.txt and test_name.txt rebuilt from the folders")
    assert "rebuilt" not in given.description


def test_the_description_counts(mars: Path) -> None:
    assert (
        "3 people to train on (6 tracklets, 2 under 8 frames dropped), 2 other people held out, 4 queries in a gallery "
        "of 6 that they are part of, 2 junk tracklets left out"
    ) in load(mars).description


def test_an_image_missing_from_folders_without_a_list_is_reported(tmp_path: Path) -> None:
    write_mars(tmp_path, name_lists=False)
    (tmp_path / "bbox_test/00-1/00-1C1T0001F002.jpg").unlink()
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/bbox_test: got 31 images like bbox_train/0001/0001C1T0001F001.jpg, wanted 32, as "
        "tracks_test_info.mat says; copy the images again, or put test_name.txt into info/"
    )


def test_a_name_list_cut_short_is_reported(mars: Path) -> None:
    path = mars / "info/test_name.txt"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=rf"\A{path}: got 31 names, wanted 32, as \S+ says; copy it again\Z"):
        load(mars)


@pytest.mark.parametrize("wrong", ["0001C2T0001F001.jpg", "0003C1T0001F001.jpg", "0001C1T0001F001.png", "\udcff"])
def test_a_name_that_does_not_fit_its_tracklet_is_named(mars: Path, wrong: str) -> None:
    path = mars / "info/train_name.txt"
    path.write_text(path.read_text().replace("0001C1T0001F004.jpg", wrong), errors="surrogateescape")
    with pytest.raises(UserError, match=r"\A.*/bbox_train, tracklet 1: got the name '.*' in rows 1 to 8, wanted .*\Z"):
        load(mars)


@pytest.mark.parametrize("gone", ["bbox_train", "bbox_test", "info"])
def test_a_missing_folder_is_named_with_the_layout_wanted(mars: Path, gone: str) -> None:
    shutil.rmtree(mars / gone)
    with pytest.raises(UserError, match=rf"\A{mars / gone}: not found; wanted .*0001C1T0001F001\.jpg, .*info/.*\Z"):
        load(mars)


def nest(folder: Path) -> Path:
    """Put a folder into a new one of its own name."""
    inner = folder.rename(folder.with_name("moved"))
    folder.mkdir()
    return inner.rename(folder / folder.name)


@pytest.mark.parametrize("name_lists", [True, False])
def test_a_folder_inside_one_of_its_own_name_reads_the_same(tmp_path: Path, name_lists: bool) -> None:
    root = write_mars(tmp_path, name_lists)
    before = load(root)
    for name in ("bbox_train", "bbox_test", "info"):
        nest(root / name)
        (root / name / "__MACOSX").mkdir()
    after = load(root)
    assert facts(after.train + after.gallery) == facts(before.train + before.gallery)
    assert [t.name for t in after.gallery] == [t.name for t in before.gallery]
    assert after.description == before.description
    for tracklet in after.train + after.query:
        read_frame(tracklet.frames[0])


@pytest.mark.parametrize("repository", ["MARS-evaluation-master", "MARS-evaluation"])
@pytest.mark.parametrize("empty", [True, False])
def test_the_tables_are_found_in_the_repository(mars: Path, repository: str, empty: bool) -> None:
    before = load(mars)
    (mars / repository).mkdir()
    (mars / "info").rename(mars / repository / "info")
    if empty:
        (mars / "info").mkdir()
    assert load(mars) == before


def message_of(root: Path) -> str:
    with pytest.raises(UserError) as error:
        load(root)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("given", ["data", "data/a", "data/a/mars/bbox_train", "data/a/mars/info"])
def test_a_data_root_too_high_or_too_low_is_corrected(tmp_path: Path, given: str) -> None:
    whole, root = write_mars(tmp_path / "data/a/mars"), tmp_path / given
    (tmp_path / "data/a/__MACOSX/bbox_train").mkdir(parents=True)
    place = root / "bbox_train"
    assert message_of(root) == f"{place}: not found, but {whole}/bbox_train is; pass --data-root {whole}"


def test_a_folder_elsewhere_is_named_with_what_to_do(mars: Path) -> None:
    (mars / "evaluation/code").mkdir(parents=True)
    (mars / "info").rename(mars / "evaluation/code/info")
    assert message_of(mars) == (f"{mars}/info: not found, but {mars}/evaluation/code/info is; move it to {mars}/info")


@pytest.mark.parametrize("name_lists", [True, False])
def test_person_folders_in_a_folder_of_another_name_are_named(tmp_path: Path, name_lists: bool) -> None:
    root = write_mars(tmp_path, name_lists)
    outer = root / "bbox_test"
    nest(outer).rename(outer / "images")
    assert message_of(root) == (
        f"{outer}: got folders like 0001/ in {outer}/images, wanted bbox_train/0001/0001C1T0001F001.jpg; "
        f"move them to {outer}"
    )


def test_person_folders_at_two_depths_are_refused(mars: Path) -> None:
    (mars / "bbox_train/bbox_train/0003").mkdir(parents=True)
    assert message_of(mars) == (
        f"{mars}/bbox_train: got folders like 0001/ both in it and in {mars}/bbox_train/bbox_train, wanted them in one"
    )


def test_images_outside_person_folders_are_refused_without_a_list(tmp_path: Path) -> None:
    root = write_mars(tmp_path, name_lists=False)
    for image in list((root / "bbox_train").glob("*/*")):
        image.rename(root / "bbox_train" / image.name)
    for folder in (root / "bbox_train").glob("????"):
        folder.rmdir()
    assert message_of(root) == (
        f"{root}/bbox_train: got no folder like 0001/, wanted 65 images like bbox_train/0001/0001C1T0001F001.jpg, "
        "as tracks_train_info.mat says"
    )


@pytest.mark.parametrize("split", [-1, 1])
def test_there_is_one_split(mars: Path, split: int) -> None:
    with pytest.raises(UserError, match=f"split: got {split}, wanted 0, the only split of MARS"):
        reader.load(mars, split)


def test_an_unreadable_frame_is_one_line_that_says_what_to_do(mars: Path) -> None:
    frame = load(mars).query[0].frames[0]
    assert isinstance(frame, Path)
    frame.write_bytes(frame.read_bytes()[:300])
    with pytest.raises(UserError, match=rf"\Aframe {frame}: not a readable image \(.*\); copy it again\Z"):
        read_frame(frame)


def names_of(tracks: Tracks) -> list[str]:
    """Names that the tracklets of a table could have."""
    names: list[str] = []
    seen: Counter[tuple[int, int]] = Counter()
    for person, camera, length in zip(tracks.person.tolist(), tracks.camera.tolist(), tracks.lengths, strict=True):
        seen[person, camera] += 1
        who = "00-1" if person == -1 else f"{person:04d}"
        names += [f"{who}C{camera}T{seen[person, camera]:04d}F{frame + 1:03d}.jpg" for frame in range(length)]
    return names


@pytest.mark.shared
@pytest.mark.exhaustive  # ten seconds; test_mars_tables has every one of these counts of the tables themselves
def test_the_real_tables_read_to_the_whole_dataset(shared_dir: Path, tmp_path: Path) -> None:
    info = tmp_path / "info"
    info.mkdir()
    for path in (shared_dir / "data/mars-info").glob("*.mat"):
        (info / path.name).symlink_to(path)
    tables = read_tables(info)
    for part, tracks in (("train", tables.train), ("test", tables.test)):
        (tmp_path / f"bbox_{part}").mkdir()
        (info / f"{part}_name.txt").write_bytes("".join(f"{name}\r\n" for name in names_of(tracks)).encode())
    split = reader.load(tmp_path, 0)
    assert (len(split.train), len(split.train_people)) == (8212, 625)
    assert (len(split.query), len({t.person for t in split.query}), len(split.gallery)) == (1980, 626, 11_310)
    assert len({id(t) for t in split.gallery} - {id(t) for t in split.query}) == 9330
    assert sum(t.person == 0 for t in split.gallery) == 3248
    assert min(len(t.frames) for t in split.train) == 8
    assert max(len(t.frames) for t in split.gallery) == 920
