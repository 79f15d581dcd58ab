from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.harness.measure import peak_bytes
from training.config.presets import Recipe
from training.data.loading import frames_to_input
from training.data.tracklets import Split, Tracklet, read_frame
from training.evaluation.features import extract
from training.model.network import Network
from training.model.operators import Ops
from training.runtime.device import choose_device
from training.runtime.errors import UserError
from training.runtime.fields import update

RRUS = {
    "none": {"rru": "none", "part_loss": False},
    "both": {"rru": "both"},
    "spatial": {"rru": "spatial"},
    "channel": {"rru": "channel"},
    "appearance": {"rru_inputs": "appearance"},
    "raw": {"rru_inputs": "raw"},
}
HEADS = ["baseline", "lstm", "stim"]
LENGTHS = [3, 1, 7, 2, 4, 2]


@pytest.fixture
def network(recipe: Recipe) -> Network:
    return Network(recipe.model, identities=4, ops="reference")


def make_network(recipe: Recipe, head: str, rru: str, ops: Ops) -> Network:
    """A network whose batch norms are no identities, so that a frame of zeros is not zero behind them."""
    torch.manual_seed(0)
    network = Network(update(recipe, head=head, **RRUS[rru]).model, identities=4, ops=ops)
    for name, tensor in network.state_dict().items():
        if ".running_" in name or tensor.shape == (network.head.features,):
            tensor.copy_(torch.rand(tensor.shape) + 0.2)
    return network


def tracklet_of(frames: int) -> Tracklet:
    images = np.random.default_rng(frames).integers(0, 256, (frames, 16, 8, 3), dtype=np.uint8)
    return Tracklet(1, 1, tuple(images), f"{frames} frames")


@torch.no_grad()
def in_one_go(network: Network, tracklet: Tracklet) -> np.ndarray:
    frames = frames_to_input([read_frame(frame) for frame in tracklet.frames], network.backbone.size, "cpu")
    maps, _ = network.eval().backbone(frames.to(next(network.parameters()).dtype))
    return network.embed(maps[None])[0][0].double().numpy()


def by_default(*pairs: tuple[str, str], rrus: Iterable[str] = RRUS) -> pytest.MarkDecorator:
    """Draw every head with every RRU, all but these pairs where all is asked for alone."""
    return pytest.mark.parametrize(
        ("head", "rru"),
        [
            pytest.param(head, rru, marks=() if (head, rru) in pairs else pytest.mark.exhaustive)
            for head in HEADS
            for rru in rrus
        ],
    )


# Each head, and each kind of what an RRU carries from chunk to chunk.
@by_default(("baseline", "none"), ("lstm", "both"), ("stim", "both"), ("stim", "raw"), ("stim", "appearance"))
def test_chunks_and_ragged_batches_give_the_features_of_one_go(recipe: Recipe, head: str, rru: str) -> None:
    tracklets = [tracklet_of(frames) for frames in LENGTHS]
    for ops, dtype, tolerance in (("reference", torch.float64, 1e-12), ("fast", torch.float32, 1e-5)):
        network = make_network(recipe, head, rru, ops).to(dtype)
        wanted = np.stack([in_one_go(network, tracklet) for tracklet in tracklets])
        for chunk in (1, 2, 3, 5, 8, 64):
            error = np.abs(extract(network, tracklets, chunk) - wanted).max(1)
            assert (error <= tolerance * np.abs(wanted).max(1)).all(), (chunk, error)


@pytest.mark.parametrize("chunk", [1, 5, 8])
def test_no_more_than_a_chunk_of_frames_goes_through_at_once(network: Network, chunk: int) -> None:
    through, padded = [], []
    network.backbone.register_forward_pre_hook(lambda _, inputs: through.append(len(inputs[0])))
    assert network.rru is not None
    network.rru.register_forward_pre_hook(lambda _, inputs: padded.append(inputs[0].shape[0] * inputs[0].shape[1]))
    extract(network, [tracklet_of(frames) for frames in LENGTHS], chunk)
    assert sum(through) == sum(LENGTHS)
    assert max(padded) <= chunk
    # In order of length, 1 2 2 | 3 | 4 | 5 + 2 and 1 2 2 | 3 4 | 7: that is what padding costs.
    assert (chunk, through) in [(1, [1] * sum(LENGTHS)), (5, [3, 2, 3, 4, 5, 2]), (8, [5, 7, 7])]


@by_default(("lstm", "none"), ("stim", "both"), rrus=("none", "both"))
def test_a_tracklet_ten_times_as_long_needs_no_more_memory(recipe: Recipe, head: str, rru: str) -> None:
    device = choose_device("auto")
    network = make_network(recipe, head, rru, "fast").to(device)
    frames = tracklet_of(16).frames
    short, long = (replace(tracklet_of(1), frames=frames * times) for times in (1, 10))
    extract(network, [short], chunk=8)  # the first call keeps what a library sets up
    peak, allowed = (peak_bytes(lambda t=t: extract(network, [t], chunk=8), device) for t in (long, short))
    assert 0 < peak <= 1.02 * allowed


@pytest.mark.parametrize("chunk", [1, 8])
def test_progress_counts_every_frame(network: Network, chunk: int, counted: list[tuple[object, ...]]) -> None:
    extract(network, [tracklet_of(frames) for frames in LENGTHS], chunk)
    assert counted == [("Extracting features", sum(LENGTHS), sum(LENGTHS), "frames")]


def test_a_chunk_without_frames_is_refused(network: Network, split: Split) -> None:
    with pytest.raises(UserError, match="chunk: got 0, wanted at least 1 frame"):
        extract(network, split.query, chunk=0)


def test_a_frame_that_cannot_be_read_is_named(network: Network, split: Split, tmp_path: Path) -> None:
    gone = replace(split.query[1], frames=(*split.query[1].frames, tmp_path / "gone.png"))
    with pytest.raises(UserError, match=r"frame .*gone\.png: no such file"):
        extract(network.train(), [split.query[0], gone])
    assert network.training


def test_two_extractions_are_equal_to_the_last_bit(network: Network, split: Split) -> None:
    assert np.array_equal(extract(network, split.query), extract(network, split.query))


def test_every_frame_of_a_tracklet_counts(network: Network, split: Split) -> None:
    tracklet = split.train[2]
    without = [replace(tracklet, frames=tracklet.frames[:i] + tracklet.frames[i + 1 :]) for i in range(4)]
    features = extract(network, [tracklet, *without])
    assert len(np.unique(features.round(9), axis=0)) == 5


def test_extraction_leaves_the_network_as_it_was(network: Network, split: Split) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    extract(network, split.query)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_feature_that_is_not_finite_is_an_error_not_a_rank(network: Network, split: Split) -> None:
    network.train()
    with torch.no_grad():
        network.head.net[0].weight.fill_(torch.nan)
    with pytest.raises(UserError, match="cam1/person003: its feature is not finite"):
        extract(network, split.query)
    assert network.training
