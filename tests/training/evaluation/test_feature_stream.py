from __future__ import annotations

import numpy as np
import pytest
import torch

from training.config.presets import QUICK
from training.config.table1 import ROWS
from training.data.tracklets import Tracklet
from training.evaluation.feature_stream import FeatureStream
from training.evaluation.features import extract
from training.model.network import Network
from training.runtime.errors import UserError

LENGTHS = {7: 23, 2: 1, 9: 11, 4: 2}  # frames of each track
BEGINS = {7: 0, 2: 3, 9: 5, 4: 30}


def frames_of(track: int) -> list[np.ndarray]:
    rng = np.random.default_rng(track)
    sizes = [(40, 20), (64, 30)]
    return [rng.integers(0, 256, (*sizes[n % 2], 3), dtype=np.uint8) for n in range(LENGTHS[track])]


def network_of(row: str) -> Network:
    torch.manual_seed(0)
    network = Network(ROWS[row].apply(QUICK).model, 3, "fast").double()
    for norm in network.modules():
        if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return network.eval()


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize(
    "row", ["Baseline", "Baseline+LSTM+Lv", "Baseline+STIM+Lv", "Baseline+RRU+LSTM+Lv", "Baseline+RRU+STIM+Lv+Lp"]
)
@pytest.mark.parametrize("declared", [True, False], ids=["ended", "not ended"])
def test_interleaved_tracks_have_the_features_of_each_alone(row: str, chunk: int, declared: bool) -> None:
    network = network_of(row)
    wanted = extract(network, [Tracklet(0, 0, frames_of(track), str(track)) for track in LENGTHS])
    stream = FeatureStream(network, chunk)
    frames = {track: frames_of(track) for track in LENGTHS}
    for time in range(40):
        for track, begin in BEGINS.items():
            if begin <= time < begin + LENGTHS[track]:
                stream.add(track, frames[track][time - begin])
            elif declared and time == begin + LENGTHS[track] + 2:
                stream.end(track)
    features = stream.finish()
    assert features.keys() == LENGTHS.keys()
    for track, feature in zip(LENGTHS, wanted, strict=True):
        np.testing.assert_allclose(features[track], feature, rtol=0, atol=1e-12 * np.abs(feature).max())


def test_a_feature_that_is_not_finite_is_named() -> None:
    network = network_of("Baseline")
    with torch.no_grad():
        network.backbone.net[0].weight.fill_(torch.inf)  # type: ignore[index, union-attr]
    stream = FeatureStream(network)
    stream.add(3, frames_of(2)[0])
    with pytest.raises(UserError, match=r"^track 3: its feature is not finite"):
        stream.finish()


def test_only_a_chunk_and_a_frame_per_open_track_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, network = FeatureStream(network := network_of("Baseline"), chunk=8), network
    seen: list[int] = []
    run = network.backbone.forward
    monkeypatch.setattr(network.backbone, "forward", lambda frames: seen.append(len(frames)) or run(frames))
    frame = frames_of(2)[0]
    for track in range(5):
        for _ in range(20):
            stream.add(track, frame)
        stream.end(track)
    assert len(stream.finish()) == 5
    assert sum(seen) == 100 and max(seen) <= 8 + 5


def test_no_track_is_no_feature() -> None:
    assert FeatureStream(network_of("Baseline")).finish() == {}
