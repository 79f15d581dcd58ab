from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from training.config.presets import Recipe
from training.data.tracklets import Split
from training.model.network import Network
from training.runtime.errors import UserError
from training.runtime.fields import update
from training.show.features import Maps, maps_of, picture


@pytest.fixture
def network(recipe: Recipe) -> Network:
    network = Network(recipe.model, identities=4, ops="reference")
    with torch.no_grad():
        for parameter in network.rru.parameters():  # a gate that is not 1/2 everywhere
            parameter.normal_()
    return network


def test_a_tracklet_has_the_same_maps_in_chunks_as_in_one_go(network: Network, split: Split) -> None:
    tracklet = split.train[4]
    assert len(tracklet.frames) == 5
    whole, parts = maps_of(network.double(), tracklet), maps_of(network, tracklet, chunk=2)
    for name in ("x", "z", "s"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-9)
    assert network.training
    assert np.isnan(whole.z[0]).all()
    assert not np.isnan(whole.z[1:]).any()
    np.testing.assert_array_equal(whole.s[0], whole.x[0])
    assert np.abs(whole.s[1:] - whole.x[1:]).max() > 0.01 * whole.x.max()


def test_before_and_after_have_one_scale_of_colors_and_the_gate_its_own(network: Network, split: Split) -> None:
    maps = maps_of(network, split.train[4])
    (block,) = picture([maps], columns=3).subfigs
    frames, before, gate, after = (axes for axes in block.axes if axes.images)
    assert [text.get_text() for text in frames.texts] == ["$t$ = 1", "$t$ = 3", "$t$ = 5"]
    shown = {axes: [image for image in axes.images if image.get_alpha() is not None] for axes in (before, gate, after)}
    for axes, values, times in ((before, maps.x, (0, 2, 4)), (gate, maps.z, (2, 4)), (after, maps.s, (0, 2, 4))):
        for image, time in zip(shown[axes], times, strict=True):
            np.testing.assert_array_equal(image.get_array(), values[time])
    both = np.stack((maps.x[[0, 2, 4]], maps.s[[0, 2, 4]]))
    assert {image.get_clim() for axes in (before, after) for image in shown[axes]} == {(both.min(), both.max())}
    opened = maps.z[[2, 4]]
    assert {image.get_clim() for image in shown[gate]} == {(opened.min(), opened.max())}


def test_a_block_a_tracklet_each_in_its_own_scale(network: Network, split: Split) -> None:
    maps = maps_of(network, split.train[4])
    louder = Maps(maps.tracklet, 2 * maps.x, maps.z, 2 * maps.s)
    one, two = picture([maps, louder], columns=2).subfigs
    limits = [next(axes for axes in block.axes if len(axes.images) == 4).images[-1].get_clim() for block in (one, two)]
    assert limits[1] == tuple(2 * limit for limit in limits[0])


def test_without_a_gate_there_is_nothing_to_draw(recipe: Recipe, network: Network, split: Split) -> None:
    plain = Network(update(recipe, rru="none", part_loss=False).model, identities=4, ops="fast")
    with pytest.raises(UserError, match="checkpoint: got a network without an RRU"):
        maps_of(plain, split.train[0])
    lone = replace(split.train[0], frames=split.train[0].frames[:1])
    with pytest.raises(UserError, match="tracklet cam1/person003: got one frame, wanted more"):
        maps_of(network, lone)
