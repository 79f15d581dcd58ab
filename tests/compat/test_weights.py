"""from_official: `rru_fast.RRU` with converted weights against the authors' unit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rru_fast
from tests.helpers import third_party


@pytest.fixture
def official() -> third_party.RRU:
    module = third_party.RRU(12).double()
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value) * 0.2)
    return module


@pytest.mark.parametrize("training", [True, False])
def test_converted_weights_compute_what_the_official_unit_computes(official: third_party.RRU, training: bool) -> None:
    fast = rru_fast.RRU(12).double()
    fast.load_state_dict(rru_fast.from_official(official.state_dict()))
    x = torch.randn(3, 5, 12, 8, 8, dtype=torch.float64)
    wanted = official.train(training)(x).transpose(1, 2)
    got = fast.train(training)(x)
    assert torch.allclose(got.features, wanted, rtol=1e-10, atol=1e-12)
    assert torch.allclose(got.strips, wanted.mean((1, 4)), rtol=1e-10, atol=1e-12)
    assert torch.allclose(fast.transition_norm.running_var, official.reduce_dim_z.bn.running_var)


def test_the_unit_is_found_inside_a_network_and_its_weights_do_not_change(official: third_party.RRU) -> None:
    network = nn.ModuleDict({"base": nn.Conv2d(3, 12, 1), "fuse_net": official})
    before = official.reduce_dim_z.conv.weight.clone()
    converted = rru_fast.from_official(network.state_dict())
    rru_fast.RRU(12).load_state_dict(converted)
    assert torch.equal(official.reduce_dim_z.conv.weight, before)


def test_other_entries_may_be_anything(official: third_party.RRU) -> None:
    state: dict[Any, Any] = {"epoch": 3, 7: None, **official.state_dict()}
    assert rru_fast.from_official(state).keys() == rru_fast.from_official(official.state_dict()).keys()


def test_weights_saved_by_an_old_pytorch_load_without_num_batches_tracked(official: third_party.RRU) -> None:
    old = {name: value for name, value in official.state_dict().items() if "num_batches" not in name}
    fast = rru_fast.RRU(12)
    fast.load_state_dict(rru_fast.from_official(old))
    assert torch.equal(fast.transition_norm.running_var, official.reduce_dim_z.bn.running_var.float())


def test_errors_name_what_does_not_fit(official: third_party.RRU) -> None:
    state = official.state_dict()
    with pytest.raises(ValueError, match=r"got no 'c_atten_z\.1\.weight'"):
        rru_fast.from_official({name: value for name, value in state.items() if "c_atten" not in name})
    with pytest.raises(ValueError, match="got 2 RRUs, under"):
        rru_fast.from_official({f"{prefix}.{name}": value for prefix in "ab" for name, value in state.items()})
    with pytest.raises(ValueError, match=r"got shape \(256, 24\), wanted \(D, 2C, 1, 1\)"):
        rru_fast.from_official({**state, "reduce_dim_z.conv.weight": state["reduce_dim_z.conv.weight"].flatten(1)})
