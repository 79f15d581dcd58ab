"""The C++ kernels under every cap on oneDNN's and ATen's instruction sets, and without oneDNN's micro-kernels."""

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
# Caps under which bf16 instructions are used if the processor has them; None is no cap.
BFLOAT16_ISA = ("AVX512_CORE_BF16", "AVX512_CORE_AMX", None)
MAX_CPU_ISA = ("SSE41", "AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", *BFLOAT16_ISA)
BUILT: list[str] = native._BUILD_RECORD.get("capabilities", [])
SIMD = native._supported_capabilities(BUILT)
# The cell of the grid that every run tests, the processor of most clouds; the whole grid takes minutes.
DEFAULT_CELL = ("AVX512_CORE", SIMD[-1] if SIMD else "")


def run_parity(**environment: str) -> list[str]:
    """Run tests/parity_here.py with these variables.

    Returns ATen's capability, and "True" if bf16 is multiplied in bf16, else "False".
    """
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
        pytest.param(isa, simd, marks=() if (isa, simd) == DEFAULT_CELL else pytest.mark.exhaustive)
        for isa in MAX_CPU_ISA
        for simd in SIMD
    ],
)
def test_every_dtype_matches_the_oracle_under_every_cap(
    isa: str | None, simd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    caps = {"ATEN_CPU_CAPABILITY": simd.lower()} | ({} if isa is None else {"ONEDNN_MAX_CPU_ISA": isa})
    has_bfloat16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    assert run_parity(**caps) == [simd, str(has_bfloat16 and isa in BFLOAT16_ISA)]


@pytest.mark.parametrize("refused", ["odd", pytest.param("all", marks=pytest.mark.exhaustive)])
def test_products_that_onednn_refuses_are_computed(refused: str, tmp_path: Path) -> None:
    try:
        compiler = toolchain.find_compiler().command
    except toolchain.BuildError as error:
        pytest.skip(str(error))
    library = tmp_path / "refusing_onednn.so"
    source = Path(__file__).with_name("refusing_onednn.cpp")
    command = [*compiler, "-std=c++20", "-O1", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    products = tmp_path / "refused"
    _, bfloat16 = run_parity(LD_PRELOAD=str(library), REFUSE=refused, REFUSED=str(products))
    assert len(products.read_text().splitlines()) > 100
    assert refused == "odd" or bfloat16 == "False"


def test_every_capability_is_built_if_requested() -> None:
    if os.environ.get("RRU_FAST_CAPABILITIES") != "all":
        pytest.skip("RRU_FAST_CAPABILITIES is not all: the kernels are built for this processor only")
    assert list(toolchain.CAPABILITIES) == BUILT
