"""Compile report of the CUDA kernels: what it reads in machine code, and its budget."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.launches import nvcc

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MEMBAR.ALL.GPU ;
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
        /*00b0*/                   BRA `(.L_x_1) ;
"""
ROW: dict[str, Any] = {
    "kernel": "refine_eval",
    "op": "refine, cuda",
    "dtype": "bfloat16",
    "sm": 90,
    "H * W": 64,
    "registers": 255,
    "stack": 0,
    "shared": 232_448,
    "draining": 0,
    "matrix": 128,
    "in a row": 24,
    "spills in product": 0,
}


def test_the_loop_is_read_from_its_first_matrix_instruction_on() -> None:
    code = list(nvcc.opcodes(SASS))
    assert code == ["LDC", "MEMBAR", "STL", "LDSM", "HMMA", "HMMA", "LDS", "HMMA", "STAS", "SYNCS", "LDL", "BRA"]
    found = nvcc.of_loop(code)
    assert found == {"draining": 0, "pushes": 1, "matrix": 3, "in a row": 2, "spills in product": 0}
    assert nvcc.of_loop([*code[:5], "LDL", "ERRBAR", *code[5:]])["draining"] == 1
    assert nvcc.of_loop([*code[:5], "LDL", "ERRBAR", *code[5:]])["spills in product"] == 1
    without = ["FFMA" if name == "HMMA" else name for name in [*code[:5], "STL", *code[5:]]]
    assert nvcc.of_loop(without) == {**found, "matrix": 0, "in a row": 0, "spills in product": 1}


@pytest.mark.parametrize(
    ("changed", "messages"),
    [
        ({}, []),
        ({"stack": 4}, ["stack 4, at most 0"]),
        ({"stack": 8, "dtype": "float32 tf32x3"}, []),
        ({"stack": 9, "dtype": "float32 tf32x3"}, ["stack 9, at most 8"]),
        ({"stack": 16, "dtype": "float32 ieee", "matrix": 0}, []),
        ({"shared": 232_449}, ["shared 232449, at most 232448"]),
        ({"shared": None}, ["shared memory is not known, as this build cannot emulate the kernel"]),
        ({"registers": 256}, ["registers 256, at most 255"]),
        ({"in a row": 25}, ["in a row 25, at most 24"]),
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
def test_a_kernel_is_compiled_and_within_budget() -> None:
    rows = nvcc.compile_all(90, ["bfloat16"])
    assert {row["kernel"] for row in rows} == {"refine_eval", "refine_pack"}
    assert [sentence for row in rows for sentence in nvcc.over_budget(row)] == []
    full = next(row for row in rows if row["kernel"] == "refine_eval" and row["H * W"] == 64)
    assert full["matrix"] == 128  # 8 slices, 2 tiles of rows, 8 tiles of positions
