from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.file_size import file_size_limit
from tests.helpers.small_sets import write_ilids, write_mars, write_prid
from training.data import load_split
from training.data.pack_file import Pack
from training.data.tracklets import read_pixels
from training.pack import Options, pack
from training.runtime.atomic_files import temp_path
from training.runtime.errors import UserError


@pytest.fixture
def asked(tmp_path: Path) -> Options:
    """Two splits of four people."""
    return Options("ilids-vid", tmp_path / "out" / "ilids.pack", write_ilids(tmp_path / "data"), check_counts=False)


def killed_while_writing(asked: Options) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which kills, as nothing can be done about
    with file_size_limit(1000):
        pack(asked)


def test_a_kill_leaves_the_file_before_or_none_and_the_same_command_makes_it(asked: Options) -> None:
    output = asked.output
    for before in (None, b"RRUPACK\x01 a damaged one"):
        if before is not None:
            output.write_bytes(before)
        process = get_context("fork").Process(target=killed_while_writing, args=(asked,))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGXFSZ
        assert temp_path(output).stat().st_size == 1000
        assert (output.read_bytes() if output.exists() else None) == before
        pack(asked)
        assert [path.name for path in output.parent.iterdir()] == ["ilids.pack"]
        assert len(load_split("ilids-vid", output, 1, check_counts=False).train) == 4


def test_two_at_a_time_make_one_whole_file_and_one_line(asked: Options, tmp_path: Path) -> None:
    assert asked.data_root is not None
    slow = replace(asked, data_root=Path(shutil.copytree(asked.data_root, tmp_path / "slow")))
    frame = next(slow.data_root.rglob("cam2_person319_101.png"))  # type: ignore[union-attr]
    png = frame.read_bytes()
    frame.unlink()
    os.mkfifo(frame)  # whose reader waits for us
    with ThreadPoolExecutor() as pool:
        first = pool.submit(pack, slow)
        with frame.open("wb") as pipe:  # which waits for the reader
            pack(asked)
            pipe.write(png)
        with pytest.raises(UserError, match=r"\Aoutput: .*ilids\.pack is being made by another process too; .*\Z"):
            first.result(timeout=60)
    assert len(load_split("ilids-vid", asked.output, 0, check_counts=False).train) == 4


def test_a_full_disk_is_one_line_and_leaves_the_file_before(asked: Options) -> None:
    pack(asked)
    before = asked.output.read_bytes()
    with file_size_limit(1000), pytest.raises(UserError, match=r"\Aoutput: .*ilids\.pack cannot be written \(.*\)\Z"):
        pack(replace(asked, splits=(0,)))
    assert asked.output.read_bytes() == before
    assert [path.name for path in asked.output.parent.iterdir()] == ["ilids.pack"]


def test_a_file_that_is_there_is_checked_and_left(asked: Options, capsys: pytest.CaptureFixture[str]) -> None:
    pack(asked)
    before = asked.output.stat()
    capsys.readouterr()
    pack(asked)
    assert asked.output.stat().st_mtime_ns == before.st_mtime_ns
    assert capsys.readouterr().out == f"{asked.output}: 24 frames of 8 tracklets, each checked; left as it is\n"


def changed_picture(asked: Options) -> None:
    path = asked.data_root / "i-LIDS-VID/sequences/cam1/person001/cam1_person001_9.png"  # type: ignore[operator]
    before = path.stat()
    Image.new("RGB", (6, 8), (200, 1, 9)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times may have it


def one_frame_less(asked: Options) -> None:
    (asked.data_root / "i-LIDS-VID/sequences/cam1/person001/cam1_person001_9.png").unlink()  # type: ignore[operator]


def damaged_frame(asked: Options) -> None:
    content = bytearray(asked.output.read_bytes())
    content[int(Pack(asked.output).arrays["offsets"][1]) + 30] ^= 1
    asked.output.write_bytes(content)


def cut_short(asked: Options) -> None:
    asked.output.write_bytes(asked.output.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (changed_picture, "frame 0 of cam1/person001 in .* is another"),
        (one_frame_less, "made of other tracklets"),
        (damaged_frame, "frame 1 of cam1/person.* in .*: damaged, its checksum is another"),
        (cut_short, r"got \d+ bytes, wanted \d+"),
    ],
)
def test_a_file_that_is_not_what_would_be_made_now_is_made_again_and_why_is_told(
    asked: Options, capsys: pytest.CaptureFixture[str], spoil: Callable[[Options], None], why: str
) -> None:
    pack(asked)
    spoil(asked)
    capsys.readouterr()
    pack(asked)
    printed, made = capsys.readouterr().out.splitlines()
    assert re.fullmatch(f"{asked.output}: {why}; made again", printed)
    assert made.startswith(f"{asked.output}: 2")
    pack(asked)
    assert "left as it is" in capsys.readouterr().out


