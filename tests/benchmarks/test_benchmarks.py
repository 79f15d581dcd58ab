"""Each benchmark at a toy shape: it checks parity first, measures every implementation, and writes what it printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import batch_hard, refine, strip_pool
from rru_fast.composite import batch_hard as batch_hard_kernel
from rru_fast.composite import refine as refine_kernel
from rru_fast.composite import strip_pool as strip_pool_kernel
from tests.parity import BACKENDS

SHAPE = (2, 3, 16, 4, 4)


def test_refine_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    rows = refine.main(refine.Options(shape=SHAPE, repeats=2, compile=True, device="cpu", json=path))
    assert [row["implementation"] for row in rows] == [
        "eager, authors",
        "eager, reference",
        *BACKENDS,
        "torch.compile, reference",
    ]
    assert all(row["fwd+bwd ms"] > row["forward ms"] > 0 for row in rows[:2])
    assert rows[2]["saved MiB"] < rows[1]["saved MiB"] < rows[0]["saved MiB"]
    written = json.loads(path.read_text())
    assert written["rows"] == rows
    assert written["environment"]["threads"] == torch.get_num_threads()
    assert "parity: composite is within" in capsys.readouterr().out


def test_batch_hard_rows_include_the_peer() -> None:
    rows = batch_hard.main(batch_hard.Options(n=64, d=8, repeats=1, device="cpu"))
    names = [row["implementation"] for row in rows]
    assert names == ["eager", *BACKENDS, "pytorch-metric-learning", "eager", *BACKENDS]


def test_strip_pool_rows() -> None:
    rows = strip_pool.main(strip_pool.Options(shape=SHAPE, repeats=1, device="cpu"))
    assert [row["implementation"] for row in rows] == ["eager", *BACKENDS]


def test_no_figure_leaves_a_benchmark_whose_kernel_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off_by_a_little(forward):  # type: ignore[no-untyped-def]
        return lambda *arguments: (lambda out: (out[0] * 1.001, *out[1:]))(forward(*arguments))

    monkeypatch.setattr(refine_kernel, "forward", off_by_a_little(refine_kernel.forward))
    monkeypatch.setattr(batch_hard_kernel, "forward", off_by_a_little(batch_hard_kernel.forward))
    exact = strip_pool_kernel.forward
    monkeypatch.setattr(strip_pool_kernel, "forward", lambda s: exact(s) * 1.001)
    for run in (
        lambda: refine.main(refine.Options(shape=SHAPE, repeats=1, device="cpu")),
        lambda: batch_hard.main(batch_hard.Options(n=64, d=8, repeats=1, device="cpu")),
        lambda: strip_pool.main(strip_pool.Options(shape=SHAPE, repeats=1, device="cpu")),
    ):
        with pytest.raises(SystemExit, match="parity: composite is off"):
            run()
    assert " ms" not in capsys.readouterr().out
