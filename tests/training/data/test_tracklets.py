from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.data.tracklets import Split, Tracklet, read_frame
from training.errors import UserError

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
    with pytest.raises(UserError) as told:
        read_frame(tmp_path / "frame.png")
    assert str(told.value).count("frame.png") == 1


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


def test_an_empty_tracklet_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="cam1/person001: got no frames"):
        Tracklet(1, 1, (), "cam1/person001")


def test_train_people_are_distinct_and_sorted() -> None:
    train = tuple(Tracklet(person, 1, (PIXELS,), "x") for person in (7, 3, 7, 319))
    assert Split(train, (), (), "single-shot", "").train_people == (3, 7, 319)
