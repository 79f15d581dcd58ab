"""`rru_fast::refine` as PyTorch's dispatcher, autograd and compiler see it, on every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import rru_fast
from rru_fast import ops
from rru_fast.arguments import RefineArguments, RefineOutputs, flatten
from rru_fast.testing import relative_error
from tests import parity
from tests.parity import BACKENDS, Case

every_backend = pytest.mark.parametrize("backend", BACKENDS)
default_backend_first = pytest.mark.parametrize("backend", parity.DEFAULT_FIRST)


OPCHECK = [
    Case(),
    Case(attention="spatial", inputs="raw"),
    Case(mode="ragged", attention="channel"),
    Case(mode="continued"),
    Case((6, 3, 5, 2, 2), bn_groups=2, inputs="appearance"),
]


def operator_arguments(case: Case, requires_grad: bool) -> RefineArguments:
    call = parity.make_call(case).map(lambda v: v.float().requires_grad_(requires_grad))
    return parity.operator_arguments(case, call)


@default_backend_first
@pytest.mark.parametrize("case", OPCHECK, ids=str)
def test_opcheck(case: Case, backend: str) -> None:
    args = operator_arguments(case, requires_grad=True)
    torch.library.opcheck(ops.refine.refine, (*flatten(args), True, backend))


@default_backend_first
@pytest.mark.parametrize("case", OPCHECK, ids=str)
def test_opcheck_of_the_backward(case: Case, backend: str) -> None:
    args = operator_arguments(case, requires_grad=False)
    outputs = RefineOutputs(*ops.refine.refine(*flatten(args), True, backend))
    upstream = (torch.rand_like(outputs.features), torch.rand_like(outputs.strips))
    inputs = (*upstream, *flatten(outputs.saved), *flatten(args), [True] * 9, backend)
    torch.library.opcheck(ops.refine.refine_backward, inputs)


@default_backend_first
@pytest.mark.parametrize("mode", ["train", pytest.param("eval", marks=pytest.mark.exhaustive)])
def test_compiled_without_a_graph_break_equals_eager(mode: str, backend: str) -> None:
    modules = [rru_fast.RRU(6, (3, 2), hidden=5, backend=backend).train(mode == "train") for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    compiled = torch.compile(modules[1], fullgraph=True)
    results = []
    for f in (modules[0], compiled):
        x = torch.rand(3, 4, 6, 3, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = f(x)
        (out.features.square().sum() + out.strips.sum()).backward()
        results.append((out.features, out.strips, x.grad))
    for eager, graph in zip(*results, strict=True):
        assert relative_error(graph, eager) <= 1e-6
    for name, value in modules[0].state_dict().items():
        assert torch.allclose(value, modules[1].state_dict()[name], rtol=1e-6), name


@every_backend
def test_the_operator_has_no_groups_in_eval_mode(backend: str) -> None:
    case = Case((6, 3, 5, 2, 2), mode="eval")
    args = operator_arguments(case, requires_grad=False)
    one, three = (
        RefineOutputs(*ops.refine.refine(*flatten(replace(args, bn_groups=groups)), False, backend))
        for groups in (1, 3)
    )
    assert torch.equal(one.features, three.features) and torch.equal(one.strips, three.strips)


@every_backend
def test_forward_mode_and_functional_transforms_are_refused(backend: str) -> None:
    call = parity.make_call(Case())

    def strips(x: Tensor, backend: str = backend) -> Tensor:
        return rru_fast.refine(x, **call.weights, training=True, backend=backend).strips

    for transform in (
        lambda: torch.func.jvp(strips, (call.x,), (call.x,)),
        lambda: torch.func.grad(lambda x: strips(x).sum())(call.x),
    ):
        with pytest.raises(RuntimeError, match=r"forward-mode and torch\.func derivatives"):
            transform()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        strips(torch.autograd.forward_ad.make_dual(call.x, call.x))
    _, tangent = torch.func.jvp(lambda x: strips(x, "reference"), (call.x,), (call.x,))
    assert tangent.abs().max() > 0


@every_backend
def test_second_order_gradients_raise(backend: str) -> None:
    call = parity.make_call(Case())
    x = call.x.requires_grad_()
    out = rru_fast.refine(x, **call.weights, training=True, backend=backend)
    (gradient,) = torch.autograd.grad(out.strips.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order gradients are not implemented"):
        gradient.sum().backward()


def test_the_reference_backend_has_second_order_gradients() -> None:
    call = parity.make_call(Case())
    x = call.x.requires_grad_()
    out = rru_fast.refine(x, **call.weights, training=True, backend="reference")
    (gradient,) = torch.autograd.grad(out.strips.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert second.abs().max() > 0
