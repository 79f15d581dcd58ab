from __future__ import annotations

import pickle
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.data import load_split
from training.data.pack_file import HEADER, MAGIC, Pack, PackedFrame
from training.data.tracklets import Split, read_frame, read_pixels
from training.engine.run_record import train_fingerprint
from training.pack import Options, pack
from training.runtime.errors import UserError


def packed(dataset: Any, root: Path, **options: Any) -> Path:
    """Pack a small set next to it."""
    output = root / f"{dataset}.pack"
    pack(Options(dataset, output, root, check_counts=False, **options))
    return output


def assert_same(one: Split, other: Split) -> None:
    assert (one.protocol, one.description) == (other.protocol, other.description)
    assert train_fingerprint(one) == train_fingerprint(other)
    for part in ("train", "query", "gallery"):
        for a, b in zip(getattr(one, part), getattr(other, part), strict=True):
            assert (a.person, a.camera, a.name, len(a.frames)) == (b.person, b.camera, b.name, len(b.frames))
            assert all(np.array_equal(read_pixels(x), read_pixels(y)) for x, y in zip(a.frames, b.frames, strict=True))
    in_gallery = [
        [next((k for k, known in enumerate(split.gallery) if known is query), None) for query in split.query]
        for split in (one, other)
    ]
    assert in_gallery[0] == in_gallery[1], "a query is the same object as its tracklet in the gallery, or is not in it"


def test_every_split_of_files_is_that_of_the_folder(ilids: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = packed("ilids-vid", ilids)
    for split in (0, 1):
        one, other = (load_split("ilids-vid", root, split, check_counts=False) for root in (path, ilids))
        assert_same(one, other)
    assert "24 frames of 8 tracklets" in capsys.readouterr().out, "a frame of two splits is kept once"
    assert one.train[0].frames[1].encoded() == other.train[0].frames[1].read_bytes()  # type: ignore[union-attr]


def test_frames_kept_as_pixels_are_those_of_the_folder(ilids: Path) -> None:
    path = packed("ilids-vid", ilids, pixels=True)
    one, other = (load_split("ilids-vid", root, 0, check_counts=False) for root in (path, ilids))
    assert_same(one, other)
    frame = one.train[0].frames[1]
    pixels = read_pixels(frame)
    assert frame.encoded() == b"P6\n6 8\n255\n" + pixels.tobytes()  # type: ignore[union-attr]


@pytest.mark.parametrize("prid_people", ["paper-21", "official-27"])
def test_prid_is_packed_by_either_protocol(prid: Path, prid_people: Any) -> None:
    path = packed("prid-2011", prid, prid=prid_people, splits=(1,))
    one, other = (load_split("prid-2011", r, 1, prid=prid_people, check_counts=False) for r in (path, prid))
    assert_same(one, other)


def test_the_queries_of_mars_are_the_very_objects_of_its_gallery(mars: Path) -> None:
    path = packed("mars", mars)
    one, other = (load_split("mars", root, 0, check_counts=False) for root in (path, mars))
    assert_same(one, other)
    assert all(any(query is known for known in one.gallery) for query in one.query)


def test_crops_of_a_video_are_packed_without_loss(mot: Callable[..., Path]) -> None:
    root = mot({2: range(11, 51), 9: range(1, 19)})
    assert_same(load_split("mot", packed("mot", root), 0), load_split("mot", root, 0))


def test_crops_of_another_video_are_noticed(mot: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    root = mot({1: range(1, 41)})
    asked = Options("mot", root / "mot.pack", root)
    pack(asked)
    pack(asked)
    assert "left as it is" in capsys.readouterr().out
    Image.new("RGB", (48, 40)).save(root / "img1/000007.png")
    pack(asked)
    assert "frame 6 of track1@0:00.0-0:02.4 in " in capsys.readouterr().out


def test_a_pack_survives_pickling_and_its_tracklets_are_cut_as_tuples_are(ilids: Path) -> None:
    path = packed("ilids-vid", ilids)
    tracklet = load_split("ilids-vid", path, 0, check_counts=False).train[0]
    copy = pickle.loads(pickle.dumps(tracklet))
    assert [read_frame(f)[2, 0, 0].item() for f in copy.frames] == [9, 10, 101]
    assert [read_frame(f)[2, 0, 0].item() for f in copy.frames[1:]] == [10, 101]
    assert read_frame(copy.frames[-1])[2, 0, 0] == 101
    assert isinstance(copy.frames[0], PackedFrame)
    with pytest.raises(IndexError):
        copy.frames[3]
    assert len(pickle.dumps(tracklet)) < 1000, "the index stays in the file"


def test_a_pack_made_again_while_it_is_in_use_is_one_line(ilids: Path) -> None:
    path = packed("ilids-vid", ilids)
    tracklet = pickle.dumps(load_split("ilids-vid", path, 0, check_counts=False).train[0])
    packed("ilids-vid", ilids, splits=(0,))
    with pytest.raises(UserError, match=rf"\A{path}: made again while it was in use; start again\Z"):
        pickle.loads(tracklet)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"dataset": "mars"}, "dataset: got 'mars', but FILE holds 'prid-2011'"),
        ({"split": 1}, "split: got 1, wanted one of 0, which FILE holds"),
        ({"prid": "official-27"}, "prid: got 'official-27', but FILE holds 'paper-21'"),
        ({"check_counts": True}, "FILE: packed with --no-check-counts; read it with"),
    ],
)
def test_what_a_pack_does_not_hold_is_told_in_one_line(prid: Path, asked: dict[str, Any], message: str) -> None:
    path = packed("prid-2011", prid, splits=(0,))
    whole = {"dataset": "prid-2011", "root": path, "split": 0, "check_counts": False, **asked}
    with pytest.raises(UserError, match=rf"\A{re.escape(message.replace('FILE', str(path)))}"):
        load_split(**whole)


