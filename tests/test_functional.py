"""Bad arguments are caught before anything changes; tests/test_errors.py has every message."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rru_fast
from tests.helpers.valid_args import C, D, H, W, arguments


def test_a_bad_call_leaves_running_statistics_unchanged() -> None:
    call = arguments(training=True, w_c=torch.randn(D, C))
    with pytest.raises(ValueError, match="w_c"):
        rru_fast.refine(**call)
    assert torch.equal(call["running_mean"], torch.zeros(D))


def test_bad_arguments_of_the_losses_raise() -> None:
    for loss in (rru_fast.BatchHardTripletLoss, rru_fast.reference.BatchHardTripletLoss):
        with pytest.raises(ValueError, match="margin: got inf, wanted a finite number or 'soft'"):
            loss(margin=float("inf"))
        with pytest.raises(ValueError, match="metric: got 'l1', wanted one of"):
            loss(metric="l1")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"labels: got shape \(1,\), wanted \(6,\) = \(N,\), one per feature"):
            loss()(torch.randn(6, 4), torch.zeros(1, dtype=torch.int64))
        assert loss(margin=np.float32(0.5))(torch.zeros(2, 1), torch.arange(2)) == 0.5


@pytest.mark.parametrize("module", [rru_fast.RRU, rru_fast.reference.RRU], ids=["fast", "reference"])
def test_maps_of_the_wrong_shape_raise(module: type[rru_fast.RRU]) -> None:
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
    # x may have any number of clips and frames; w may not have another D, which gamma fixes.
    if wrong == shape or (name == "x" and len(wrong) == 5 and wrong[2:] == (C, H, W) and min(wrong) > 0):
        return
    with pytest.raises((ValueError, TypeError)) as caught:
        rru_fast.refine(**call)
    assert "got" in str(caught.value)
    assert "wanted" in str(caught.value) or "Expected more than 1 value" in str(caught.value)
