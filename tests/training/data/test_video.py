from __future__ import annotations

import struct
import wave
from collections.abc import Callable, Iterator
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from training.data.datasets.mot_sequence import read_sequence
from training.data.video import read_video
from training.runtime.errors import UserError

Write = Callable[..., Path]
UNIT = 2**16  # of a display matrix
CORNERS = np.zeros((32, 48, 3), np.uint8)  # red and green above blue and black
CORNERS[:16, :24, 0] = CORNERS[:16, 24:, 1] = CORNERS[16:, :24, 2] = 255


def pixels_of(path: Path, count: int) -> Iterator[np.ndarray]:
    return (pixels for _, pixels in read_video(path, count))


def write_video(path: Path, frames: int = 3, streams: int = 1, title: str = "") -> Path:
    """Write a video of CORNERS; stream s after the first is 16 s wider."""
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title
        added = [container.add_stream("mpeg4", rate=7) for _ in range(streams)]
        for number, stream in enumerate(added):
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 48 + 16 * number, 32, "yuv420p", 10**7
        for _ in range(frames):
            for number, stream in enumerate(added):
                pixels = np.pad(CORNERS, ((0, 0), (0, 16 * number), (0, 0)))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in added:
            container.mux(stream.encode())
    return path


def track_headers(content: bytes) -> list[int]:
    """Return where the version of each tkhd atom of an mp4 file is."""
    return [at + 4 for at in range(len(content)) if content.startswith(b"tkhd", at)]


def set_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Write a display matrix into an mp4 file: pixel (x, y) is shown at (a x + c y, b x + d y), in units of 2^-16."""
    content = bytearray(path.read_bytes())
    (begin,) = track_headers(content)
    assert content[begin] == 0, "version 0 has the matrix 40 bytes on"
    content[begin + 40 : begin + 76] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    path.write_bytes(content)
    return path


def atom(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def put_cover_first(path: Path) -> Path:
    """Put a cover picture before the track of an mp4 file, as iTunes' metadata."""
    picture = BytesIO()
    Image.new("RGB", (10, 10)).save(picture, "JPEG")
    cover = atom(b"ilst", atom(b"covr", atom(b"data", struct.pack(">II", 13, 0) + picture.getvalue())))
    metadata = atom(b"udta", atom(b"meta", bytes(4) + atom(b"hdlr", bytes(8) + b"mdirappl" + bytes(9)) + cover))
    content = path.read_bytes()
    at = content.index(b"moov")  # after the frames, so that their offsets stay
    size = struct.pack(">I", struct.unpack(">I", content[at - 4 : at])[0] + len(metadata))
    path.write_bytes(content[: at - 4] + size + b"moov" + metadata + content[at + 4 :])
    with av.open(str(path)) as container:
        assert container.streams.video[0].name == "mjpeg"
    return path


def assert_shows(pixels: np.ndarray, wanted: np.ndarray) -> None:
    assert pixels.shape == wanted.shape
    assert (np.abs(pixels.astype(int) - wanted).max(axis=-1) < 60).mean() > 0.9  # the codec blurs the edges


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), CORNERS),
        ((0, 0, 0, 0), CORNERS),  # left empty by some writers
        ((0, 1, -1, 0), np.rot90(CORNERS, -1)),  # a phone held upright: to be turned clockwise
        ((-1, 0, 0, -1), np.rot90(CORNERS, 2)),
        ((0, -1, 1, 0), np.rot90(CORNERS, 1)),
        ((-1, 0, 0, 1), CORNERS[:, ::-1]),
        ((1, 0, 0, -1), CORNERS[::-1]),
        ((0, 1, 1, 0), CORNERS.swapaxes(0, 1)),
        ((0, -1, -1, 0), np.rot90(CORNERS, 2).swapaxes(0, 1)),
    ],
)
def test_frames_are_turned_and_mirrored_as_players_show_them(
    tmp_path: Path, matrix: tuple[int, ...], shown: np.ndarray
) -> None:
    path = set_matrix(write_video(tmp_path / "film.mp4"), *(UNIT * value for value in matrix))
    frames = list(pixels_of(path, 3))
    assert len(frames) == 3
    for frame in frames:
        assert_shows(frame, shown)


def test_a_matrix_rounded_by_its_writer_still_turns(tmp_path: Path) -> None:
    path = set_matrix(write_video(tmp_path / "film.mp4"), 1, UNIT - 1, -UNIT, -1)
    assert_shows(next(pixels_of(path, 1)), np.rot90(CORNERS, -1))


