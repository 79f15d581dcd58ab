from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from training.data.mot import load
from training.data.mot_sequence import read_sequence
from training.data.tracklets import Tracklet
from training.errors import UserError

Write = Callable[..., Path]


def moments(tracklet: Tracklet) -> list[int]:
    """Return the numbers of the frames that a tracklet of the written sequence was cut out of."""
    return [int(frame[0, 0, 2]) for frame in tracklet.frames]  # type: ignore[index]


def test_crops_are_what_the_boxes_hold(mot: Write) -> None:
    (track,) = read_sequence(mot({3: range(5, 15)})).tracks
    assert track.moments == tuple(range(5, 15))
    rows, columns = np.mgrid[3:23, 6:16]  # left 7, top 4, counted from 1
    for moment, crop in zip(track.moments, track.crops, strict=True):
        assert np.array_equal(crop, np.stack([rows, columns, np.full_like(rows, moment)], axis=-1))


def test_boxes_are_clipped_and_those_outside_or_of_no_confidence_left_out(mot: Write) -> None:
    root = mot({1: range(1, 2)}, length=6)
    boxes = ["1,1,-4,-9,10,20,1", "2,1,44,31,10,20,1", "3,1,49,1,10,20,1", "4,1,1,-30,10,20,1", "5,1,1,1,10,20,0"]
    (root / "gt/gt.txt").write_text("\n".join(boxes))
    (track,) = read_sequence(root).tracks
    assert track.moments == (1, 2)
    assert [crop.shape for crop in track.crops] == [(10, 5, 3), (10, 5, 3)]
    assert track.crops[1][0, 0].tolist() == [30, 43, 2]


def test_without_identities_a_track_ends_as_its_own_gallery(mot: Write) -> None:
    split = load(mot({2: range(11, 51), 5: range(1, 18), 9: range(1, 19)}), 0)
    assert [t.person for t in split.train] == [2, 9]
    assert split.probe == split.train
    assert moments(split.probe[0]) == list(range(11, 29))
    assert moments(split.gallery[0]) == list(range(33, 51))
    assert [(t.person, t.camera) for t in split.probe + split.gallery] == [(2, 1), (9, 1), (2, 2), (9, 2)]
    assert "1 tracks dropped" in split.description


IDENTITIES = "track,person\n7,Ann\n1,Ann\n3,Ann\n2,Bob\n5,Bob\n"
VISITS = {7: range(1, 11), 1: range(12, 25), 3: range(40, 50), 2: range(1, 12), 5: range(20, 24), 4: range(30, 40)}


def test_with_identities_later_visits_are_searched_by_the_earliest(mot: Write) -> None:
    split = load(mot(VISITS, identities=IDENTITIES), 0)
    assert [t.name for t in split.train] == ["track2", "track7", "track4"]
    assert [t.name for t in split.probe] == ["track7"], "Bob's return, of 4 frames, is too short"
    assert [t.name for t in split.gallery] == ["track1", "track3"]
    assert {t.camera for t in split.train} == {1}
    assert {t.camera for t in split.gallery} == {2}
    assert {t.person for t in split.probe} == {t.person for t in split.gallery}
    assert "1 tracks under 8 frames dropped" in split.description
    assert "never trained on" in split.description


def test_the_gallery_holds_nothing_trained_on(mot: Write) -> None:
    split = load(mot(VISITS, identities=IDENTITIES), 0)
    assert not {t.name for t in split.gallery} & {t.name for t in split.train}


@pytest.mark.parametrize(("begin", "fits"), [(14, True), (13, False)])
def test_visits_may_overlap_by_a_second_and_no_more(mot: Write, begin: int, fits: bool) -> None:
    root = mot({1: range(1, 21), 2: range(begin, 41)}, identities="track,person\n1,Ann\n2,Ann\n")
    if fits:
        assert [t.name for t in load(root, 0).gallery] == ["track2"]
    else:
        with pytest.raises(UserError, match="person Ann: tracks 1 and 2 overlap by 8 frames, wanted at most 7"):
            load(root, 0)


def test_a_visit_within_a_longer_one_is_refused_after_a_short_one_too(mot: Write) -> None:
    tracks = {1: range(1, 60), 2: range(1, 60), 3: range(55, 60), 4: range(30, 40)}
    root = mot(tracks, identities="track,person\n1,Ann\n4,Ann\n")
    with pytest.raises(UserError, match="tracks 1 and 4 overlap by 10 frames"):
        load(root, 0)


