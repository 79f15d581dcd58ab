from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from training.config.presets import Recipe
from training.model.backbone import Inception
from training.model.ghost_norm import GhostBatchNorm, groups_of_each, use_ghost_norm
from training.model.network import Network
from training.runtime.errors import UserError
from training.runtime.fields import update

GROUPS = 4
CLIPS = torch.rand(8, 2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def outputs_of(module: nn.Module, given: Tensor) -> list[Tensor]:
    """Return its training outputs, and the gradients of a weighted sum of all their numbers."""
    out = module.train()(given)
    outputs = [tensor for tensor in (out if isinstance(out, tuple) else (out,)) if tensor is not None]
    weights = [torch.linspace(-1, 1, tensor[0].numel(), dtype=tensor.dtype).view_as(tensor[0]) for tensor in outputs]
    sum((tensor.square() * weight).sum() for tensor, weight in zip(outputs, weights, strict=True)).backward()
    return [tensor.detach() for tensor in outputs]


def check_replicas(ghost: nn.Module, plain: nn.Module, given: Tensor, groups: int) -> None:
    """Hold a network with ghost batch norm to plain replicas of it, each with one group of the batch."""
    plain.load_state_dict(ghost.state_dict())
    replicas = [deepcopy(plain) for _ in range(groups)]
    apart = [outputs_of(replica, part) for replica, part in zip(replicas, given.chunk(groups), strict=True)]
    together = outputs_of(ghost, given)
    exact = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(together, [torch.cat(parts) for parts in zip(*apart, strict=True)], **exact)
    for name, weight in ghost.named_parameters():
        summed = torch.stack([replica.get_parameter(name).grad for replica in replicas]).sum(0)
        # Gradients differ by orders of magnitude from layer to layer: held to the largest of theirs.
        torch.testing.assert_close(weight.grad, summed, rtol=0, atol=1e-10 * max(1, summed.abs().max().item()))
    for name, buffer in ghost.named_buffers():
        torch.testing.assert_close(buffer, replicas[0].get_buffer(name), **exact)


@pytest.mark.parametrize("ops", ["fast", "reference"])
@pytest.mark.parametrize("head", ["stim", "lstm", "baseline"])
def test_a_network_is_four_replicas_of_itself_in_training(recipe: Recipe, head: str, ops: str) -> None:
    recipe = update(recipe, head=head, head_width=16, people=4, clips=2)
    ghost, plain = (Network(update(recipe, bn_groups=g).model, 3, ops).double() for g in (GROUPS, 1))
    for network in (ghost, plain):
        network.classifier[3].p = 0.0  # drawn once for the batch: no replica draws the same
    check_replicas(ghost, plain, CLIPS, GROUPS)


def test_inception_s_norms_are_all_replaced_and_its_blocks_are_two_replicas_in_training() -> None:
    plain = Inception(3, "random").double()
    ghost = deepcopy(plain)
    norms = [name for name, module in ghost.named_modules() if isinstance(module, nn.BatchNorm2d)]
    use_ghost_norm(ghost, 2)
    assert [name for name, module in ghost.named_modules() if isinstance(module, GhostBatchNorm)] == norms
    for block, shape in (("Mixed_7c", (2048, 3, 3)), ("AuxLogits", (768, 17, 17))):
        maps = torch.rand(4, *shape, dtype=torch.float64)
        check_replicas(getattr(ghost.net, block), getattr(plain.net, block), maps, 2)


@pytest.mark.exhaustive  # the test before takes the same of two of its blocks, in a tenth of the time
def test_inception_is_two_replicas_of_itself_in_training() -> None:
    ghost, plain = (Inception(3, "random").double() for _ in range(2))
    use_ghost_norm(ghost, 2)
    frames = torch.rand(4, 3, *Inception.size, dtype=torch.float64)
    check_replicas(ghost, plain, frames, 2)


def test_every_batch_norm_is_replaced_and_none_of_its_names(recipe: Recipe) -> None:
    recipe = update(recipe, people=4)
    ghost, plain = (Network(update(recipe, bn_groups=g).model, 3, "fast") for g in (GROUPS, 1))
    assert list(ghost.state_dict()) == list(plain.state_dict())
    plain_norms = [
        name for name, module in ghost.named_modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    ]
    assert plain_norms == ["rru.transition_norm"]
    assert ghost.rru.bn_groups == GROUPS
    assert sum(isinstance(module, GhostBatchNorm) for module in ghost.modules()) == 4 + 2 + 1


def test_in_eval_mode_it_is_plain_batch_norm(recipe: Recipe) -> None:
    recipe = update(recipe, people=4)
    ghost, plain = (Network(update(recipe, bn_groups=g).model, 3, "reference").double() for g in (GROUPS, 1))
    ghost.train()(CLIPS)  # so that the running statistics are not those of the beginning
    plain.load_state_dict(ghost.state_dict())
    with torch.no_grad():
        # 3 clips, which 4 does not divide
        assert torch.equal(ghost.eval()(CLIPS[:3]).logits, plain.eval()(CLIPS[:3]).logits)


def test_a_converted_layer_keeps_weights_settings_and_mode() -> None:
    norm = nn.BatchNorm2d(5, eps=1e-3, momentum=0.2)
    nn.init.normal_(norm.weight)
    ghost = GhostBatchNorm(norm.double().eval(), 2)
    assert not ghost.training
    assert (ghost.eps, ghost.momentum) == (1e-3, 0.2)
    assert all(torch.equal(tensor, norm.state_dict()[name]) for name, tensor in ghost.state_dict().items())


def test_a_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(UserError, match="batch: got 5 for batch norm, wanted a multiple of bn_groups=2"):
        GhostBatchNorm(nn.BatchNorm1d(3), 2)(torch.rand(5, 3))


def test_groups_are_dealt_out_to_processes_where_they_can_be() -> None:
    assert [groups_of_each(groups, 2) for groups in (1, 2, 4)] == [1, 1, 2]
    with pytest.raises(UserError, match="bn_groups: got 4 for 3 processes, wanted a multiple of 3, or 1"):
        groups_of_each(4, 3)
