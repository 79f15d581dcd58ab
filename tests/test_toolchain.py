"""Find the tools for a build, and this machine's SIMD capability."""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

from build_tools import toolchain
from tests.build_tree import ROOT, run

x86_64_only = pytest.mark.skipif("AVX2" not in toolchain.CAPABILITIES, reason="x86-64 only")


@x86_64_only
@pytest.mark.parametrize(
    ("flags", "capability"),
    [
        ("fpu sse4_2 avx fma", "DEFAULT"),
        ("avx avx2", "DEFAULT"),
        ("avx avx2 fma", "AVX2"),
        ("avx2 fma avx512f avx512dq avx512vl", "AVX2"),
        ("avx2 fma avx512f avx512bw avx512dq avx512vl", "AVX512"),
    ],
)
def test_the_capability_of_this_machine_follows_atens_rule(flags: str, capability: str, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: avx512bw\n\n" * 2)
    assert toolchain.native_capability(cpuinfo) == capability


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="ATen's choice is overridden")
@x86_64_only
def test_the_capability_of_this_machine_is_that_of_its_torch() -> None:
    assert torch.backends.cpu.get_cpu_capability() == toolchain.native_capability()


def test_missing_ninja_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(toolchain.BuildError, match=r"^no ninja: install ninja first$"):
        toolchain.find_ninja()


@pytest.mark.parametrize(
    ("version", "accepted"), [("2.10.1", False), ("2.9", False), ("2.11.0a0+git1", True), ("3.0", True)]
)
def test_a_torch_that_is_too_old_is_refused(
    version: str, accepted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch/include/ATen").mkdir(parents=True)
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/version.py").write_text(f"__version__ = {version!r}\ncuda = None\n")
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    if accepted:
        assert toolchain.find_torch().version == version
    else:
        with pytest.raises(
            toolchain.BuildError, match=rf"^torch: got {version}, wanted 2\.11 or newer: install it first$"
        ):
            toolchain.find_torch()


def test_the_installed_torch_is_found_without_importing_it() -> None:
    code = "import sys; from build_tools import toolchain as t; print(t.find_torch().version, 'torch' in sys.modules)"
    done = run([sys.executable, "-c", code], ROOT)
    assert done.stdout.split() == [torch.__version__, "False"]
