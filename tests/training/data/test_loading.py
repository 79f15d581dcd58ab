from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as transforms

from training.data import load_split
from training.data.datasets.ilids_vid import load
from training.data.loading import Batch, frames_to_input, make_loader
from training.data.resizing import resize
from training.data.sampler import PKSampler
from training.data.tracklets import Tracklet, read_frame
from training.data.workers import explain_errors
from training.pack import Options, pack
from training.runtime.errors import UserError

RNG = np.random.default_rng(0)


def tracklet(person: int, length: int, camera: int = 1) -> Tracklet:
    """Make a tracklet whose frames encode person, frame number and camera, in several sizes."""
    frames = tuple(np.full((4 + f % 3, 5, 3), (person, f, camera), np.uint8) for f in range(length))
    return Tracklet(person, camera, frames, f"cam{camera}/person{person:03d}")


PEOPLE = [tracklet(person, 12, camera) for person in (3, 7, 40) for camera in (1, 2)]


def batches(
    tracklets: Sequence[Tracklet],
    frames: int,
    workers: int,
    size: tuple[int, int] | None = None,
    start: str | None = None,
) -> list[Batch]:
    """Return the batches of two epochs, read by the same workers."""
    sampler = PKSampler(tracklets, 2, 2, frames, seed=0, batches=3)
    loader = make_loader(tracklets, sampler, frames, workers, size)
    loader.multiprocessing_context = start
    result: list[Batch] = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert len(loader) == 3
        result += loader
    return result


def test_clips_are_contiguous_frames_of_their_person() -> None:
    for batch in batches(PEOPLE, 4, workers=0):
        clips = [batch.frames[start : start + 4] for start in range(0, 16, 4)]
        for clip, label, name in zip(clips, batch.labels, batch.clips, strict=True):
            person, first, camera = clip[0][:, 0, 0].tolist()
            assert [frame[:, 0, 0].tolist() for frame in clip] == [[person, first + t, camera] for t in range(4)]
            assert (3, 7, 40)[label] == person
            assert name == f"cam{camera}/person{person:03d}[{first}:{first + 4}]"


def test_a_short_tracklet_repeats_its_last_frame() -> None:
    (batch, *_) = batches([tracklet(1, 3), tracklet(2, 3)], 5, workers=0)
    assert [int(frame[1, 0, 0]) for frame in batch.frames[:5]] == [0, 1, 2, 2, 2]
    assert batch.clips[0].endswith("[0:3]")


def assert_same(here: list[Batch], there: list[Batch]) -> None:
    for one, other in zip(here, there, strict=True):
        assert one.clips == other.clips
        assert one.sizes == other.sizes
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.pixels, other.pixels)


def test_workers_and_packing_change_nothing_in_any_epoch(small_data: Path, tmp_path: Path) -> None:
    pack(Options("ilids-vid", tmp_path / "people.pack", small_data, splits=(0,), check_counts=False))
    folder, file = (
        load_split("ilids-vid", root, 0, check_counts=False).train for root in (small_data, tmp_path / "people.pack")
    )
    here = batches(folder, 4, workers=0)
    assert here[0].clips != here[3].clips, "the second epoch must reach the workers"
    for tracklets, workers in ((file, 0), (folder, 1), (file, 1), (folder, 2), (file, 2)):
        assert_same(here, batches(tracklets, 4, workers))


def test_a_pack_is_read_by_workers_that_start_afresh(ilids: Path) -> None:
    pack(Options("ilids-vid", ilids / "people.pack", ilids, splits=(0,), check_counts=False))
    tracklets = load_split("ilids-vid", ilids / "people.pack", 0, check_counts=False).train
    assert_same(batches(tracklets, 4, workers=0), batches(tracklets, 4, workers=1, start="spawn"))


def test_loading_leaves_the_global_generators_alone() -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches(PEOPLE, 4, workers=0)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_a_batch_survives_pickling() -> None:
    (batch, *_) = batches(PEOPLE, 4, workers=0)
    copy = pickle.loads(pickle.dumps(batch))
    assert all(map(torch.equal, copy.frames, batch.frames))
    assert torch.equal(copy.labels, batch.labels)
    assert copy.clips == batch.clips


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_ends_in_one_line_that_names_it(ilids: Path, workers: int) -> None:
    split = load(ilids, 0, check_counts=False)
    for path in split.train[1].frames:
        assert isinstance(path, Path)
        path.write_bytes(path.read_bytes()[:45])
    sampler = PKSampler(split.train, 2, 2, 2, seed=0)
    with pytest.raises(UserError, match=r"\Aframe .*person002.*: not a readable image .*\Z"):  # . is no line end
        list(make_loader(split.train, sampler, 2, workers))


def test_input_equals_resizing_frame_by_frame_in_the_order_given() -> None:
    sizes = [(40, 20), (64, 48), (40, 20), (128, 64), (64, 48), (40, 20), (1, 1)]
    frames = [torch.from_numpy(RNG.integers(0, 256, (3, *size), dtype=np.uint8)) for size in sizes]
    result = frames_to_input(frames, (64, 48), "cpu", mean=0.4, std=0.2)
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    for frame, got in zip(frames, result, strict=True):
        scaled = transforms.to_dtype(resize(frame[None], (64, 48)), torch.float32, scale=True)[0]
        wanted = transforms.normalize(scaled, [0.4] * 3, [0.2] * 3)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_frames_resized_as_they_are_read_are_the_input_by_pillow_to_the_bit() -> None:
    (native, *_), (ready, *_) = (batches(PEOPLE, 4, workers=0, size=size) for size in (None, (64, 48)))
    assert len(set(native.sizes)) == 3 and set(ready.sizes) == {(64, 48)}
    for frame, resized in zip(native.frames, ready.frames, strict=True):
        assert torch.equal(read_frame(frame.permute(1, 2, 0).numpy(), (64, 48)), resized)
    wanted = torch.stack(ready.frames).float().div(255).sub(0.5).div(0.5)
    assert torch.equal(frames_to_input(ready.frames, (64, 48), "cpu"), wanted)


def test_input_of_black_and_white_spans_minus_one_to_one() -> None:
    frames = [torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((3, 9, 9), 255, dtype=torch.uint8)]
    assert frames_to_input(frames, (4, 4), "cpu").amax(dim=(1, 2, 3)).tolist() == [-1.0, 1.0]


def test_a_killed_worker_is_one_line() -> None:
    loader = make_loader(PEOPLE, PKSampler(PEOPLE, 2, 2, 4, seed=0), 4, workers=1)
    list(loader)
    os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)  # type: ignore[union-attr]
    wanted = r"\Aworkers: DataLoader worker \(pid.* \d+\) (is|exited) .*; where memory ran out, .*\Z"
    with pytest.raises(UserError, match=wanted):
        read(loader)


@explain_errors()
def read(loader: DataLoader[Any]) -> None:
    list(loader)
