from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import Inception_V3_Weights, inception_v3

from training.model.backbone import Inception, Tiny
from training.model.weights import download_inception, read_weights
from training.runtime.errors import UserError


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return Tiny("random").net.state_dict()


def test_pth_and_safetensors_load_the_same_network(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "tiny.pth")
    safetensors.torch.save_file(weights, tmp_path / "tiny.safetensors")
    for name in ("tiny.pth", "tiny.safetensors"):
        tiny = Tiny(str(tmp_path / name))
        assert tiny.pretrained
        assert all(torch.equal(tensor, weights[key]) for key, tensor in tiny.net.state_dict().items())


def published_inception(aux_classes: int = 1000) -> dict[str, Tensor]:
    """Inception-v3's state_dict as torchvision publishes it: from before batch norms counted their batches."""
    net = inception_v3(weights=None, init_weights=False)
    net.AuxLogits.fc = nn.Linear(768, aux_classes)
    return {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}


def assert_filled(inception: Inception, published: dict[str, Tensor]) -> None:
    own = inception.net.state_dict()
    assert own["AuxLogits.fc.weight"].shape == (5, 768)
    counters = [name for name in own if name.endswith("num_batches_tracked")]
    assert len(counters) == 96
    assert not any(own[name] for name in counters)
    loaded = own.keys() - {"AuxLogits.fc.weight", "AuxLogits.fc.bias", *counters}
    assert loaded == {name for name in published if not name.startswith(("fc.", "AuxLogits.fc."))}
    assert all(torch.equal(own[name], published[name]) for name in loaded)


@pytest.mark.parametrize("aux_classes", [1000, 7])
def test_torchvisions_file_fills_all_of_inception_but_the_new_auxiliary_layer(tmp_path: Path, aux_classes: int) -> None:
    published = published_inception(aux_classes)
    torch.save(published, tmp_path / "inception.pth", _use_new_zipfile_serialization=False)
    assert_filled(Inception(5, str(tmp_path / "inception.pth")), published)


def test_torchvisions_download_fills_inception(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    published = published_inception()
    torch.save(published, tmp_path / "hub/checkpoints" / Inception_V3_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    inception = Inception(5, "imagenet")
    assert inception.pretrained
    assert_filled(inception, published)


@pytest.mark.parametrize(
    "publish",
    [
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": state, "epoch": 7},
        lambda state: {"epoch": 7, "model": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {
            name: nn.Parameter(value, requires_grad=value.is_floating_point()) for name, value in state.items()
        },
        lambda state: {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")},
    ],
    ids=["DataParallel", "compiled", "checkpoint", "model", "parameters", "without counters"],
)
def test_a_file_in_any_form_people_publish_loads_the_same_network(
    publish: Callable[[dict[str, Tensor]], Any], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(publish(weights), tmp_path / "tiny.pth")
    loaded = Tiny(str(tmp_path / "tiny.pth")).net.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in loaded.items())


@pytest.mark.parametrize(
    ("content", "holds"),
    [
        ({}, "a dict, wanted"),
        ({"state_dict": {}}, "a dict with 'state_dict': dict, wanted"),
        ({"0.weight": torch.zeros(1), "epoch": 3}, "a dict with 'epoch': int, wanted"),
        ({"0.weight": torch.eye(2).to_sparse()}, "a dict with '0.weight': Tensor, wanted"),
        ({"0.weight": torch.zeros(1, device="meta")}, "a dict with '0.weight': Tensor, wanted"),
        ({"0.weight": torch.zeros(1, dtype=torch.complex64)}, "a dict with '0.weight': Tensor, wanted"),
    ],
    ids=["empty", "empty inside", "a number", "sparse", "meta", "complex"],
)
def test_a_file_without_tensors_is_no_state_dict(content: Any, holds: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "empty.pth")
    message = rf"weights: .*empty\.pth holds {holds} a state_dict \(names to dense tensors\), or one under 'state_dict'"
    with pytest.raises(UserError, match=message):
        Tiny(str(tmp_path / "empty.pth"))


def test_names_and_shapes_that_do_not_fit_are_told_on_one_line(weights: dict[str, Tensor], tmp_path: Path) -> None:
    weights["head.weight"] = weights.pop("0.weight")
    weights["1.bias"] = torch.zeros(5)
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(UserError) as raised:
        Tiny(str(tmp_path / "other.pth"))
    assert str(raised.value).endswith(
        "other.pth does not fit this network: "
        "1 unknown (head.weight); 1 missing (0.weight); 1 of another shape (1.bias)"
    )


@pytest.mark.parametrize("name", ["noise.pth", "noise.safetensors", "list.pth", "numbered.pth", "absent.pth"])
def test_a_file_that_is_no_state_dict_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "noise.pth").write_bytes(b"not a checkpoint")
    (tmp_path / "noise.safetensors").write_bytes(b"not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({0: torch.zeros(1)}, tmp_path / "numbered.pth")
    with pytest.raises(UserError, match=name) as raised:
        Tiny(str(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_without_a_network_inception_starts_at_random_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # the discard port: refused at once
    with pytest.warns(UserWarning, match="no ImageNet weights") as raised:
        inception = Inception(5, "imagenet")
    assert len(raised) == 1
    assert not inception.pretrained


def test_any_bytes_end_in_one_line_without_colors_or_advice_to_trust_them(tmp_path: Path) -> None:
    path, rng = tmp_path / "damaged.pth", random.Random(0)
    torch.save({"weight": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    torch.save({"trainer": Path("x")}, path)
    contents = [path.read_bytes(), *(rng.randbytes(rng.randrange(40)) for _ in range(200))]
    contents += [whole[: rng.randrange(len(whole))] for _ in range(100)]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=r"\A.*damaged\.pth: not a readable state_dict \(.+\)\Z"
        ) as raised:  # . is no line end
            read_weights(path)
        assert "\x1b" not in str(raised.value)
        assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"cut short"])
def test_a_download_gone_wrong_is_a_random_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints" / Inception_V3_Weights.IMAGENET1K_V1.url.rpartition("/")[2]).write_bytes(content)
    with pytest.warns(UserWarning, match="no ImageNet weights"):
        assert download_inception() is None
