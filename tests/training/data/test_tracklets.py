from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from training.data.tracklets import Split, Tracklet, read_frame, read_pixels
from training.runtime.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def test_a_file_and_an_array_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "frame.png"
    Image.fromarray(PIXELS).save(path)
    expected = torch.from_numpy(PIXELS).permute(2, 0, 1)
    assert torch.equal(read_frame(path), expected)
    assert torch.equal(read_frame(PIXELS), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_every_kind_of_image_becomes_three_channels(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "frame.png"
    image = Image.fromarray(PIXELS).convert(mode)
    image.save(path)
    assert torch.equal(read_frame(path), torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "png"), ("CMYK", "jpg")])
def test_an_image_that_would_be_clipped_is_named_with_its_mode(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"frame.{suffix}"
    Image.new(mode, (7, 9)).save(path)
    with pytest.raises(UserError, match=f"frame {path}: got an image of mode {mode}, wanted one of"):
        read_frame(path)


def test_a_message_names_the_file_once(tmp_path: Path) -> None:
    (tmp_path / "frame.png").write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        read_frame(tmp_path / "frame.png")
    assert str(caught.value).count("frame.png") == 1


def test_reading_an_array_leaves_it_alone() -> None:
    pixels = PIXELS.copy()
    read_frame(pixels).zero_()
    assert np.array_equal(pixels, PIXELS)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"frame .*absent\.png: no such file"):
        read_frame(tmp_path / "absent.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_a_damaged_image_reads_or_is_named_in_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"frame.{suffix}"
    Image.fromarray(PIXELS).resize((64, 128)).save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    refused = []
    for cut in range(300):
        damaged = bytearray(whole[: int(rng.integers(1, len(whole)))] if cut % 2 else whole)
        for at in rng.integers(0, min(len(damaged), 200), 3):  # the head, where the structure is
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert read_frame(path).dtype == torch.uint8
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(str(path) in message and "\n" not in message for message in refused)


CORNERS = np.zeros((16, 24, 3), np.uint8)  # red and green above blue and black
CORNERS[:8, :12, 0] = CORNERS[:8, 12:, 1] = CORNERS[8:, :12, 2] = 255

STORED = {  # as an image of each orientation is stored that is to be shown as CORNERS
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: np.rot90(CORNERS, 2),
    4: CORNERS[::-1],
    5: CORNERS.swapaxes(0, 1),
    6: np.rot90(CORNERS),
    7: np.rot90(CORNERS, 2).swapaxes(0, 1),
    8: np.rot90(CORNERS, -1),
}


def save_oriented(path: Path, orientation: int, **options: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(path, exif=exif, **options)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_upright_by_its_exif(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"frame.{suffix}"
    options = {"webp": {"lossless": True}, "jpg": {"quality": 95, "subsampling": 0}}.get(suffix, {})
    save_oriented(path, orientation, **options)
    frame = read_frame(path).permute(1, 2, 0).numpy().astype(int)
    assert frame.shape == CORNERS.shape
    assert np.abs(frame - CORNERS).max() <= (60 if suffix == "jpg" else 0)


def test_an_image_of_few_colors_is_upright_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.ascontiguousarray(STORED[6])).convert("P", palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / "frame.png", exif=exif)
    assert np.array_equal(read_pixels(tmp_path / "frame.png"), CORNERS)


def test_an_orientation_in_xmp_counts_too(tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>'
    Image.fromarray(np.ascontiguousarray(STORED[6])).save(tmp_path / "frame.webp", lossless=True, xmp=xmp)
    assert np.array_equal(read_pixels(tmp_path / "frame.webp"), CORNERS)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_leaves_a_readable_image_upright_or_as_it_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "frame.png"
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8769] = 6, "a description", {0x9003: "2001:01:01 00:00:00"}
    whole = exif.tobytes()
    image = Image.fromarray(np.ascontiguousarray(STORED[6]))
    rng = np.random.default_rng(2)
    shapes = set()
    for cut in range(400):
        damaged = bytearray(whole[: int(rng.integers(6, len(whole)))] if cut % 2 else whole)
        for at in rng.integers(6, len(damaged), 3) if len(damaged) > 6 else ():
            damaged[at] = rng.integers(256)
        image.save(path, exif=bytes(damaged))
        shapes.add(read_pixels(path).shape)
    assert shapes == {CORNERS.shape, STORED[6].shape}


def test_an_orientation_that_is_none_is_ignored(tmp_path: Path) -> None:
    for value in (0, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = value
        Image.fromarray(CORNERS).save(tmp_path / "frame.png", exif=exif)
        assert np.array_equal(read_pixels(tmp_path / "frame.png"), CORNERS)


@pytest.mark.parametrize("person", [2**63, -(2**63) - 1])
def test_a_person_beyond_int64_is_refused_by_name(person: int) -> None:
    with pytest.raises(UserError, match=f"\\Atracklet cam1/x: got person {person}, wanted a number within int64\\Z"):
        Tracklet(person, 1, (PIXELS,), "cam1/x")


def test_an_empty_tracklet_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="cam1/person001: got no frames"):
        Tracklet(1, 1, (), "cam1/person001")


def test_train_people_are_distinct_and_sorted() -> None:
    train = tuple(Tracklet(person, 1, (PIXELS,), "x") for person in (7, 3, 7, 319))
    assert Split(train, (), (), "single-shot", "").train_people == (3, 7, 319)
