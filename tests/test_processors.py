"""The C++ kernels on every kind of processor: oneDNN's and ATen's instruction sets capped, and products refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from build_tools import toolchain
from rru_fast import native

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="the C++ kernels are not built")

ROOT = Path(__file__).resolve().parents[1]
# Whose instructions for bfloat16 are used where the processor has them; None is no cap.
MULTIPLY_BFLOAT16 = ("AVX512_CORE_BF16", "AVX512_CORE_AMX", None)
MAX_CPU_ISA = ("SSE41", "AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", *MULTIPLY_BFLOAT16)
BUILT: list[str] = native._BUILT.get("capabilities", [])
SIMD = native._usable(BUILT)
# What every run has of the grid, which takes minutes as a whole: the kind of processor that most clouds have.
FIRST = ("AVX512_CORE", SIMD[-1] if SIMD else "")


def held_to_the_oracle(**environment: str) -> list[str]:
    """Run tests/parity_here.py with these variables; return ATen's capability and if bfloat16 is multiplied in it."""
    command = [sys.executable, "-m", "tests.parity_here"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *capability, bfloat16 = done.stdout.split()
    return [" ".join(capability), bfloat16]


@pytest.mark.parametrize(
    ("isa", "simd"),
    [
        pytest.param(isa, simd, marks=() if (isa, simd) == FIRST else pytest.mark.exhaustive)
        for isa in MAX_CPU_ISA
        for simd in SIMD
    ],
)
def test_every_dtype_keeps_to_the_oracle_under_every_cap(isa: str | None, simd: str) -> None:
    caps = {"ATEN_CPU_CAPABILITY": simd.lower()} | ({} if isa is None else {"ONEDNN_MAX_CPU_ISA": isa})
    has_bfloat16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    assert held_to_the_oracle(**caps) == [simd, str(has_bfloat16 and isa in MULTIPLY_BFLOAT16)]


@pytest.mark.parametrize("refused", ["odd", pytest.param("all", marks=pytest.mark.exhaustive)])
def test_what_onednn_refuses_is_served_all_the_same(refused: str, tmp_path: Path) -> None:
    try:
        compiler = toolchain.find_compiler().command
    except toolchain.MissingError as error:
        pytest.skip(str(error))
    library = tmp_path / "refusing_onednn.so"
    source = Path(__file__).with_name("refusing_onednn.cpp")
    command = [*compiler, "-std=c++20", "-O1", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    products = tmp_path / "refused"
    _, bfloat16 = held_to_the_oracle(LD_PRELOAD=str(library), REFUSE=refused, REFUSED=str(products))
    assert len(products.read_text().splitlines()) > 100
    assert refused == "odd" or bfloat16 == "False"


def test_every_capability_is_built_where_that_is_asked_for() -> None:
    if os.environ.get("RRU_FAST_CAPABILITIES") != "all":
        pytest.skip("RRU_FAST_CAPABILITIES is not all: the kernels are for this processor alone")
    assert list(toolchain.CAPABILITIES) == BUILT