def test_a_file_of_other_options_is_made_again_and_which_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = Options("prid-2011", tmp_path / "prid.pack", write_prid(tmp_path / "data"), splits=(0,), check_counts=False)
    pack(asked)
    moved = Path(shutil.copytree(tmp_path / "data", tmp_path / "moved"))
    for other, why in (
        (replace(asked, pixels=True), "made with pixels False, not True"),
        (replace(asked, splits=(0, 1)), "made with pixels True, not False"),
        (asked, "made with splits '0, 1', not '0'"),
        (replace(asked, splits=(0, 1), prid="official-27"), "made with prid 'paper-21', not 'official-27'"),
        (replace(asked, data_root=moved), "made with prid 'official-27', not 'paper-21'"),
        (asked, f"made of PRID-2011 layout in {moved}.*"),
        (Options("mars", asked.output, write_mars(tmp_path / "mars"), check_counts=False), "made with dataset .*"),
    ):
        capsys.readouterr()
        pack(other)
        assert re.fullmatch(f"{asked.output}: {why}; made again", capsys.readouterr().out.splitlines()[0])


def test_a_packed_frame_is_upright_with_its_pixels_or_its_file(asked: Options) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    assert asked.data_root is not None
    for path in asked.data_root.rglob("*.png"):
        Image.fromarray(stored).save(path, exif=exif)
    for pixels in (False, True):
        pack(replace(asked, pixels=pixels))
        frame = load_split("ilids-vid", asked.output, 0, check_counts=False).train[0].frames[0]
        assert np.array_equal(read_pixels(frame), np.rot90(stored, -1))


@pytest.mark.parametrize("pixels", [False, True])
def test_the_largest_track_numbers_are_packed_exactly_and_beyond_them_is_one_line(tmp_path: Path, pixels: bool) -> None:
    largest = 2**63 - 1
    asked = Options("mot", tmp_path / "mot.pack", tmp_path, pixels=pixels)
    (tmp_path / "seqinfo.ini").write_text("[Sequence]\nseqLength=18\n")
    (tmp_path / "img1").mkdir()
    for frame in range(1, 19):
        Image.new("RGB", (9, 9), (frame, 0, 0)).save(tmp_path / f"img1/{frame}.png")

    def track(*numbers: int) -> None:
        lines = (f"{frame},{number},1,1,9,9,1" for number in numbers for frame in range(1, 19))
        (tmp_path / "gt.txt").write_text("\n".join(lines))

    for people in ((2**53, 2**53 + 1), (largest - 1, largest)):
        track(*people)
        pack(asked)
        assert load_split("mot", asked.output, 0).train_people == people
    track(1, largest + 1)
    with pytest.raises(UserError, match=r"\A.*gt\.txt, line 19: got '.*', wanted .* within int64\Z"):
        pack(asked)


def test_nothing_else_is_written_over(asked: Options, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for output in (tmp_path / "thesis.txt", tmp_path):
        with pytest.raises(UserError, match=f"output: {output} is something else than a packed dataset"):
            pack(replace(asked, output=output))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_what_cannot_be_packed_is_told_in_one_line_and_leaves_nothing(asked: Options) -> None:
    assert asked.data_root is not None
    cases = {
        r"split: got 2, wanted 0 to 1": replace(asked, splits=(0, 2)),
        r"got 4 person folders .* wanted 300": replace(asked, check_counts=True),
        r"data_root: got the file .*, wanted a dataset's folder": replace(asked, data_root=Path(__file__)),
    }
    for message, options in cases.items():
        with pytest.raises(UserError, match=message):
            pack(options)
    frame = next(asked.data_root.rglob("cam2_person319_101.png"))
    frame.write_bytes(frame.read_bytes()[:45])
    with pytest.raises(UserError, match=rf"\Aframe {frame}: not a readable image .*\Z"):
        pack(asked)
    assert list(asked.output.parent.iterdir()) == []
