from __future__ import annotations

import torch
from torch import nn
from torchvision.models import inception_v3

from training.model.backbone import Inception, Tiny


def test_tiny_is_under_a_million_parameters_and_maps_64_to_8_by_8() -> None:
    tiny = Tiny("random")
    maps, auxiliary = tiny(torch.rand(2, 3, *tiny.size))
    assert maps.shape == (2, tiny.channels, *tiny.spatial)
    assert auxiliary is None
    assert sum(parameter.numel() for parameter in tiny.parameters()) < 1_000_000


def test_inception_computes_what_torchvisions_own_forward_does() -> None:
    inception = Inception(7, "random")
    whole = inception_v3(weights=None, transform_input=False, init_weights=False)
    whole.AuxLogits.fc = nn.Linear(768, 7)
    whole.load_state_dict(inception.net.state_dict(), strict=False)
    seen = []
    whole.Mixed_7c.register_forward_hook(lambda module, given, maps: seen.append(maps))
    frames = torch.rand(2, 3, *inception.size)
    with torch.no_grad():
        for training in (True, False):
            of_torchvision = whole.train(training)(frames)
            maps, auxiliary = inception.train(training)(frames)
            assert maps.shape == (2, 2048, 8, 8)
            assert torch.equal(maps, seen.pop())
            assert torch.equal(auxiliary, of_torchvision.aux_logits) if training else auxiliary is None
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in inception.net.state_dict().items())


def test_auxiliary_logits_of_clips_are_of_the_mean_of_their_frames_maps() -> None:
    inception = Inception(7, "random", auxiliary="clip")
    frames = torch.rand(6, 3, *inception.size)
    seen = []
    inception.net.Mixed_6e.register_forward_hook(lambda module, given, maps: seen.append(maps))
    with torch.no_grad():
        _, auxiliary = inception(frames, times=3)
        means = torch.stack([seen[0][:3].mean(0), seen[0][3:].mean(0)])
        torch.testing.assert_close(auxiliary, inception.net.AuxLogits(means))
    assert auxiliary.shape == (2, 7)
