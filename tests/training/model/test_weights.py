from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torchvision.models import inception_v3

from training.errors import UserError
from training.model.backbone import Inception, Tiny


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


def test_torchvisions_file_fills_all_of_inception_but_the_new_auxiliary_layer(tmp_path: Path) -> None:
    published = inception_v3(weights=None, init_weights=False).state_dict()
    torch.save(published, tmp_path / "inception.pth")
    own = Inception(5, str(tmp_path / "inception.pth")).net.state_dict()
    assert own["AuxLogits.fc.weight"].shape == (5, 768)
    differing = [key for key, tensor in own.items() if not torch.equal(tensor, published[key])]
    assert differing == ["AuxLogits.fc.weight", "AuxLogits.fc.bias"]


def test_names_and_shapes_that_do_not_fit_are_told_on_one_line(weights: dict[str, Tensor], tmp_path: Path) -> None:
    weights["head.weight"] = weights.pop("0.weight")
    weights["1.bias"] = torch.zeros(5)
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(UserError) as told:
        Tiny(str(tmp_path / "other.pth"))
    assert str(told.value).endswith(
        "other.pth does not fit this network: "
        "1 unknown (head.weight); 1 missing (0.weight); 1 of another shape (1.bias)"
    )


@pytest.mark.parametrize("name", ["noise.pth", "noise.safetensors", "list.pth", "absent.pth"])
def test_a_file_that_is_no_state_dict_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "noise.pth").write_bytes(b"not a checkpoint")
    (tmp_path / "noise.safetensors").write_bytes(b"not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match=name) as told:
        Tiny(str(tmp_path / name))
    assert "\n" not in str(told.value)


def test_without_a_network_inception_starts_at_random_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # the discard port: refused at once
    with pytest.warns(UserWarning, match="no ImageNet weights") as told:
        inception = Inception(5, "imagenet")
    assert len(told) == 1
    assert not inception.pretrained
