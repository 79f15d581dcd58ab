from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from training.data.datasets.mot import load
from training.data.datasets.mot_sequence import read_sequence
from training.runtime.errors import UserError

Write = Callable[..., Path]


def test_crops_are_what_the_boxes_hold(mot: Write) -> None:
    (track,) = read_sequence(mot({3: range(5, 15)})).tracks
    assert track.frame_numbers == tuple(range(5, 15))
    rows, columns = np.mgrid[3:23, 6:16]  # left 7, top 4, counted from 1
    for frame, crop in zip(track.frame_numbers, track.crops, strict=True):
        assert np.array_equal(crop, np.stack([rows, columns, np.full_like(rows, frame)], axis=-1))


def test_boxes_are_clipped_and_those_outside_or_of_no_confidence_left_out(mot: Write) -> None:
    root = mot({1: range(1, 2)}, length=6)
    boxes = ["1,1,-4,-9,10,20,1", "2,1,44,31,10,20,1", "3,1,49,1,10,20,1", "4,1,1,-30,10,20,1", "5,1,1,1,10,20,0"]
    (root / "gt/gt.txt").write_text("\n".join(boxes))
    (track,) = read_sequence(root).tracks
    assert track.frame_numbers == (1, 2)
    assert [crop.shape for crop in track.crops] == [(10, 5, 3), (10, 5, 3)]
    assert track.crops[1][0, 0].tolist() == [30, 43, 2]


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


@pytest.mark.parametrize("ini", ["", "[Sequence]\nframeRate=7", "seqLength=9", "[Sequence]\nseqLength=9\nseqLength=9"])
def test_a_seqinfo_without_a_length_is_one_line(mot: Write, ini: str) -> None:
    root = mot({1: range(1, 21)})
    (root / "seqinfo.ini").write_text(ini)
    with pytest.raises(UserError, match=r"\A.*seqinfo\.ini: .*wanted \[Sequence\] with the number of frames, .*\Z"):
        load(root, 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("frameRate", value) for value in ("nan", "inf", "0", "-7", "30 fps", "")),
        *(("seqLength", value) for value in ("0", "-60", "many", "60.0", "6_0", "\u0666\u0660", "1" * 5000)),
        *((key, value) for key in ("imWidth", "imHeight") for value in ("0", "-48", "48px", "4_8", "\u0664\u0668", "")),
    ],
)
def test_a_malformed_number_of_seqinfo_is_named(mot: Write, key: str, value: str) -> None:
    root = mot({1: range(1, 21)})
    numbers = {"frameRate": "7", "seqLength": "60", key: value}
    (root / "seqinfo.ini").write_text("[Sequence]\n" + "".join(f"{k}={v}\n" for k, v in numbers.items()))
    with pytest.raises(UserError, match=rf"\A.*seqinfo\.ini: got {key} '{value[:40]}', wanted a positive [a-z ]+\Z"):
        load(root, 0)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ("imWidth=50\nimHeight=40", "imWidth 50 and imHeight 40, as seqinfo.ini says"),
        ("imWidth=96", "imWidth 96, as seqinfo.ini says"),
        ("imHeight=80", "imHeight 80, as seqinfo.ini says"),
    ],
)
def test_frames_of_another_size_than_seqinfo_says_are_refused(mot: Write, keys: str, wanted: str) -> None:
    root = mot({1: range(1, 21)})
    ini = root / "seqinfo.ini"
    before = ini.read_text()
    ini.write_text(before + "imWidth=48\nimHeight=40\n")
    load(root, 0)
    ini.write_text(before + keys)
    with pytest.raises(UserError) as error:
        load(root, 0)
    assert str(error.value) == f"{root}/img1/000001.png: got 48 x 40 pixels upright, wanted {wanted}"


@pytest.mark.parametrize("keys", ["", "imWidth=48"])
def test_frames_of_several_sizes_are_refused(mot: Write, keys: str) -> None:
    root = mot({1: range(1, 21)})
    (root / "seqinfo.ini").write_text(f"[Sequence]\nseqLength=60\n{keys}")
    path = root / "img1/000031.png"
    Image.new("RGB", (48, 24)).save(path)
    with pytest.raises(UserError) as error:
        load(root, 0)
    assert str(error.value) == f"{path}: got 48 x 24 pixels upright, wanted 48 x 40, the size of the first frame"


def test_an_image_is_turned_by_its_exif_before_boxes_are_cut(mot: Write) -> None:
    root = mot({3: range(1, 61)})
    with (root / "seqinfo.ini").open("a") as ini:
        ini.write("imWidth=48\nimHeight=40\n")
    before = read_sequence(root).tracks[0]
    for path in (root / "img1").iterdir():
        pixels = np.rot90(np.asarray(Image.open(path)))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned clockwise
        Image.fromarray(pixels).save(path, exif=exif)
    after = read_sequence(root).tracks[0]
    assert all(map(np.array_equal, after.crops, before.crops))


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


def film(root: Path, frames: int) -> Path:
    """Put a video in the place of the images: frame f is gray, 4f."""
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
    assert [int(crop[0, 0, 0]) for crop in track.crops] == [4 * frame for frame in range(5, 25)]


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
def test_the_boxes_of_pets_sit_on_people_to_the_frame(shared_dir: Path) -> None:
    """A box holds most of what moves at its own frame, and less of it some frames before or after."""
    root = shared_dir / "data" / "pets09-s2l1"
    with av.open(str(root / "PETS09-S2L1.avi")) as container:
        film = np.stack([frame.to_ndarray(format="gray")[::4, ::4] for frame in container.decode(video=0)])
    moving = np.abs(film - np.median(film[::40], axis=0)) > 30
    boxes = np.loadtxt(root / "gt.txt", delimiter=",")[:, :7]
    for begin, end in ((5, 260), (260, 520), (520, 790)):
        chosen = boxes[(boxes[:, 0] >= begin) & (boxes[:, 0] < end) & (boxes[:, 6] == 1)][::7]

        def share_moving(shift: int, chosen: np.ndarray = chosen) -> float:
            parts = []
            for frame, _, left, top, width, height, _ in chosen.clip(min=1).astype(int):
                rows, columns = slice(top // 4, (top + height) // 4), slice(left // 4, (left + width) // 4)
                parts.append(moving[frame - 1 + shift, rows, columns].mean())
            return float(np.mean(parts))

        shares = {shift: share_moving(shift) for shift in range(-4, 5)}
        assert max(shares, key=lambda shift: shares[shift]) == 0, shares
