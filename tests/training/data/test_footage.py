from __future__ import annotations

import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.helpers.small_video import encode
from training.data.footage import open_footage
from training.data.video import probe
from training.runtime.errors import UserError

IMAGES = np.repeat(np.arange(0, 250, 25, dtype=np.uint8), 48 * 64 * 3).reshape(10, 48, 64, 3)


def test_a_video_has_its_frames_and_times(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", IMAGES)
    footage = open_footage(tmp_path / "a.mp4")
    assert (footage.frame_rate, footage.length) == (10, 10)
    for _ in range(2):  # anew with each call
        frames = list(footage.frames())
        assert [frame.number for frame in frames] == list(range(1, 11))
        np.testing.assert_allclose([frame.seconds for frame in frames], np.arange(10) / 10, atol=1e-6)
        assert [abs(int(frame.pixels.mean()) - 25 * n) < 8 for n, frame in enumerate(frames)] == [True] * 10


def test_times_are_those_of_the_file_from_where_a_player_begins(tmp_path: Path) -> None:
    times = [5.0, 5.1, 5.15, 5.9, 7.0, 7.1, 7.2, 9.0, 9.5, 9.6]
    encode(tmp_path / "a.mkv", IMAGES, times)
    seconds = [frame.seconds for frame in open_footage(tmp_path / "a.mkv").frames()]
    np.testing.assert_allclose(seconds, np.array(times) - 5, atol=2e-3)


def test_a_picture_that_begins_after_the_sound_has_the_time_of_both(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        sound, picture = container.add_stream("aac", rate=8000), container.add_stream("mpeg4", rate=10)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        for number in range(50):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 8000, 1024 * number
            container.mux(sound.encode(samples))
        for number, image in enumerate(IMAGES):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = 30 + number, Fraction(1, 10)
            container.mux(picture.encode(frame))
        container.mux(sound.encode())
        container.mux(picture.encode())
    seconds = [frame.seconds for frame in open_footage(tmp_path / "a.mkv").frames()]
    assert len(seconds) == 10
    np.testing.assert_allclose(seconds, np.arange(30, 40) / 10, atol=0.15)  # the sound's codec begins a little before 0


def test_a_stream_without_a_length_is_read_to_its_end(tmp_path: Path) -> None:
    encode(tmp_path / "a.ts", IMAGES)
    assert probe(tmp_path / "a.ts").length in (None, *range(8, 13)), "an estimate"
    assert len(list(open_footage(tmp_path / "a.ts").frames())) == 10


def test_a_sequence_of_images_has_the_times_of_its_rate(mot: Callable[..., Path]) -> None:
    footage = open_footage(mot({1: range(1, 20)}))
    assert (footage.frame_rate, footage.length) == (7, 60)
    frames = list(footage.frames())
    assert [(frame.number, frame.seconds) for frame in frames] == [(n, (n - 1) / 7) for n in range(1, 61)]
    assert [int(frame.pixels[0, 0, 2]) for frame in frames] == list(range(1, 61))


def test_a_sequences_video_has_its_own_times(mot: Callable[..., Path]) -> None:
    root = mot({1: range(1, 20)})
    shutil.rmtree(root / "img1")
    encode(root / "film.mp4", IMAGES)
    footage = open_footage(root)
    assert (footage.path, footage.frame_rate) == (root / "film.mp4", 10)


def test_what_is_no_footage_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^video: there is no file .*gone.mp4, wanted a video, or the folder of a MOT"):
        open_footage(tmp_path / "gone.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"text.mp4: not a readable video \("):
        open_footage(tmp_path / "text.mp4")
    with pytest.raises(UserError, match=r"seqinfo.ini: No such file"):
        open_footage(tmp_path)
    (tmp_path / "img1").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "img1" / "1.png")
    (tmp_path / "seqinfo.ini").write_text("[Sequence]\nseqLength=1\n")
    with pytest.raises(UserError, match=r"seqinfo.ini: no frameRate, wanted the frames per second, for the times"):
        open_footage(tmp_path)


def test_a_video_that_is_cut_off_says_after_which_frame(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", IMAGES)
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:300])
    with pytest.raises(UserError, match=r"a.mp4: (not a readable video|cannot be decoded after frame)"):
        list(open_footage(tmp_path / "a.mp4").frames())