def test_nobody_coming_back_is_refused(mot: Write) -> None:
    with pytest.raises(UserError, match="nobody comes back"):
        load(mot({1: range(1, 21), 2: range(1, 21)}, identities="track,person\n1,Ann\n2,Bob\n"), 0)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("x,1,1,1,9,9,1", "wanted frame,track"),
        ("1,1,1,1,9", "wanted frame,track"),
        ("1.5,1,1,1,9,9,1", "wanted finite numbers"),
        ("1,1,nan,1,9,9,1", "wanted finite numbers"),
        ("0,1,1,1,9,9,1", "wanted 1 to 60"),
        ("61,1,1,1,9,9,1", "wanted 1 to 60"),
        ("1,1,1,1,0,9,1", "wanted a positive size"),
        ("5,1,1,1,9,9,1", "track 1 has a box in frame 5 already"),
    ],
)
def test_a_malformed_line_is_named_with_its_number(mot: Write, line: str, wanted: str) -> None:
    root = mot({1: range(5, 25)})
    path = root / "gt/gt.txt"
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}, line 22: .*{wanted}"):
        load(root, 0)


@pytest.mark.parametrize(
    ("csv", "wanted"),
    [
        ("1,Ann\n", "wanted track,person"),
        ("track,person\none,Ann\n", "line 2: got 'one','Ann'"),
        ("track,person\n1\n", "line 2: got '1',''"),
        ("track,person\n1,Ann\n8,Ann\n", "line 3: no track 8"),
        ("track,person\n" + "1" * 5000 + ",Ann\n", "line 2: got '1111"),
        ('track,person\n1,"Ann\n', "wanted track,person"),
        ("track,person\n1," + "x" * 200_000, "line 2: field larger than"),
        ("track,person\n1,Ann\n1,Bob\n", "line 3: track 1 is person Ann already"),
    ],
)
def test_malformed_identities_are_named(mot: Write, csv: str, wanted: str) -> None:
    with pytest.raises(UserError, match=re.escape(wanted)):
        load(mot({1: range(1, 21)}, identities=csv), 0)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("seqinfo.ini", r"seqinfo\.ini: .*No such file"),
        ("gt/gt.txt", r"gt\.txt: not found, nor gt/gt\.txt"),
        ("img1/000030.png", r"img1: no image 000030, wanted 1 to 60"),
    ],
)
def test_a_missing_file_is_named(mot: Write, gone: str, message: str) -> None:
    root = mot({1: range(1, 21)})
    (root / gone).unlink()
    with pytest.raises(UserError, match=message):
        load(root, 0)


@pytest.mark.parametrize(
    "ini", ["", "[Sequence]\nseqLength=9", "[Sequence]\nframeRate=7\nseqLength=many", "seqLength=9"]
)
def test_a_malformed_seqinfo_is_one_line(mot: Write, ini: str) -> None:
    root = mot({1: range(1, 21)})
    (root / "seqinfo.ini").write_text(ini)
    with pytest.raises(UserError, match=r"seqinfo\.ini: .*wanted \[Sequence\]") as caught:
        load(root, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("rate", "length"), [("nan", 60), ("inf", 60), ("0", 60), ("-7", 60), ("7", 0)])
def test_a_seqinfo_of_no_time_is_refused(mot: Write, rate: str, length: int) -> None:
    root = mot({1: range(1, 21)})
    (root / "seqinfo.ini").write_text(f"[Sequence]\nframeRate={rate}\nseqLength={length}\n")
    with pytest.raises(UserError, match=rf"seqinfo\.ini: got frameRate {rate} and seqLength {length}"):
        load(root, 0)


def test_stray_files_among_the_images_are_ignored_and_a_frame_twice_is_not(mot: Write) -> None:
    root = mot({1: range(1, 21)})
    before = load(root, 0).description
    for stray in ("1.txt", "000002.xml", "Thumbs.db"):
        (root / "img1" / stray).touch()
    assert load(root, 0).description == before
    (root / "img1" / "7.png").touch()
    with pytest.raises(UserError, match=r"000007\.png and 7\.png are both image 7"):
        load(root, 0)