@pytest.mark.parametrize("matrix", [(0.7071, 0.7071, -0.7071, 0.7071), (0.9976, 0.0698, -0.0698, 0.9976), (1, 1, 0, 1)])
def test_another_rotation_is_one_line(tmp_path: Path, matrix: tuple[float, ...]) -> None:
    path = set_matrix(write_video(tmp_path / "film.mp4"), *(round(UNIT * value) for value in matrix))
    shown = ", ".join(f"{value:.3g}" for value in matrix)
    with pytest.raises(UserError) as error:
        list(pixels_of(path, 3))
    wanted = "wanted a rotation by a multiple of 90 degrees"
    assert str(error.value) == f"{path}, frame 1: got the display matrix {shown}, {wanted}"


@pytest.mark.parametrize("orientation", range(9))
def test_a_frame_of_motion_jpeg_is_turned_by_its_exif(tmp_path: Path, orientation: int) -> None:
    """Compare with what Pillow shows; 0 for no EXIF."""
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image_file = BytesIO()
    Image.fromarray(CORNERS).save(image_file, "JPEG", exif=exif)
    with av.open(str(tmp_path / "film.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=7)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
        packet = av.Packet(image_file.getvalue())
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 7)
        container.mux(packet)
    (frame,) = pixels_of(tmp_path / "film.avi", 1)
    assert_shows(frame, np.asarray(ImageOps.exif_transpose(Image.open(image_file))))


def test_boxes_are_cut_out_of_the_frames_as_shown(tmp_path: Path) -> None:
    set_matrix(write_video(tmp_path / "film.mp4"), 0, UNIT, -UNIT, 0)
    (tmp_path / "gt.txt").write_text("1,1,18,2,14,20,1\n2,1,18,2,14,20,1\n3,2,18,26,14,20,1\n")
    ini = tmp_path / "seqinfo.ini"
    ini.write_text("[Sequence]\nseqLength=3\nimWidth=32\nimHeight=48\n")
    red, green = read_sequence(tmp_path).tracks
    assert red.crops[0].shape == (20, 14, 3)
    assert [red.crops[0].mean(axis=(0, 1)).argmax(), green.crops[0].mean(axis=(0, 1)).argmax()] == [0, 1]
    ini.write_text("[Sequence]\nseqLength=3\nimWidth=48\nimHeight=32\n")
    with pytest.raises(UserError, match=r"film\.mp4, frame 1: got 32 x 48 pixels upright, wanted imWidth 48 and imH"):
        read_sequence(tmp_path)


def test_a_cover_picture_is_not_the_video(tmp_path: Path) -> None:
    path = put_cover_first(write_video(tmp_path / "film.mp4", frames=5))
    frames = list(pixels_of(path, 5))
    assert len(frames) == 5
    assert_shows(frames[0], CORNERS)


def set_enabled(path: Path, *enabled: bool) -> Path:
    """Set which tracks of an mp4 file are enabled, which is to say default."""
    content = bytearray(path.read_bytes())
    for begin, flag in zip(track_headers(content), enabled, strict=True):
        content[begin + 3] = 3 if flag else 2
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("default", [0, 1])
def test_the_default_stream_of_several_is_read(tmp_path: Path, default: int) -> None:
    path = set_enabled(write_video(tmp_path / "film.mp4", streams=2), default == 0, default == 1)
    assert [frame.shape[1] for frame in pixels_of(path, 3)] == [48 + 16 * default] * 3


@pytest.mark.parametrize("enabled", [(False, False), (True, True)])
def test_several_streams_with_no_one_default_are_one_line(tmp_path: Path, enabled: tuple[bool, ...]) -> None:
    path = set_enabled(write_video(tmp_path / "film.mp4", streams=2), *enabled)
    with pytest.raises(UserError) as error:
        list(pixels_of(path, 3))
    got = f"got 2 video streams, {sum(enabled)} of them marked as default"
    assert str(error.value) == f"{path}: {got}, wanted one, or one marked as default"


def test_a_file_of_sound_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "film.avi"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    with pytest.raises(UserError, match=r"\A.*film\.avi: got no video stream, wanted one\Z"):
        list(pixels_of(path, 3))


def test_a_codec_without_a_decoder_is_one_line(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.avi")
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"QQQQ"))
    with pytest.raises(UserError, match=r"\A.*film\.avi: cannot be decoded after frame 0 \(.*\)\Z"):
        list(pixels_of(path, 3))


def test_a_title_in_another_encoding_is_no_reason_to_stop(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.avi", title="Cafe in Zurich")
    path.write_bytes(path.read_bytes().replace(b"Cafe in Zurich", "Café in Zürich".encode("latin-1")))
    assert len(list(pixels_of(path, 3))) == 3
