from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torchvision import models

from training.data.tracklets import Split
from training.engine.options import make_options
from training.engine.run import train_run
from training.model.backbone import make_backbone
from training.model.config import ModelConfig
from training.model.ghost_norm import use_ghost_norm
from training.model.named_backbone import NamedBackbone
from training.model.sync_norm import use_sync_norm
from training.runtime.errors import UserError


def normalized(frames: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((frames + 1) / 2 - mean[:, None, None]) / std[:, None, None]


@torch.no_grad()
def test_a_network_of_torchvision_is_its_own_up_to_the_last_maps(tmp_path: Path) -> None:
    whole = models.resnet18(weights=None).eval()
    torch.save(whole.state_dict(), tmp_path / "resnet18.pth")
    backbone = make_backbone(ModelConfig("torchvision/resnet18", weights=str(tmp_path / "resnet18.pth")), 3).eval()
    seen = []
    whole.layer4.register_forward_hook(lambda module, given, maps: seen.append(maps))
    frames = torch.rand(2, 3, 256, 128) * 2 - 1
    whole(normalized(frames))
    maps, auxiliary = backbone(frames)
    torch.testing.assert_close(maps, seen[0])
    assert auxiliary is None and backbone.pretrained
    assert maps.shape[1:] == (backbone.channels, *backbone.spatial) == (512, 8, 4)


@torch.no_grad()
def test_a_network_of_timm_is_its_own_up_to_the_last_maps(tmp_path: Path) -> None:
    whole = timm.create_model("resnet18").eval()
    torch.save(whole.state_dict(), tmp_path / "resnet18.pth")
    config = ModelConfig("timm/resnet18", weights=str(tmp_path / "resnet18.pth"), frame_size=(96, 64))
    backbone = make_backbone(config, 3).eval()
    frames = torch.rand(2, 3, 96, 64) * 2 - 1
    maps, _ = backbone(frames)
    torch.testing.assert_close(maps, whole.forward_features(normalized(frames)))
    assert (backbone.size, maps.shape[1:]) == ((96, 64), (backbone.channels, *backbone.spatial))


def test_such_a_network_trains_and_its_run_is_read_again(split: Split, tmp_path: Path) -> None:
    small = {"people": 3, "clips": 2, "frames": 2, "batches": 1, "epochs": 1, "compare_ops": False}
    options = make_options(backbone="torchvision/shufflenet_v2_x0_5", frame_size=(64, 32), **small)
    results = train_run(tmp_path / "run", options.settings, split, None, options.machine)
    assert results[-1]["changed"][0] == "backbone torchvision/shufflenet_v2_x0_5 (tiny)"
    again = make_options(resume=tmp_path / "run")
    assert again.settings == options.settings
    assert again.settings.recipe.model.frame_size == (64, 32)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("torchvision/resnet19", r"backbone: got 'resnet19' of torchvision, wanted one of torchvision.models.list_mod"),
        ("timm/resnet19", r"backbone: got 'resnet19' of timm, wanted one of timm.list_models\(\)"),
        ("timm/vit_tiny_patch16_224", r"backbone: timm/vit_tiny_patch16_224 takes no frames of \(256, 128\) \(Input"),
        ("torchvision/googlenet", "backbone: got 'googlenet' of torchvision, wanted .* without auxiliary classifiers"),
        ("timm/mixer_s32_224", r"backbone: timm/mixer_s32_224 takes no frames of \(256, 128\)"),
    ],
)
def test_a_network_that_does_not_serve_is_refused(backbone: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        NamedBackbone(backbone, "random")


@torch.no_grad()
def test_maps_of_a_densenet_are_those_after_its_last_relu() -> None:
    whole = models.densenet121(weights=None).eval()
    backbone = NamedBackbone("torchvision/densenet121", "random", (64, 32)).eval()
    backbone.net.load_state_dict(whole.state_dict(), strict=False)
    frames = torch.rand(1, 3, 64, 32) * 2 - 1
    maps, _ = backbone(frames)
    torch.testing.assert_close(whole.classifier(maps.mean((2, 3))), whole(normalized(frames)))


def test_an_output_that_is_not_maps_is_refused() -> None:
    with pytest.raises(UserError, match=r"timm/mambaout_femto returns \(1, 2, 1, 1152\) for a frame, wanted maps"):
        NamedBackbone("timm/mambaout_femto", "random", (64, 32))
    with pytest.raises(UserError, match=r"timm/vit_tiny_patch16_224 returns \(1, 197, 192\) for a frame, wanted maps"):
        NamedBackbone("timm/vit_tiny_patch16_224", "random", (224, 224))


def test_a_batch_norm_that_does_more_is_not_replaced() -> None:
    backbone = NamedBackbone("timm/mobilenetv3_small_050", "random", (64, 32))
    with pytest.raises(UserError, match="bn_groups: got 2 with a BatchNormAct2d in the backbone, wanted plain batch"):
        use_ghost_norm(backbone, 2)
    with pytest.raises(UserError, match="sync_bn: got True with a BatchNormAct2d in the backbone, wanted plain batch"):
        use_sync_norm(backbone)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"backbone": "resnet50"},
            "backbone: got 'resnet50', wanted inception_v3, tiny, torchvision/NAME or timm/",
        ),
        ({"backbone": "timm/"}, "backbone: got 'timm/', wanted"),
        ({"frame_size": (256, 128)}, r"frame_size: got \(256, 128\) with tiny, which has a size of its own"),
        ({"backbone": "timm/resnet18", "frame_size": (0, 8)}, "frame_size: got 0, wanted at least 1"),
        (
            {"backbone": "timm/resnet18", "frame_size": 8},
            r"frame_size: got 8, wanted \(an integer, an integer\) or",
        ),
    ],
)
def test_impossible_options_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_options(**given)