def test_what_is_no_whole_pack_is_told_in_one_line(ilids: Path) -> None:
    path = packed("ilids-vid", ilids)
    whole = path.read_bytes()
    _, begin, length, _ = HEADER.unpack(whole[: HEADER.size])
    nonsense = b"x" * length
    header = HEADER.pack(MAGIC, begin, length, zlib.crc32(nonsense))
    cases = {
        "got 0 bytes without a whole header": b"",
        "got 20 bytes without a whole header": whole[:20],
        f"got {len(whole) - 1} bytes, wanted {len(whole)}": whole[:-1],
        f"got {len(whole) + 1} bytes, wanted {len(whole)}": whole + b"x",
        "not a packed dataset": b"PK\x03\x04 something else",
        f"got {len(whole)} bytes, wanted ": whole[:15] + b"\xff" + whole[16:],
        "its index is damaged": whole[:-5] + b"\xff\xff" + whole[-3:],
        "its index is damaged; ": whole[:24] + bytes([whole[24] ^ 1]) + whole[25:],
        "its index cannot be read": header + whole[HEADER.size : begin] + nonsense,
    }
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"\A{path}: {message}.*\Z"):
            load_split("ilids-vid", path, 0, check_counts=False)
    with pytest.raises(UserError, match=r"absent\.pack: no such file; wanted"):
        load_split("synthetic", ilids / "absent.pack", 0)
    assert not (ilids / "absent.pack").exists()


def test_a_damaged_frame_is_named_and_the_others_are_read(ilids: Path) -> None:
    path = packed("ilids-vid", ilids)
    whole = bytearray(path.read_bytes())
    frame = load_split("ilids-vid", path, 0, check_counts=False).train[1].frames[2]
    assert isinstance(frame, PackedFrame)
    at = int(frame.pack.arrays["offsets"][frame.number]) + 30
    whole[at] ^= 1
    path.write_bytes(whole)
    tracklet = load_split("ilids-vid", path, 0, check_counts=False).train[1]
    read_frame(tracklet.frames[1])
    with pytest.raises(UserError, match=rf"\Aframe 2 of {tracklet.name} in {path}: damaged, .*make it again.*\Z"):
        read_frame(tracklet.frames[2])


def test_a_million_frames_are_told_of_in_a_few_bytes_each(mars: Path) -> None:
    path = packed("mars", mars)
    arrays = Pack(path).arrays
    per_frame = sum(arrays[name].nbytes for name in ("offsets", "checksums", "frames")) / len(arrays["checksums"])
    assert per_frame < 17
