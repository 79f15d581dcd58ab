"""Over several processes: tests/training/runtime/test_distributed.py."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from training.config.presets import Recipe
from training.model.network import Network
from training.model.sync_norm import SyncNorm, use_sync_norm
from training.runtime.fields import update


def test_every_batch_norm_is_replaced_and_no_name_nor_tensor_of_them(recipe: Recipe) -> None:
    network = Network(recipe.model, 3, "fast").eval()
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    before = network.state_dict(keep_vars=True)
    use_sync_norm(network)
    after = network.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is tensor for name, tensor in before.items())  # an optimizer holds the parameters already
    found = [module for module in network.modules() if isinstance(module, SyncNorm)]
    assert len(found) == norms == 4 + 1 + 2 + 1  # backbone, RRU, head, classifier
    assert not any(module.training for module in found)
    assert isinstance(network.rru.transition_norm, nn.SyncBatchNorm) and network.rru.transition_norm.eps == 1e-3


def test_in_one_process_it_is_plain_batch_norm(recipe: Recipe) -> None:
    plain = Network(update(recipe, rru="none", part_loss=False).model, 3, "reference").double()
    synchronized = deepcopy(plain)
    use_sync_norm(synchronized)
    clips = torch.rand(4, 2, 3, 64, 64, dtype=torch.float64)
    for train in (True, False):
        torch.manual_seed(1)
        one = plain.train(train)(clips).logits
        torch.manual_seed(1)
        assert torch.equal(synchronized.train(train)(clips).logits, one)
    assert all(map(torch.equal, synchronized.state_dict().values(), plain.state_dict().values()))
