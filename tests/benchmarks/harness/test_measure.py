"""Timing, memory and parity checks of the benchmarks."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.harness import measure
from benchmarks.harness.parity import report_parity
from rru_fast.testing import Error, compare


def test_paired_rounds_find_the_slower_function(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]  # on a busy machine, sleep takes longer
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    times = measure.paired({"slow": lambda: sleep(0.5), "quick": lambda: sleep(0.125)}, repeats=5)
    assert times == {"slow": [0.5] * 5, "quick": [0.125] * 5}
    assert measure.ratio(times["slow"], times["quick"]) == 4


def test_every_round_begins_with_another_function() -> None:
    order: list[str] = []
    measure.paired({name: lambda name=name: order.append(name) for name in "abc"}, repeats=3, warmup=0)
    assert "".join(order) == "abcbcacab"


def test_saved_bytes_counts_each_storage_of_the_backward_once() -> None:
    x = torch.randn(1000, requires_grad=True)
    # exp keeps its output, sin its input: one storage of 4000 bytes between them
    assert measure.saved_bytes(lambda: [x.exp().sin()], [x]) == 4000
    assert measure.saved_bytes(lambda: [x.exp()], [x]) == 0


def test_peak_bytes_counts_what_is_allocated_at_once() -> None:
    def allocate() -> None:
        first = torch.empty(2**20, dtype=torch.uint8)
        second = torch.empty(2**21, dtype=torch.uint8)
        del first, second
        del_again = torch.empty(2**20, dtype=torch.uint8)
        del del_again

    assert measure.peak_bytes(allocate, torch.device("cpu")) == pytest.approx(3 * 2**20, rel=0.01)


def test_a_wrong_answer_ends_the_benchmark_and_names_the_tensor() -> None:
    wanted = {"d_x": torch.ones(3, dtype=torch.float64)}
    eager = {"d_x": torch.ones(3)}
    assert report_parity("fine", [compare({"d_x": torch.ones(3)}, eager, wanted)]) == 0
    with pytest.raises(SystemExit, match=r"parity: broken is off by .* in d_x, allowed .*; it is not measured"):
        report_parity("broken", [compare({"d_x": torch.ones(3) * 1.001}, eager, wanted)])
    with pytest.raises(SystemExit, match="off by inf in d_x"):
        report_parity("nan", [compare({"d_x": torch.full((3,), float("nan"))}, eager, wanted)])


def test_errors_of_small_tensors_are_medians_over_draws() -> None:
    fine, off = {"d_x": Error(1e-7, 0.0, 2e-7)}, {"d_x": Error(3e-7, 0.0, 2e-7)}
    assert report_parity("lucky", [fine, off, fine]) == 1e-7
    with pytest.raises(SystemExit, match=r"parity: wrong is off by 3\.0e-07 in d_x, allowed 2\.0e-07"):
        report_parity("wrong", [off, fine, off])


def test_in_float64_eager_is_the_oracle_and_the_bound_is_1e9() -> None:
    wanted = {"d_x": torch.ones(3, dtype=torch.float64)}
    assert report_parity("fine", [compare({"d_x": wanted["d_x"] + 1e-12}, wanted, wanted)]) < 2e-12
    with pytest.raises(SystemExit, match=r"allowed 1\.0e-09"):
        report_parity("broken", [compare({"d_x": wanted["d_x"] + 1e-8}, wanted, wanted)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_available_product_gets_a_rate(dtype: torch.dtype) -> None:
    rates = measure.gemm_rates(64, 32, 16, dtype, torch.device("cpu"))
    assert "torch.mm" in rates and ("torch.mm in float32" in rates) == (dtype.itemsize == 2)
    assert all(1e5 < rate < 1e14 for rate in rates.values())
