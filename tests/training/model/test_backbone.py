from __future__ import annotations

import torch
from torchvision.models import inception_v3

from training.model.backbone import Inception, Tiny


def test_tiny_is_under_a_million_parameters_and_maps_64_to_8_by_8() -> None:
    tiny = Tiny("random")
    maps, auxiliary = tiny(torch.rand(2, 3, *tiny.size))
    assert maps.shape == (2, tiny.channels, *tiny.spatial)
    assert auxiliary is None
    assert sum(parameter.numel() for parameter in tiny.parameters()) < 1_000_000


def test_inception_maps_are_torchvisions_own_last_block() -> None:
    inception = Inception(7, "random").eval()
    whole = inception_v3(weights=None, transform_input=False, init_weights=False).eval()
    own = {name: tensor for name, tensor in inception.net.state_dict().items() if "AuxLogits.fc" not in name}
    whole.load_state_dict(own, strict=False)
    seen = []
    whole.Mixed_7c.register_forward_hook(lambda module, given, maps: seen.append(maps))
    frames = torch.rand(1, 3, *inception.size)
    with torch.no_grad():
        whole(frames)
        maps, auxiliary = inception(frames)
    assert maps.shape == (1, 2048, 8, 8)
    assert torch.equal(maps, seen[0])
    assert auxiliary is None


def test_inception_in_training_has_auxiliary_logits_of_every_frame() -> None:
    inception = Inception(7, "random")
    _, auxiliary = inception(torch.rand(2, 3, *inception.size))
    assert auxiliary is not None
    assert auxiliary.shape == (2, 7)
