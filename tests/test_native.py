"""What becomes of a binary that does not fit: one warning with the remedy, and the composite backend serves."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import rru_fast
from build_tools import toolchain
from rru_fast import native

REMEDY = "run: pip install --no-deps -e ."


@pytest.fixture
def binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where rru_fast.native looks for the extension in this test; its record lies beside it."""
    monkeypatch.setattr(native, "_RECORD", tmp_path / "_build.json")
    monkeypatch.setattr(native, "_BINARY", tmp_path / "_C.so")
    return tmp_path / "_C.so"


def record(binary: Path, content: bytes = b"", **changed: Any) -> None:
    """Write the record of a good build of `content`, but for what is changed."""
    good = {
        "native": None,
        "python": sysconfig.get_config_var("SOABI"),
        "torch": torch.__version__,
        "sha256": hashlib.sha256(content).hexdigest(),
        "compiler": "c++ 12",
        "flags": "-O3",
        "capabilities": ["DEFAULT"],
        "cuda": "csrc/cuda holds no kernels yet",
        "nvcc": None,
        "cuda_architectures": [],
    }
    binary.with_name("_build.json").write_text(json.dumps(good | changed))


def unusable() -> str:
    """The reason `_load` warns of and returns."""
    with pytest.warns(native.NativeWarning) as caught:
        reason, _ = native._load()
    assert reason is not None
    assert [str(w.message) for w in caught] == [f"rru_fast runs without its native kernels: {reason}"]
    assert reason.endswith(REMEDY)
    return reason


def test_a_binary_for_another_torch_is_refused(binary: Path) -> None:
    binary.touch()
    record(binary, torch="2.0.1+cu118")
    assert f"were built for torch 2.0.1+cu118, this is torch {torch.__version__};" in unusable()


def test_a_binary_for_another_python_is_refused(binary: Path) -> None:
    binary.with_name("_C.cpython-39-x86_64-linux-gnu.so").touch()
    record(binary, python="cpython-39-x86_64-linux-gnu")
    assert "were built for Python cpython-39-x86_64-linux-gnu, this is Python cpython-3" in unusable()


def test_a_record_without_its_binary_is_named(binary: Path) -> None:
    record(binary)
    assert "were built, but _C.so is not there" in unusable()


def test_a_binary_without_its_record_is_refused(binary: Path) -> None:
    binary.touch()
    assert "_build.json, cannot be read" in unusable()


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_an_unreadable_record_is_no_crash(binary: Path, text: str) -> None:
    binary.with_name("_build.json").write_text(text)
    unusable()


def test_a_record_of_another_version_is_no_crash(binary: Path) -> None:
    binary.with_name("_build.json").write_text('{"native": null}')
    unusable()


@pytest.mark.parametrize(("name", "value"), [("flags", None), ("capabilities", "AVX2"), ("compiler", 12), ("nvcc", 13)])
def test_a_record_with_a_wrong_field_is_no_crash(name: str, value: Any, binary: Path) -> None:
    binary.touch()
    record(binary, **{name: value})
    assert f"_build.json: got {name} {value!r}, wanted " in unusable()


def test_a_binary_cut_short_is_refused_before_it_is_loaded(binary: Path) -> None:
    binary.write_bytes(b"whole"[:3])
    record(binary, b"whole")
    assert "_C.so is not the file that was built" in unusable()


def test_sanitized_kernels_are_refused_where_they_would_end_the_process(
    binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    binary.touch()
    record(binary, flags="-O1 -fsanitize=address,undefined")
    assert "the native kernels are sanitized, and LD_PRELOAD has no libasan" in unusable()


def test_what_was_left_out_on_purpose_is_a_reason_and_no_warning(binary: Path) -> None:
    record(binary, native="no C++ compiler: none runs here")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native._load()[0] == "native kernels were not built: no C++ compiler: none runs here"


def test_a_checkout_that_was_never_built_says_so(binary: Path) -> None:
    assert unusable() == f"native kernels have not been built; {native.REMEDY}"


def test_a_package_with_a_binary_that_does_not_load_warns_once_and_serves_by_composite(tmp_path: Path) -> None:
    here = Path(rru_fast.__file__).parent
    package = shutil.copytree(here, tmp_path / "rru_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    binary = package / native._BINARY.name
    binary.write_bytes(b"not a library")
    record(binary, b"not a library")
    code = (
        "import rru_fast, torch; rru_fast.show_config();"
        "print(rru_fast.strip_pool(torch.ones(1, 2, 3, 4, 5)).sum().item());"
        "rru_fast.strip_pool(torch.ones(1, 1, 1, 1, 1), backend='cpu')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "auto runs: composite on a CPU" in done.stdout
    assert "cpu        not available: the native kernels do not load: ImportError" in done.stdout
    assert done.stdout.endswith("12.0\n")
    assert done.stderr.count("NativeWarning: rru_fast runs without its native kernels") == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: backend: got 'cpu'")
    assert last.endswith("in rru_fast's source folder, run: pip install --no-deps --force-reinstall .")


def test_this_checkout_has_native_kernels_wherever_there_is_a_compiler() -> None:
    try:
        toolchain.find_compiler()
    except toolchain.MissingError as error:
        pytest.skip(str(error))
    assert native.missing() is None
    assert any(f"built for torch {torch.__version__}" in line for line in native.describe())
