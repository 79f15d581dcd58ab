from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from training.data.datasets.mot_sequence import read_sequence
from training.data.resizing import resize
from training.data.tracklets import read_frame

DTYPES = (torch.uint8, torch.float32)  # of a CPU and of other devices


def by_pillow(frames: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.stack([read_frame(frame.permute(1, 2, 0).numpy(), size) for frame in frames])


def off_by(frames: Tensor, size: tuple[int, int], dtype: torch.dtype) -> int:
    """Return the largest difference in levels between frames resized together and by Pillow one by one."""
    resized = resize(frames.to(dtype), size)
    assert resized.dtype == dtype and resized.shape == (len(frames), 3, *size)
    return int((resized.int() - by_pillow(frames, size).int()).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_pillows_within_two_levels_at_any_size_even_of_black_and_white(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    worst = 0
    for number in range(200):
        h, w, height, width = (1 if rng.random() < 0.1 else int(rng.integers(1, 120)) for _ in range(4))
        levels = rng.integers(0, 256, (2, h, w, 3)) if number % 2 else 255 * rng.integers(0, 2, (2, h, w, 3))
        frames = torch.from_numpy(levels.astype(np.uint8)).permute(0, 3, 1, 2)
        if number % 3:
            frames = frames.contiguous()
        worst = max(worst, off_by(frames, (height, width), dtype))
    assert 1 <= worst <= 2


@pytest.mark.shared
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_pillows_on_people_cut_out_of_a_video(shared_dir: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    pets = shared_dir / "data" / "pets09-s2l1"
    (tmp_path / "PETS09-S2L1.avi").symlink_to(pets / "PETS09-S2L1.avi")
    (tmp_path / "seqinfo.ini").write_text("[Sequence]\nframeRate=7\nseqLength=24\n")
    boxes = (pets / "gt.txt").read_text().splitlines()
    (tmp_path / "gt.txt").write_text("\n".join(box for box in boxes if int(box.split(",")[0]) <= 24))
    crops = [crop for track in read_sequence(tmp_path).tracks for crop in track.crops[::6]]
    sizes = {crop.shape for crop in crops}
    assert len(sizes) > 8
    for size in ((64, 64), (299, 299), (33, 17)):
        assert max(off_by(read_frame(crop)[None], size, dtype) for crop in crops) <= 2


def test_floats_are_rounded_and_clipped_between_the_passes_as_pillow_does() -> None:
    board = (255 * (np.indices((40, 20)).sum(0) % 2)).astype(np.uint8)
    frames = torch.from_numpy(np.stack([board] * 3))[None]
    at_once = torch.nn.functional.interpolate(frames.float(), (90, 50), mode="bicubic", antialias=True)
    at_once = at_once.round().clamp(0, 255).int()
    assert (at_once - by_pillow(frames, (90, 50)).int()).abs().max() > 10
    assert off_by(frames, (90, 50), torch.float32) <= 1


def test_a_frame_that_has_the_size_stays_as_it_is() -> None:
    frames = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8)
    assert torch.equal(resize(frames, (9, 7)), frames)


def test_pillow_mode_is_pillow_to_the_bit(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (31, 17, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "frame.png")
    wanted = np.asarray(Image.fromarray(pixels).resize((48, 64), Image.Resampling.BICUBIC))
    for frame in (pixels, tmp_path / "frame.png"):
        assert np.array_equal(read_frame(frame, (64, 48)).permute(1, 2, 0).numpy(), wanted)
