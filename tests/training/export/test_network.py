from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.small_runs import last, options
from training import FeatureExtractor
from training.engine.load_trained import UseOptions, load_trained
from training.engine.options import make_options
from training.evaluate import Options as EvaluateOptions
from training.evaluate import evaluate
from training.export.network import Options, export_network
from training.model.network import Network
from training.runtime.errors import UserError
from training.train import train


@pytest.fixture
def shared_network(run: Path, tmp_path: Path) -> Path:
    export_network(Options(run, tmp_path / "new" / "net"))
    return tmp_path / "new" / "net"


def test_a_network_to_share_is_used_as_its_run_is(run: Path, shared_network: Path, small_data: Path) -> None:
    assert sorted(path.name for path in shared_network.iterdir()) == ["config.json", "model.safetensors"]
    where = {"data_root": small_data, "check_counts": False, "device": "cpu"}
    results = [evaluate(EvaluateOptions(checkpoint=path, **where)) for path in (run, shared_network)]  # type: ignore[arg-type]
    assert results[0] == results[1]
    folder = small_data / "i-LIDS-VID" / "sequences" / "cam1" / "person003"
    assert torch.equal(*(FeatureExtractor(path, device="cpu")(folder) for path in (run, shared_network)))
    assert Network.from_pretrained(shared_network).identities == 4


def test_its_record_has_all_but_where_the_data_was(run: Path, shared_network: Path, small_data: Path) -> None:
    config = json.loads((shared_network / "config.json").read_text())
    wanted = json.loads((last(run) / "config.json").read_text())
    assert config.pop("epoch") == 1
    assert config["settings"].pop("data_root") is None and wanted["settings"].pop("data_root") == str(small_data)
    assert config.pop("data") == wanted.pop("data").replace(str(small_data), "the data root")
    assert config == wanted
    assert str(small_data) not in (shared_network / "config.json").read_text()
    with pytest.raises(UserError, match=r"^dataset ilids-vid: got no data root"):
        load_trained(shared_network, UseOptions())


def test_it_cannot_be_trained_on_and_says_so(shared_network: Path, small_data: Path) -> None:
    with pytest.raises(UserError, match=r"^resume: .*net is a network without the state of its training, wanted a run"):
        train(make_options(resume=shared_network, output=shared_network.parent / "run", data_root=small_data, epochs=2))


def test_nothing_is_written_over(run: Path, shared_network: Path) -> None:
    before = (shared_network / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"^output: .*net is there already, wanted a new folder"):
        export_network(Options(run, shared_network))
    assert (shared_network / "config.json").read_bytes() == before
    with pytest.raises(UserError, match=r"no checkpoint here \(config.json is missing\)"):
        export_network(Options(shared_network.parent, shared_network.parent / "other"))
    assert [path.name for path in shared_network.parent.iterdir()] == ["net"]


def test_a_hugging_face_folder_has_no_record_for_an_evaluation(run: Path, tmp_path: Path) -> None:
    Network.from_pretrained(last(run)).save_pretrained(tmp_path / "net")
    assert FeatureExtractor(tmp_path / "net", device="cpu").features == 64
    with pytest.raises(UserError, match=r"config.json: a network without the record of a training, wanted a run, or"):
        load_trained(tmp_path / "net", UseOptions())


def test_no_path_of_this_machine_is_published(run: Path, small_data: Path, tmp_path: Path) -> None:
    weights = last(run) / "model.safetensors"
    train(options(small_data, tmp_path / "run", weights=str(weights), epochs=1, batches=1))
    export_network(Options(tmp_path / "run", tmp_path / "net"))
    text = (tmp_path / "net" / "config.json").read_text()
    assert str(tmp_path) not in text and str(run.parent) not in text
    assert json.loads(text)["settings"]["weights"] == "model.safetensors"
    assert FeatureExtractor(tmp_path / "net", device="cpu").features == 64
