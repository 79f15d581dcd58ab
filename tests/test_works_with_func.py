"""Operators under torch.func: vmap works, grad raises."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

import rru_fast
from rru_fast.testing import EXACT, relative_error
from tests.helpers.modules import PLAIN, maps


def operators() -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]]:
    """Map each operator to a function of one tensor, the same by the reference, and three stacked inputs."""
    unit = PLAIN["reference"]().double().eval()
    fast, labels = rru_fast.accelerate(copy.deepcopy(unit)), torch.arange(6) // 2

    def triplet(v: Tensor, backend: str) -> Tensor:
        loss = rru_fast.batch_hard_triplet(v, labels, margin=3.0, backend=backend)
        assert isinstance(loss, Tensor)
        return loss

    three = maps(6, dtype=torch.float64).unflatten(0, (3, 2))
    return {
        "refine": (lambda v: fast(v).strips, lambda v: unit(v).strips, three),
        "strip_pool": (rru_fast.strip_pool, partial(rru_fast.strip_pool, backend="reference"), three),
        "batch_hard_triplet": (
            partial(triplet, backend="auto"),
            partial(triplet, backend="reference"),
            torch.randn(3, 6, 5, dtype=torch.float64),
        ),
    }


@pytest.mark.parametrize("name", ["refine", "strip_pool", "batch_hard_triplet"])
def test_vmap_equals_a_loop_in_values_and_gradients(name: str) -> None:
    fast_operator, plain, three = operators()[name]
    leaf, plain_leaf = three.clone().requires_grad_(), three.clone().requires_grad_()
    got, wanted = vmap(fast_operator)(leaf), torch.stack([plain(v) for v in plain_leaf])
    assert relative_error(got, wanted) <= EXACT
    got.square().sum().backward()
    wanted.square().sum().backward()
    assert relative_error(leaf.grad, plain_leaf.grad) <= EXACT


@pytest.mark.parametrize("name", ["refine", "strip_pool", "batch_hard_triplet"])
def test_torch_func_grad_is_refused_inside_and_outside_of_vmap(name: str) -> None:
    fast_operator, plain, three = operators()[name]
    for transform in (
        lambda f: grad(lambda v: f(v).sum())(three[0]),
        lambda f: grad(lambda v: vmap(f)(v).sum())(three),
        lambda f: vmap(grad(lambda v: f(v).sum()))(three),
    ):
        wanted = (
            rf"rru_fast\.{name}: got a backend whose forward-mode and torch\.func derivatives are not implemented, "
            "wanted backend='reference'"
        )
        with pytest.raises(RuntimeError, match=wanted):
            transform(fast_operator)
        if name != "refine":  # nn.BatchNorm has its own limits under these transforms
            assert transform(plain).abs().max() > 0


def test_an_ensemble_under_vmap_equals_its_members() -> None:
    members = [rru_fast.RRU(6, (4, 4), hidden=8).eval() for _ in range(3)]
    weights, buffers = stack_module_state(members)  # type: ignore[arg-type]
    skeleton, x = copy.deepcopy(members[0]).to("meta"), maps(2)
    strips = vmap(lambda w, b: functional_call(skeleton, (w, b), (x,)).strips)(weights, buffers)
    alone = torch.stack([member(x).strips for member in members])
    assert torch.equal(strips, alone)
    strips.square().sum().backward()
    alone.square().sum().backward()
    for n, member in enumerate(members):
        assert torch.allclose(weights["transition.weight"].grad[n], member.transition.weight.grad, atol=1e-7)


@pytest.mark.filterwarnings("ignore:There is a performance drop because")  # vmap falls back to a loop, as intended
def test_vmap_does_not_mix_the_running_statistics_of_its_calls() -> None:
    unit = rru_fast.RRU(6, (4, 4), hidden=8)
    x = torch.stack([maps(2), maps(2)])
    with pytest.raises(RuntimeError, match="running_mean, running_var: got the same for every call of vmap, wanted"):
        vmap(lambda v: unit(v).strips)(x)
    assert torch.equal(unit.transition_norm.running_mean, torch.zeros(8))
    assert unit.transition_norm.num_batches_tracked == 0

    means, variances = torch.zeros(2, 8), torch.ones(2, 8)

    def call(v: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        norm, w = unit.transition_norm, unit.transition.weight.flatten(1)
        settings: dict[str, Any] = {"running_mean": mean, "running_var": var, "training": True}
        w_c = unit.channel_attention.weight
        return rru_fast.refine(v, w, norm.weight, norm.bias, w_c=w_c, **settings).strips

    vmap(call)(x, means, variances)
    for v, mean, var in zip(x, means, variances, strict=True):
        alone = torch.zeros(8), torch.ones(8)
        call(v, *alone)
        assert torch.equal(mean, alone[0])
        assert torch.equal(var, alone[1])
