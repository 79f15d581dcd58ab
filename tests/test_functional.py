"""Bad arguments: every one ends in an error that names it, what it got and what it wanted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rru_fast
from rru_fast.reference import State
from tests.good_call import A, B, C, D, H, T, W, arguments

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.randn(B, T, C, H)}, ValueError, r"x: got shape \(2, 3, 4, 3\), wanted \(B, T, C, H, W\)"),
    ({"x": torch.randn(B, 0, C, H, W)}, ValueError, r"x: got shape \(2, 0, 4, 3, 2\), wanted .* every size at least 1"),
    ({"x": torch.ones(B, T, C, H, W, dtype=torch.int64)}, TypeError, r"x: got dtype torch\.int64, wanted float64"),
    ({"x": [[1.0]]}, TypeError, r"x: got list, wanted a tensor \(B, T, C, H, W\)"),
    ({"x": torch.randn(B, T, C + 1, H, W)}, ValueError, r"w: got shape \(5, 8\), wanted \(5, 10\) = \(D, 2C\)"),
    ({"w": torch.randn(D, C)}, ValueError, r"w: got shape \(5, 4\), wanted \(5, 8\) = \(D, 2C\) for inputs="),
    ({"w": torch.randn(D, 2 * C, 1, 1)}, ValueError, r"w: got \(5, 8, 1, 1\), wanted a tensor \(D, 2C\)"),
    ({"w": torch.randn(D, 2 * C).double()}, TypeError, r"w: got dtype torch\.float64, wanted torch\.float32 beside x"),
    ({"gamma": torch.ones(D + 1)}, ValueError, r"gamma: got shape \(6,\), wanted \(5,\)"),
    ({"beta": None}, TypeError, r"beta: got NoneType, wanted a tensor \(D,\)"),
    ({"w_s1": torch.randn(A, 5)}, ValueError, r"w_s1: got shape \(3, 5\), wanted \(3, 6\) = \(A, P\)"),
    ({"w_s2": None}, ValueError, "w_s1, w_s2: got one of them, wanted both"),
    ({"w_s1": None, "w_s2": None, "w_c": None}, ValueError, "w_s1, w_s2, w_c: got none, wanted"),
    ({"w_c": torch.randn(D, C)}, ValueError, r"w_c: got shape \(5, 4\), wanted \(4, 5\) = \(C, D\)"),
    ({"w_c": torch.randn(C, D, device="meta")}, ValueError, "w_c: got device meta, wanted cpu as x"),
    ({"inputs": "motion"}, ValueError, "inputs: got 'motion', wanted one of 'appearance.motion', 'appearance', 'raw'"),
    ({"running_var": None}, ValueError, "running_mean, running_var: got one of them, wanted both or neither"),
    ({"running_mean": None, "running_var": None}, ValueError, "running_mean, running_var: got None in eval mode"),
    ({"momentum": None}, ValueError, "momentum: got None, wanted a number from 0 to 1"),
    ({"eps": 0.0}, ValueError, r"eps: got 0\.0, wanted a number above 0"),
    ({"eps": float("nan")}, ValueError, "eps: got nan, wanted a number above 0"),
    ({"bn_groups": 0}, ValueError, "bn_groups: got 0, wanted an integer of at least 1"),
    ({"training": True, "bn_groups": 3}, ValueError, "x: got 2 clips, wanted a multiple of bn_groups=3"),
    ({"training": True, "lengths": torch.tensor([1, 2])}, ValueError, "lengths: got it with batch statistics"),
    ({"lengths": torch.tensor([1])}, ValueError, r"lengths: got shape \(1,\), wanted \(2,\) = \(B,\)"),
    ({"lengths": torch.tensor([1.0, 2.0])}, TypeError, r"lengths: got dtype torch\.float32, wanted an integer dtype"),
    ({"lengths": torch.tensor([0, 4])}, ValueError, "lengths: got values from 0 to 4, wanted 1 to T=3"),
    ({"state": torch.zeros(2)}, TypeError, "state: got Tensor, wanted the"),
    (
        {"state": State(torch.randn(B, C, H, W), torch.randn(B, C, W, H))},
        ValueError,
        r"state\.s: got shape \(2, 4, 2, 3\), wanted \(2, 4, 3, 2\)",
    ),
    (
        {"state": State(torch.randn(B, C, H, W), torch.randn(B, C, H, W).double())},
        TypeError,
        r"state\.s: got dtype torch\.float64, wanted torch\.float32 as x",
    ),
    ({"lengths": torch.tensor([1, 2], device="meta")}, ValueError, "lengths: got device meta, wanted cpu as x"),
    (
        {"x": torch.randn(B, T, C, H, W).to_sparse()},
        TypeError,
        r"x: got layout torch\.sparse_coo, wanted a dense tensor",
    ),
    ({"w": torch.randn(0, 2 * C)}, ValueError, r"w: got shape \(0, 8\), wanted D of at least 1"),
    ({"process_group": "world"}, TypeError, r"process_group: got 'world', wanted a torch\.distributed\.ProcessGroup"),
    ({"process_group": -100}, TypeError, "process_group: got one that this rank is not in, wanted"),
    ({"training": "no"}, TypeError, "training: got 'no', wanted True or False"),
    (
        {"running_mean": torch.zeros(D, requires_grad=True)},
        ValueError,
        "running_mean: got a tensor that requires gradients, wanted a buffer",
    ),
    ({"backend": ["auto"]}, ValueError, r"backend: got \['auto'\], wanted 'auto' or one of"),
    ({"backend": "fast"}, ValueError, "backend: got 'fast', wanted 'auto' or one of 'reference', 'composite'"),
    ({"backend": "cuda"}, ValueError, "backend: got 'cuda', wanted .*: CUDA kernels are not part of version"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_refine_names_what_is_wrong(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    rru_fast.refine(**arguments())
    with pytest.raises(kind, match=message):
        rru_fast.refine(**arguments(**changes))


def test_a_bad_call_loses_nothing() -> None:
    call = arguments(training=True, w_c=torch.randn(D, C))
    with pytest.raises(ValueError, match="w_c"):
        rru_fast.refine(**call)
    assert torch.equal(call["running_mean"], torch.zeros(D))


BAD_LOSSES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"features": torch.randn(4)}, ValueError, r"features: got shape \(4,\), wanted \(N, D\) or \(G, N, D\)"),
    ({"features": torch.randn(0, 3), "labels": torch.zeros(0, dtype=torch.int64)}, ValueError, "every size at least 1"),
    ({"features": torch.ones(4, 3, dtype=torch.int32)}, TypeError, r"features: got dtype torch\.int32"),
    ({"labels": torch.arange(5)}, ValueError, r"labels: got shape \(5,\), wanted \(4,\) = \(N,\), one a feature"),
    ({"labels": torch.arange(4.0)}, TypeError, r"labels: got dtype torch\.float32, wanted an integer dtype"),
    ({"labels": [0, 0, 1, 1]}, TypeError, "labels: got list, wanted a tensor"),
    ({"labels": torch.arange(4, device="meta")}, ValueError, "labels: got device meta, wanted cpu as features"),
    ({"margin": float("nan")}, ValueError, "margin: got nan, wanted a finite number or 'soft'"),
    ({"margin": "hard"}, ValueError, "margin: got 'hard', wanted a finite number or 'soft'"),
    ({"margin": 10**400}, ValueError, "margin: got 1000.*, wanted a finite number or 'soft'"),
    ({"margin": True}, ValueError, "margin: got True, wanted a finite number or 'soft'"),
    ({"margin": np.ones(2)}, ValueError, "margin: got array.*, wanted a finite number or 'soft'"),
    ({"metric": "manhattan"}, ValueError, "metric: got 'manhattan', wanted one of 'euclidean', 'cosine'"),
    ({"reduction": "sum"}, ValueError, "reduction: got 'sum', wanted one of 'mean', 'none'"),
    ({"backend": "cuda"}, ValueError, "backend: got 'cuda', wanted .*: CUDA kernels are not part of version"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), BAD_LOSSES, ids=[message[:40] for _, _, message in BAD_LOSSES])
def test_batch_hard_triplet_names_what_is_wrong(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    good = {"features": torch.randn(4, 3), "labels": torch.tensor([0, 0, 1, 1])}
    rru_fast.batch_hard_triplet(**good)
    with pytest.raises(kind, match=message):
        rru_fast.batch_hard_triplet(**{**good, **changes})


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"channels": 0}, "channels: got 0, wanted an integer of at least 1"),
        ({"spatial": (8, 0)}, r"spatial\[1\]: got 0, wanted an integer of at least 1"),
        ({"spatial": 8}, r"spatial: got 8, wanted \(H, W\)"),
        ({"spatial": (8, 8, 8)}, r"spatial: got \(8, 8, 8\), wanted \(H, W\)"),
        ({"hidden": True}, "hidden: got True, wanted an integer of at least 1"),
        ({"bn_eps": -1.0}, r"bn_eps: got -1\.0, wanted a number above 0"),
        ({"bn_momentum": None}, "bn_momentum: got None, wanted a number from 0 to 1"),
        ({"hidden": 2.5}, r"hidden: got 2\.5, wanted an integer of at least 1"),
        ({"attention": "none"}, "attention: got 'none', wanted 'both', 'spatial' or 'channel'"),
        ({"inputs": "both"}, "inputs: got 'both', wanted 'appearance.motion', 'appearance' or 'raw'"),
        ({"bn_groups": -1}, "bn_groups: got -1, wanted an integer of at least 1"),
        ({"backend": "gpu"}, "backend: got 'gpu', wanted"),
    ],
)
def test_a_unit_that_cannot_work_is_not_built(settings_: dict[str, Any], message: str) -> None:
    for module in (rru_fast.RRU, rru_fast.reference.RRU):
        with pytest.raises(ValueError, match=message):
            module(**{"channels": 4, **settings_})


def test_a_loss_that_cannot_work_is_not_built() -> None:
    for loss in (rru_fast.BatchHardTripletLoss, rru_fast.reference.BatchHardTripletLoss):
        with pytest.raises(ValueError, match="margin: got inf, wanted a finite number or 'soft'"):
            loss(margin=float("inf"))
        with pytest.raises(ValueError, match="metric: got 'l1', wanted one of"):
            loss(metric="l1")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"labels: got shape \(1,\), wanted \(6,\) = \(N,\), one a feature"):
            loss()(torch.randn(6, 4), torch.zeros(1, dtype=torch.int64))
        assert loss(margin=np.float32(0.5))(torch.zeros(2, 1), torch.arange(2)) == 0.5


@pytest.mark.parametrize("module", [rru_fast.RRU, rru_fast.reference.RRU], ids=["fast", "reference"])
def test_maps_that_do_not_fit_the_unit_are_named(module: type[rru_fast.RRU]) -> None:
    unit = module(4, (3, 2), bn_groups=2)
    with pytest.raises(TypeError, match=r"x: got list, wanted a tensor \(B, T, C, H, W\)"):
        unit([1.0])
    with pytest.raises(ValueError, match=r"x: got shape \(2, 3, 5, 3, 2\), wanted \(B, T, C=4, H, W\)"):
        unit(torch.randn(2, 3, 5, 3, 2))
    with pytest.raises(ValueError, match=r"x: got maps of \(2, 3\), wanted spatial=\(3, 2\)"):
        unit(torch.randn(2, 3, 4, 2, 3))
    with pytest.raises(ValueError, match="x: got 3 clips, wanted a multiple of bn_groups=2"):
        unit(torch.randn(3, 3, 4, 3, 2))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_wrong_shapes_never_get_past_the_checks(data: st.DataObject) -> None:
    call = arguments(training=data.draw(st.booleans()))
    name = data.draw(st.sampled_from(["x", "w", "gamma", "beta", "w_s1", "w_s2", "w_c", "running_mean", "running_var"]))
    shape = tuple(call[name].shape)
    wrong = data.draw(st.lists(st.integers(0, 7), min_size=0, max_size=6).map(tuple))
    call[name] = torch.zeros(wrong)
    # A transition of another width is another unit only where nothing else fixes it; here gamma does.
    if wrong == shape or (name == "x" and len(wrong) == 5 and wrong[2:] == (C, H, W) and min(wrong) > 0):
        return
    with pytest.raises((ValueError, TypeError)) as caught:
        rru_fast.refine(**call)
    assert "got" in str(caught.value)
    assert "wanted" in str(caught.value) or "Expected more than 1 value" in str(caught.value)
