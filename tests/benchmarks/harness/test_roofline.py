"""Formulas of the roofline against counts by hand, at the paper's shape."""

from __future__ import annotations

import pytest

from benchmarks.harness.roofline import Rates, flops, size

PAPER = (20, 8, 2048, 8, 8)
ONE_PRODUCT = 2 * 256 * 2048 * 64 * 20  # 1.34 GFLOP: W_a A_t of all clips


def test_a_product_has_1_34_gflop() -> None:
    assert pytest.approx(1.34e9, rel=2e-3) == ONE_PRODUCT


def test_flops_are_those_of_all_steps_less_what_the_first_two_frames_share() -> None:
    """All steps have 20.1 and 60 GFLOP, with a product of M_1, which is 0, and two at t = 2, where A_2 is M_2."""
    assert flops(PAPER, 256, backward=False) == pytest.approx(20.1e9 - 2 * ONE_PRODUCT, rel=2e-3)
    assert flops(PAPER, 256, backward=True) == pytest.approx(60e9 - 6 * ONE_PRODUCT, rel=1e-2)


def test_one_frame_needs_no_product_and_two_need_one() -> None:
    assert flops((20, 1, 2048, 8, 8), 256, backward=True) == 0
    assert flops((20, 2, 2048, 8, 8), 256, backward=False) == ONE_PRODUCT


def test_bytes_are_those_of_x_s_and_their_gradients() -> None:
    assert size(PAPER, "float32", backward=False) == pytest.approx(168e6, rel=2e-3)
    assert size(PAPER, "float32", backward=True) == pytest.approx(504e6, rel=2e-3)
    assert size(PAPER, "bfloat16", backward=True) == size(PAPER, "float32", backward=True) // 2


def test_least_time_is_products_plus_bytes() -> None:
    rates = Rates(product=100e9, by="torch.mm", copy=24e9)
    assert rates.seconds(PAPER, 256, "float32", backward=True) == pytest.approx(52.3 / 100 + 0.503 / 24, rel=2e-3)
