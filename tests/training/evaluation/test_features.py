from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from training.data.tracklets import Split
from training.errors import UserError
from training.evaluation.features import extract
from training.model.network import Network
from training.recipes import Recipe


@pytest.fixture
def network(recipe: Recipe) -> Network:
    return Network(recipe, identities=4, ops="reference")


def test_features_do_not_depend_on_how_frames_are_chunked(network: Network, split: Split) -> None:
    whole = extract(network, split.probe)
    for chunk in (1, 2, 4):
        np.testing.assert_allclose(extract(network, split.probe, chunk), whole, rtol=1e-5, atol=1e-7)


def test_two_extractions_are_equal_to_the_last_bit(network: Network, split: Split) -> None:
    assert np.array_equal(extract(network, split.probe), extract(network, split.probe))


def test_every_frame_of_a_tracklet_counts(network: Network, split: Split) -> None:
    tracklet = split.train[2]
    without = [replace(tracklet, frames=tracklet.frames[:i] + tracklet.frames[i + 1 :]) for i in range(4)]
    features = extract(network, [tracklet, *without])
    assert len(np.unique(features.round(9), axis=0)) == 5


def test_extraction_leaves_the_network_as_it_was(network: Network, split: Split) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    extract(network, split.probe)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_feature_that_is_not_finite_is_an_error_not_a_rank(network: Network, split: Split) -> None:
    with torch.no_grad():
        network.head.net[0].weight.fill_(torch.nan)
    with pytest.raises(UserError, match="cam1/person003: its feature is not finite"):
        extract(network, split.probe)
    assert network.training