@pytest.mark.parametrize("line", ["", "1,1,1,1,9,9,0", "1,1,900,900,9,9,1"])
def test_a_sequence_without_a_box_says_so(mot: Write, line: str) -> None:
    root = mot({1: range(1, 21)})
    (root / "gt/gt.txt").write_text(line)
    with pytest.raises(UserError, match=r"gt\.txt has no box, of a confidence other than 0, inside the image"):
        load(root, 0)


def test_only_split_zero_is_there(mot: Write) -> None:
    with pytest.raises(UserError, match="got 1, wanted 0"):
        load(mot({1: range(1, 21)}), 1)


def film(root: Path, frames: int) -> Path:
    """Put a video in the place of the images: frame f is grey, 4f."""
    for path in (root / "img1").iterdir():
        path.unlink()
    (root / "img1").rmdir()
    with av.open(str(root / "film.avi"), "w") as container:
        stream = container.add_stream("ffv1", rate=7)
        stream.width, stream.height, stream.pix_fmt = 48, 40, "bgr0"
        for number in range(1, frames + 1):
            pixels = np.full((40, 48, 3), 4 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    return root / "film.avi"


def test_a_video_gives_the_frames_the_boxes_mean(mot: Write) -> None:
    root = mot({1: range(5, 25)})
    film(root, 60)
    (track,) = read_sequence(root).tracks
    assert [int(crop[0, 0, 0]) for crop in track.crops] == [4 * moment for moment in range(5, 25)]


def test_a_video_too_short_is_refused(mot: Write) -> None:
    root = mot({1: range(1, 21)})
    path = film(root, 59)
    with pytest.raises(UserError, match=rf"{path}: got 59 frames, wanted 60"):
        load(root, 0)


def test_a_video_of_something_else_is_one_line(mot: Write) -> None:
    root = mot({1: range(1, 21)})
    film(root, 1).write_bytes(b"no video" * 100)
    with pytest.raises(UserError, match=r"film\.avi: cannot be decoded") as caught:
        load(root, 0)
    assert "\n" not in str(caught.value)


def test_two_videos_or_none_are_refused(mot: Write) -> None:
    root = mot({1: range(1, 21)})
    path = film(root, 60)
    (root / "other.mp4").touch()
    with pytest.raises(UserError, match=r"are film\.avi, other\.mp4"):
        load(root, 0)
    path.unlink()
    (root / "other.mp4").unlink()
    with pytest.raises(UserError, match="are none"):
        load(root, 0)


@pytest.mark.shared
def test_seven_of_the_ten_people_of_pets_return(shared_dir: Path) -> None:
    split = load(shared_dir / "data" / "pets09-s2l1", 0)
    assert len(split.train) == 10
    assert [t.name for t in split.probe] == ["track9", "track15", "track19", "track11", "track12", "track13", "track10"]
    assert [t.person for t in split.gallery] == [1, 2, 2, 2, 3, 4, 5, 6, 9]
    assert sum(len(t.frames) for t in split.train + split.gallery) == 4476


@pytest.mark.shared
def test_the_boxes_of_pets_sit_on_people_to_the_frame(shared_dir: Path) -> None:
    """A box holds most of what moves at its own frame, and less of it some frames before or after."""
    root = shared_dir / "data" / "pets09-s2l1"
    with av.open(str(root / "PETS09-S2L1.avi")) as container:
        film = np.stack([frame.to_ndarray(format="gray")[::4, ::4] for frame in container.decode(video=0)])
    moving = np.abs(film - np.median(film[::40], axis=0)) > 30
    boxes = np.loadtxt(root / "gt.txt", delimiter=",")[:, :7]
    for begin, end in ((5, 260), (260, 520), (520, 790)):
        chosen = boxes[(boxes[:, 0] >= begin) & (boxes[:, 0] < end) & (boxes[:, 6] == 1)][::7]

        def held(shift: int, chosen: np.ndarray = chosen) -> float:
            parts = []
            for frame, _, left, top, width, height, _ in chosen.clip(min=1).astype(int):
                rows, columns = slice(top // 4, (top + height) // 4), slice(left // 4, (left + width) // 4)
                parts.append(moving[frame - 1 + shift, rows, columns].mean())
            return float(np.mean(parts))

        shares = {shift: held(shift) for shift in range(-4, 5)}
        assert max(shares, key=lambda shift: shares[shift]) == 0, shares
