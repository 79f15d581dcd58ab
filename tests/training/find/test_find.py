from __future__ import annotations

import csv
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import tyro
from PIL import Image

from tests.helpers.small_video import RATE, Visit, encode, write_video
from training import FeatureExtractor
from training.data.datasets.mot_boxes import read_boxes
from training.export.network import Options as NetworkOptions
from training.export.network import export_network
from training.find.__main__ import find
from training.find.matches import COLUMNS, Match
from training.find.options import Options
from training.runtime.command import run_command
from training.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def found(video: Path, output: Path, *arguments: object) -> list[Match]:
    args = ["--video", str(video), "--output", str(output), *map(str, arguments), "--device", "cpu"]
    return find(tyro.cli(Options, args=args))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def crops_of(video: Path, track: int, folder: Path) -> Path:
    """Write a track's crops as images."""
    folder.mkdir()
    boxes, _ = read_boxes(video.parent / "gt.txt", None)
    with av.open(str(video)) as container:
        for number, frame in enumerate(container.decode(video=0), start=1):
            for box in boxes.get(number, ()):
                if box.track == track:
                    Image.fromarray(box.crop(frame.to_ndarray(format="rgb24"))).save(folder / f"{number}.png")
    return folder


def test_a_person_is_found_when_they_come_back(
    rendered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "out"
    matches = found(rendered, output, "--person", 1)
    assert [match.track.number for match in matches] == [5, 3], "2 is seen at the same time as 1"
    assert matches[0].score is not None and matches[0].score > 0.98
    assert matches[1].score is not None and matches[1].score < 0.95
    assert matches[0].times == "0:02.9 - 0:05.2"
    assert sorted(path.name for path in output.iterdir()) == ["matches.csv", "matches.mp4", "matches.png"]
    (best, _) = rows(output / "matches.csv")
    assert tuple(best) == COLUMNS
    assert {name: best[name] for name in ("rank", "start", "end", "first_frame", "last_frame", "frames", "track")} == {
        "rank": "1",
        "start": "0:02.9",
        "end": "0:05.2",
        "first_frame": "30",
        "last_frame": "53",
        "frames": "24",
        "track": "5",
    }
    assert (float(best["start_seconds"]), float(best["end_seconds"])) == (2.9, 5.2)
    shown = capsys.readouterr().out
    assert "boxes of 4 tracks in " in shown and "the small one of this repository" in shown
    assert "track 1 among 2 tracks in people.mp4, 1 left out that were seen at the same time" in shown
    with Image.open(output / "matches.png") as page:
        assert page.width > 700 and page.height > 400
    assert not list(output.parent.glob("out?*")), "no temporary folder is left"


def test_the_video_shows_the_matches_and_nothing_else(rendered: Path, tmp_path: Path) -> None:
    found(rendered, tmp_path / "out", "--person", 2, "--top", 1)
    (best,) = rows(tmp_path / "out" / "matches.csv")
    with av.open(str(tmp_path / "out" / "matches.mp4")) as container:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    margin = round(0.5 * RATE)
    first, last = int(best["first_frame"]) - margin, min(int(best["last_frame"]) + margin, 60)
    assert len(frames) == last - first + 1
    np.testing.assert_allclose([time for time, _ in frames], np.arange(len(frames)) / RATE, atol=1e-3)
    with av.open(str(rendered)) as container:
        source = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    before, boxed = (np.abs(frames[n][1].astype(int) - source[first - 1 + n]).mean(2) for n in (margin - 1, margin))
    boxes, _ = read_boxes(rendered.parent / "gt.txt", None)
    (box,) = (box for box in boxes[first + margin] if box.track == int(best["track"]))
    left, top = int(box.left), int(box.top)
    edge = slice(top + 20, top + 100), slice(max(0, left - 1), left + 1)
    assert boxed[edge].mean() > 30, "the box is drawn over its edge"
    assert before[top + 20 : top + 100].mean() < 10, "and not before the person is there"


def test_progress_counts_the_frames_of_both_passes(
    rendered: Path, tmp_path: Path, counted: list[tuple[str, float, float | None, str]]
) -> None:
    found(rendered, tmp_path / "out", "--person", 1)
    assert counted[0] == ("Following people", 60, 60, "frames")
    drawing = next(bar for bar in counted if bar[0] == "Drawing the matches")
    assert drawing[1:] == (59, 60, "frames"), "to half a second after the last match"


def test_everybody_is_listed_without_a_person(
    rendered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matches = found(rendered, tmp_path / "out", "--min-frames", 21)
    assert [match.track.number for match in matches] == [1, 2, 5]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["people.csv", "people.png"]
    assert [row["score"] for row in rows(tmp_path / "out" / "people.csv")] == ["", "", ""]
    shown = capsys.readouterr().out
    assert "3 tracks in people.mp4, 1 of fewer than 21 frames left out" in shown
    assert shown.splitlines()[-1] == "to find one of them again: --person TRACK"


def test_crops_find_their_own_track_first(rendered: Path, tmp_path: Path) -> None:
    crops = crops_of(rendered, 3, tmp_path / "crops")
    matches = found(rendered, tmp_path / "out", "--person", crops, "--any-crop")
    assert matches[0].track.number == 3
    assert len(matches) == 4, "of crops nobody knows when they were seen"
    assert matches[0].score == pytest.approx(1, abs=1e-5)
    one = crops / "40.png"
    matches = found(rendered, tmp_path / "one", "--person", one, "--any-crop")
    extractor = FeatureExtractor(device="cpu")
    person, tracks = extractor([one]), extractor.tracks(rendered, rendered.parent / "gt.txt")
    wanted = {track: float(person @ feature) for track, feature in tracks.items()}
    assert {m.track.number: m.score for m in matches} == pytest.approx(wanted, abs=1e-5)


def test_several_tracks_are_one_person(rendered: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"person: got nobody else in .*mp4, 2 left out that were seen at the same time"
    ):
        found(rendered, tmp_path / "out", "--person", 1, 5)


def test_a_threshold_leaves_out_worse_ones(rendered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [m.track.number for m in found(rendered, tmp_path / "one", "--person", 1, "--threshold", 0.97)] == [5]
    capsys.readouterr()
    assert found(rendered, tmp_path / "none", "--person", 1, "--threshold", 0.9999) == []
    assert "none scores 0.9999 or more, the best 0.99" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["matches.csv"]
    assert rows(tmp_path / "none" / "matches.csv") == []


def test_boxes_are_detected_and_written_for_the_next_search(alone: Path, tmp_path: Path) -> None:
    matches = found(alone, tmp_path / "out", "--detector", "hog", "--min-frames", 3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["people.csv", "people.png", "tracks.txt"]
    again = found(alone, tmp_path / "again", "--detections", tmp_path / "out" / "tracks.txt", "--min-frames", 3)
    assert [m.track.number for m in again] == [m.track.number for m in matches]
    assert [list(m.track.frames) for m in again] == [list(m.track.frames) for m in matches]
    assert not (tmp_path / "again" / "tracks.txt").exists()


def test_boxes_without_tracks_are_followed(tmp_path: Path) -> None:
    video = write_video(tmp_path / "apart.mp4", (Visit(7, 1, 1, 24), Visit(9, 2, 20, 24, 250, -4)), boxes="det.txt")
    lines = [line.split(",") for line in (tmp_path / "det.txt").read_text().splitlines()]
    (tmp_path / "det.txt").write_text("\n".join(",".join([line[0], "-1", *line[2:]]) for line in lines))
    matches = found(video, tmp_path / "out", "--detections", tmp_path / "det.txt")
    # A track begins with its second box.
    assert [(m.track.frames[0], m.track.frames[-1]) for m in matches] == [(2, 24), (21, 43)]
    assert (tmp_path / "out" / "tracks.txt").exists()


def test_every_second_frame_finds_the_same(rendered: Path, tmp_path: Path) -> None:
    matches = found(rendered, tmp_path / "out", "--person", 1, "--every", 2)
    assert [match.track.number for match in matches] == [5, 3]
    assert len(matches[0].track.frames) == 12


def test_times_are_the_videos_own(tmp_path: Path, rendered: Path) -> None:
    with av.open(str(rendered)) as container:
        images = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    times = np.cumsum(np.where(np.arange(60) < 30, 0.1, 0.5)) - 0.1  # a camera that is slower in the dark
    encode(tmp_path / "slow.mp4", images, times.tolist())
    shutil.copy(rendered.parent / "gt.txt", tmp_path / "slow.txt")
    (match, _) = found(tmp_path / "slow.mp4", tmp_path / "out", "--person", 1)
    assert match.track.seconds[0] == pytest.approx(times[29], abs=2e-3)
    assert match.track.seconds[-1] == pytest.approx(times[52], abs=2e-3)
    with av.open(str(tmp_path / "out" / "matches.mp4")) as container:
        shown = [frame.time for frame in container.decode(video=0)]
    assert shown[-1] - shown[-2] == pytest.approx(0.5, abs=1e-3), "and the matches are shown at their speed"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--video TMP/none.mp4", "video: there is no file TMP/none.mp4, wanted a video, or the folder of a MOT"),
        ("--video TMP/text.mp4", "TMP/text.mp4: not a readable video ("),
        ("--video TMP/sound.wav", "TMP/sound.wav: got no video stream, wanted one"),
        ("--video VIDEO --person 9", "person: got track 9, wanted one of VIDEO, such as 1, 2, 3, 5"),
        ("--video VIDEO --person TMP/empty", "person: got no image in TMP/empty, wanted the frames of a tracklet"),
        ("--video VIDEO --person TMP/gone.png", "person: there is no TMP/gone.png, wanted a folder of crops, images"),
        ("--video VIDEO --person TMP/text.mp4", "frame TMP/text.mp4: not a readable image"),
        ("--video VIDEO --person TMP/flat.png", "person: got TMP/flat.png, which shows nobody upright (HOG scores it"),
        ("--video VIDEO --person 1 --checkpoint TMP/empty", "TMP/empty: no checkpoint here (config.json is missing)"),
        ("--video VIDEO --person 1 --checkpoint TMP/other", "weights: TMP/other does not fit this network: "),
        ("--video VIDEO --person 1 --detections TMP/empty.txt", "TMP/empty.txt: got no box of a confidence"),
        (
            "--video VIDEO --person 1 --detections TMP/gone.txt",
            "TMP/gone.txt: No such file or directory; wanted a file",
        ),
        ("--video VIDEO --person 1 --detections TMP/text.mp4", "TMP/text.mp4, line 1: got 'no video', wanted frame"),
        (
            "--video VIDEO --person 1 --detections TMP/long.txt",
            "TMP/long.txt: got boxes of frame 61, but the video has",
        ),
        (
            "--video VIDEO --person 1 --detections TMP/outside.txt",
            "video: got nobody in the 60 frames of VIDEO, wanted",
        ),
        ("--video VIDEO --person 1 --detections TMP/lone.txt", "person: got nobody else in VIDEO"),
        ("--video TMP/notes.mp4", "TMP/notes.txt, line 1: got 'Shot in June', wanted frame,track"),
        (
            "--video VIDEO --detector hog --every 15",
            "every: got 15 at 10 frames per second, a look in 1.5 s, wanted one a",
        ),
        (
            "--video VIDEO --detections TMP/far.txt",
            "video: got nobody in the 60 frames of VIDEO: of 2 boxes none could",
        ),
        ("--video VIDEO --person", "person: got nothing, wanted a folder of crops, images, or numbers of tracks"),
        ("--video VIDEO --person 1 --top 0", "top: got 0, wanted at least 1"),
        ("--video VIDEO --person 1 --threshold 7", "threshold: got 7.0, wanted a cosine, from -1 to 1"),
        ("--video VIDEO --threshold 0.5", "threshold: got one without --person, wanted both"),
        ("--video VIDEO --min-frames 99", "min_frames: got 99, but none of 4 tracks has as many frames, wanted fewer"),
        ("--video VIDEO --detector hog --detections TMP/long.txt", "detections: got a file and a detector, wanted one"),
        ("--video VIDEO --detector hog --detector-weights TMP/flat.png", "detector_weights: got TMP/flat.png with"),
        ("--video VIDEO --detector-weights TMP/gone.pth", "weights: there is no file TMP/gone.pth"),
        (
            "--video VIDEO --detector-weights TMP/other/model.safetensors",
            "weights: TMP/other/model.safetensors does not",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    rendered: Path, run: Path, tmp_path: Path, arguments: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty").mkdir()
    shutil.copy(rendered, tmp_path / "notes.mp4")
    (tmp_path / "notes.txt").write_text("Shot in June")
    (tmp_path / "far.txt").write_text("1,-1,1,1,20,40,1\n50,-1,200,1,20,40,1\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "long.txt").write_text("1,1,1,1,20,40,1\n61,1,1,1,20,40,1\n")
    (tmp_path / "outside.txt").write_text("1,1,900,1,20,40,1\n")
    (tmp_path / "lone.txt").write_text("".join(f"{frame},1,1,1,20,40,1\n" for frame in range(1, 20)))
    (tmp_path / "sound.wav").write_bytes(
        b"RIFF$\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data\0\0\0\0"
    )
    Image.new("RGB", (40, 100), (90, 120, 90)).save(tmp_path / "flat.png")
    export_network(NetworkOptions(run, tmp_path / "other"))
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"head_width": 64', '"head_width": 32'))
    capsys.readouterr()
    words = arguments.replace("TMP", str(tmp_path)).replace("VIDEO", str(rendered)).split()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: find(tyro.cli(Options, args=[*words, "--output", str(tmp_path / "out")])))
    shown = capsys.readouterr().err
    assert ended.value.code == 2
    assert shown.startswith("error: " + line.replace("TMP", str(tmp_path)).replace("VIDEO", str(rendered)))
    assert shown.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_output_that_cannot_be_made_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match=r"^output: .*out is there already, wanted a new folder"):
        found(tmp_path / "no.mp4", tmp_path / "out")
    with pytest.raises(UserError, match=r"^output: .*mine cannot be written, wanted a place for .*mine/x"):
        found(tmp_path / "no.mp4", tmp_path / "out" / "mine" / "x")
    with pytest.raises(UserError, match=r"^video: there is no file"):
        found(tmp_path / "no.mp4", tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_video_of_an_odd_size_and_of_one_frame_is_drawn(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 61, 33, 3), dtype=np.uint8)
    encode(tmp_path / "odd.mkv", image[:, :60, :32])
    (tmp_path / "odd.txt").write_text("1,1,1,1,20,40,1\n1,2,5,5,20,40,1\n")
    found(tmp_path / "odd.mkv", tmp_path / "out", "--person", 1, "--min-frames", 1)
    assert (tmp_path / "out" / "matches.mp4").stat().st_size > 0


def test_sigterm_leaves_nothing(rendered: Path, tmp_path: Path) -> None:
    # As soon as the temporary folder is there, the second pass is running.
    code = (
        "import sys, os, signal, threading, time; from pathlib import Path\n"
        "from training.find.__main__ import find; from training.find.options import Options\n"
        "video, output = map(Path, sys.argv[1:])\n"
        "def kill():\n"
        "    while not list(output.parent.glob('out.*')): time.sleep(0.001)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "threading.Thread(target=kill, daemon=True).start()\n"
        "find(Options(video=video, output=output, person=('1',), device='cpu'))\n"
    )
    command = [sys.executable, "-c", code, str(rendered), str(tmp_path / "out")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_damaged_packets_are_skipped_with_a_warning(rendered: Path, tmp_path: Path) -> None:
    content = bytearray(rendered.read_bytes())
    begin = content.index(b"mdat")
    with av.open(str(rendered)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    position, size = packets[30]
    assert position > begin
    content[position : position + size] = bytes(size)
    (tmp_path / "damaged.mp4").write_bytes(content)
    with pytest.warns(UserWarning, match=r"damaged.mp4: skipped 1 damaged packets; frames are numbered without them$"):
        matches = found(tmp_path / "damaged.mp4", tmp_path / "out", "--detector", "hog", "--min-frames", 1)
    boxes = tmp_path / "out" / "tracks.txt"
    with pytest.warns(UserWarning, match=r"skipped 1 damaged packets"):
        again = found(tmp_path / "damaged.mp4", tmp_path / "two", "--detections", boxes, "--min-frames", 1)
    spans = {m.track.number: (m.times, len(m.track.frames)) for m in matches}
    assert again and all(spans[m.track.number] == (m.times, len(m.track.frames)) for m in again)


def test_an_empty_output_folder_is_filled(rendered: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    inode = (tmp_path / "out").stat().st_ino
    (tmp_path / "link").symlink_to(tmp_path / "out")
    found(rendered, tmp_path / "link", "--person", 1)
    assert (tmp_path / "out" / "matches.csv").exists()
    assert (tmp_path / "out").stat().st_ino == inode, "it may be somebody's working folder"


@pytest.mark.shared
def test_a_visitor_of_pets_is_found_again(shared_dir: Path, tmp_path: Path) -> None:
    video = shared_dir / "data" / "pets09-s2l1" / "PETS09-S2L1.avi"
    matches = found(video, tmp_path / "out", "--person", 9)
    assert matches[0].track.number == 5, "both are person E"
    assert (matches[0].times, len(matches)) == ("0:57.5 - 1:19.4", 5)
