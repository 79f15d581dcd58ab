"""Compile report of the Triton kernels, which needs no GPU."""

from __future__ import annotations

import pytest
import torch

from rru_fast import triton

if triton.interpreted():
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from benchmarks import compile_report
from benchmarks.compile_report import Options, main, over_budget

ROW = {
    "kernel": "maps",
    "op": "refine",
    "dtype": "bfloat16",
    "sm": 80,
    "registers": 255,
    "stack": 0,
    "shared": 166_912,
    "multiplies": True,
    "matrix instructions": "mma.m16n8k16.bf16",
    "rounds": False,
}


@pytest.mark.parametrize(
    ("changed", "messages"),
    [
        ({}, []),
        ({"stack": 8}, ["stack 8, at most 0"]),
        ({"stack": 8, "dtype": "float64"}, []),
        ({"dtype": "float32 tf32"}, ["factors cut off to TF32, wanted rounded"]),
        ({"dtype": "float32 tf32", "rounds": True}, []),
        ({"shared": 166_913}, ["shared 166913, at most 166912"]),
        ({"shared": 166_913, "sm": 90}, []),
        ({"matrix instructions": None}, ["no matrix instructions"]),
        ({"matrix instructions": None, "dtype": "float32 ieee"}, []),
        ({"matrix instructions": None, "multiplies": False}, []),
    ],
)
def test_every_excess_over_the_budget_is_reported(changed: dict[str, object], messages: list[str]) -> None:
    found = over_budget({**ROW, **changed})
    assert [sentence.split(": ")[1] for sentence in found] == messages


@pytest.mark.exhaustive  # make compile-report includes it
def test_every_kernel_is_compiled_and_within_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_report, "VARIANTS", (compile_report.Variant(groups=compile_report.CLIPS),))
    rows = compile_report.compile_all(90, "bfloat16")
    kernels = {row["kernel"] for row in rows}
    assert {"refine_fwd_transition", "refine_fwd_gate", "refine_bwd_recurrence", "refine_bwd_gate"} < kernels
    assert {"refine_bwd_pooled", "refine_bwd_norm", "refine_bwd_dw", "atb"} < kernels
    assert {"strip_pool_fwd", "strip_pool_bwd"} < kernels
    assert {"subtract_common", "inverse_norms", "batch_hard_fwd", "batch_hard_bwd"} < kernels
    assert [sentence for row in rows for sentence in over_budget(row)] == []
    assert any("wgmma" in (row["matrix instructions"] or "") for row in rows)


def test_by_default_every_kernel_is_launched_by_the_papers_unit_and_untuned() -> None:
    found = compile_report.launches(torch.bfloat16, "default")
    ops = {"refine, the paper's", "refine, eval", "strip_pool", *compile_report.LOSSES}
    assert {launch.op for launch in found} == ops
    assert not any(launch.tuning for launch in found)
    assert {launch.kernel for launch in found} == {launch.kernel for launch in compile_report.launches(torch.bfloat16)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(arch=(75,)), r"--arch: got 75, wanted one of 80, 90, 100"),
        (Options(dtype=("int8",)), r"--dtype: got 'int8', wanted one of 'float32 ieee'"),
    ],
)
def test_an_architecture_or_dtype_that_it_cannot_compile_for_is_refused(options: Options, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(options)
