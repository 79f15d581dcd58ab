"""Compile report of the CUDA kernels: what it reads in machine code, and its budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.launches import nvcc
from rru_fast import native

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MEMBAR.ALL.GPU ;
        /*0018*/                   UCGABAR_WAIT ;
        /*001c*/                   CCTL.IVALL ;
        /*0020*/              @!P0 STL [R1+0x4], R8 ;
.L_x_1:
        /*0030*/                   LDSM.16.MT88.4 R8, [R4] ;
        /*0040*/                   HMMA.16816.F32.BF16 R12, R20, R8, R12 ;
        /*0050*/                   HMMA.16816.F32.BF16 R12, R20, R8, R12 ;
        /*0060*/              @P1  LDS.128 R8, [R4] ;
        /*0070*/                   HMMA.16816.F32.BF16 R12, R20, R8, R12 ;
        /*0080*/              @!UP0 STAS.64 [R4], R8 ;
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*00a0*/                   LDL R8, [R1] ;
        /*00a8*/                   CCTL.E.PF2 [R8] ;
        /*00b0*/                   BRA `(.L_x_1) ;
"""
ROW: dict[str, Any] = {
    "kernel": "refine_eval",
    "op": "refine, cuda",
    "dtype": "bfloat16",
    "sm": 90,
    "H * W": 64,
    "channels": 128,
    "registers": 255,
    "stack": 0,
    "shared": 232_448,
    "draining": 0,
    "matrix": 128,
    "in a row": 26,
    "between loads of W": 128,
    "spills in product": 0,
}

TRAINING = {"kernel": "refine_forward", "dtype": "float32 tf32", "channels": 512, "between loads of W": 32}


def test_the_loop_is_read_from_the_barrier_of_the_cluster_on() -> None:
    code = list(nvcc.opcodes(SASS))
    before, product = ["LDC", "MEMBAR", "UCGABAR_WAIT", "CCTL", "STL", "LDSM"], ["HMMA", "HMMA", "LDS", "HMMA"]
    after = ["STAS", "SYNCS", "LDL", "PREFETCH", "BRA"]
    assert code == before + product + after
    right = {"draining": 0, "pushes": 1, "matrix": 3, "in a row": 2, "between loads of W": 3, "spills in product": 0}
    assert nvcc.of_loop(code, False) == right
    found = nvcc.of_loop([*before, "HMMA", "LDL", "ERRBAR", *product, *after], False)
    assert found == {
        **right,
        "matrix": 4,
        "draining": 1,
        "in a row": 3,
        "between loads of W": 4,
        "spills in product": 1,
    }
    assert nvcc.of_loop([*before, *product, "LDG", *product, *after], False)["between loads of W"] == 3
    flag = ["MEMBAR", "ERRBAR", "MEMBAR", "CCTL", "CCTL"]
    assert [nvcc.of_loop([*code, *flag], has_flag)["draining"] for has_flag in (False, True)] == [5, 0]
    assert nvcc.of_loop([*code, *flag[1:], "UCGABAR_ARV"], True)["draining"] == 1
    in_fp32 = ["FFMA" if name == "HMMA" else name for name in [*before, "FFMA", "STL", *product, *after]]
    none = {"matrix": 0, "in a row": 0, "between loads of W": 0}
    assert nvcc.of_loop(in_fp32, False) == {**right, **none, "spills in product": 1}


@pytest.mark.parametrize(
    ("changed", "messages"),
    [
        ({}, []),
        ({"stack": 4}, ["stack 4, at most 0"]),
        ({"stack": 8, "dtype": "float32 ieee", "matrix": 0}, []),
        ({"stack": 9, "dtype": "float32 ieee", "matrix": 0}, ["stack 9, at most 8"]),
        ({**TRAINING, "stack": 24}, []),
        ({**TRAINING, "stack": 25}, ["stack 25, at most 24"]),
        ({**TRAINING, "channels": 256, "stack": 4}, ["stack 4, at most 0"]),
        ({**TRAINING, "between loads of W": 33}, ["between loads of W 33, at most 32"]),
        ({"shared": 232_449}, ["shared 232449, at most 232448"]),
        ({"shared": None}, ["shared memory is not known, as this build cannot emulate the kernel"]),
        ({"registers": 256}, ["registers 256, at most 255"]),
        ({"in a row": 27}, ["in a row 27, at most 26"]),
        ({"draining": 1}, ["draining 1, at most 0"]),
        ({"spills in product": 1}, ["spills in product 1, at most 0"]),
        ({"matrix": 0}, ["no matrix instructions"]),
        ({"kernel": "refine_pack", "matrix": None, "in a row": None, "shared": None}, []),
    ],
    ids=str,
)
def test_every_excess_over_the_budget_is_reported(changed: dict[str, Any], messages: list[str]) -> None:
    assert [sentence.split("): ")[1] for sentence in nvcc.over_budget({**ROW, **changed})] == messages


def test_only_the_architecture_that_the_kernels_are_written_for_is_compiled_for() -> None:
    assert not nvcc.serves(80) and not nvcc.serves(100)
    assert nvcc.serves(90) is (nvcc.version() is not None)


@pytest.mark.skipif(not nvcc.serves(90), reason="needs nvcc")
def test_kernels_are_within_budget() -> None:
    rows = nvcc.compile_all(90, ["bfloat16"])
    assert {row["kernel"] for row in rows} == {*nvcc.MULTIPLYING, "refine_pack"}
    assert [sentence for row in rows for sentence in nvcc.over_budget(row)] == []

    def matrix(kernel: str, channels: int) -> int:
        (found,) = (r["matrix"] for r in rows if (r["kernel"], r["H * W"], r["channels"]) == (kernel, 64, channels))
        return int(found)

    assert matrix("refine_eval", 128) == 128  # 8 slices, 2 tiles of rows, 8 tiles of positions
    assert matrix("refine_forward", 512) == 64  # 4 slices at a time
    assert matrix("refine_backward", 512) == 64  # 2 slices at a time, 4 tiles of rows


@pytest.mark.skipif(not nvcc.serves(90), reason="needs nvcc")
def test_a_build_without_an_architecture_is_compiled_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "cuda_architectures", lambda: [])
    first = next(nvcc._binaries(90, tmp_path))
    assert first == tmp_path / "fragments.cubin" and first.stat().st_size > 0
