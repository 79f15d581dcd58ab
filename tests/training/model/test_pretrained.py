from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.small_runs import last
from training.config.presets import QUICK
from training.engine.checkpoint import load
from training.engine.load_trained import load_network
from training.model.network import Network
from training.model.pretrained import read_architecture
from training.runtime.errors import UserError
from training.runtime.fields import update


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_saved_is_loaded_again(tmp_path: Path) -> None:
    model = update(QUICK, rru="channel", head="lstm", head_width=24, part_loss=False).model
    network = Network(model, 7, "reference")
    network.save_pretrained(tmp_path / "net")
    loaded = Network.from_pretrained(tmp_path / "net")
    assert (loaded.config, loaded.identities, loaded.ops) == (model, 7, "reference")
    assert_same(loaded, network)
    by_fast = Network.from_pretrained(tmp_path / "net", ops="fast")
    assert type(by_fast.rru) is not type(network.rru)
    assert_same(by_fast, network)
    assert "rru_fast" in (tmp_path / "net" / "README.md").read_text()
    used = load_network(load(tmp_path / "net"), None, torch.device("cpu"))
    assert_same(used, network)


def test_a_network_of_a_weights_file_or_a_library_is_saved_without_it(tmp_path: Path) -> None:
    backbone = Network(QUICK.model, 3, "fast").backbone.net
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    network = Network(update(QUICK, weights=str(tmp_path / "weights.pth")).model, 3, "fast")
    network.save_pretrained(tmp_path / "net")
    (tmp_path / "weights.pth").unlink()
    assert_same(Network.from_pretrained(tmp_path / "net"), network)


def test_a_checkpoints_folder_is_loaded_too(run: Path) -> None:
    network = Network.from_pretrained(last(run))
    assert network.identities == 4
    assert_same(network, load_network(load(run), None, torch.device("cpu")))


def test_a_saved_networks_backbone_is_a_start_for_another(run: Path) -> None:
    weights = str(last(run) / "model.safetensors")
    network = Network(update(QUICK, weights=weights).model, 9, "fast")
    assert_same(network.backbone, Network.from_pretrained(last(run)).backbone)


def test_a_network_is_copied_and_pickled_as_any_module() -> None:
    network = Network(QUICK.model, 3, "fast")
    assert_same(copy.deepcopy(network), network)
    assert_same(pickle.loads(pickle.dumps(network)), network)


SETTINGS = {"backbone": "tiny", "ops": "fast"}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "'settings'"),
        ([], "list indices must be integers or slices, not str"),
        ({"settings": SETTINGS}, "'people'"),
        ({"settings": {"ops": "fast"}, "identities": 3}, "settings: got no backbone"),
        ({"settings": {"backbone": "tiny"}, "identities": 3}, "'ops'"),
        ({"settings": SETTINGS, "identities": "3"}, "identities: got '3', wanted a number of people"),
        ({"settings": {**SETTINGS, "head": "mean"}, "identities": 3}, "head: got 'mean', wanted one of"),
        ({"model_type": "bert"}, "'settings'"),
    ],
)
def test_the_config_of_something_else_is_one_line(record: Any, reason: str) -> None:
    message = f"here: not the config of a network of this project ({reason}"
    with pytest.raises(UserError, match="^" + re.escape(message)) as raised:
        read_architecture(record, "here")
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_config_is_an_error(tmp_path: Path, run: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((last(run) / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="not the config of a network of this project"):
        Network.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"settings": SETTINGS, "identities": 99}))
    with pytest.raises((UserError, RuntimeError), match=r"shape|size"):
        Network.from_pretrained(tmp_path)
