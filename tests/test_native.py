"""Unusable native binaries are refused with one warning and the reinstall command; the composite backend serves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rru_fast
from build_tools import toolchain
from rru_fast import native
from rru_fast.install_hint import reinstall_command

ROOT = Path(__file__).resolve().parents[1]
HINT = reinstall_command(Path(native.__file__).parent)

ELF = Path(torch.__file__).parent / "lib/libc10.so"


@pytest.fixture
def binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path from which rru_fast.native loads the extension in this test; its build record is in the same folder."""
    monkeypatch.setattr(native, "_RECORD_PATH", tmp_path / "_build.json")
    monkeypatch.setattr(native, "_BINARY_PATH", tmp_path / "_C.so")
    return tmp_path / "_C.so"


def write_record(binary: Path, **changes: Any) -> None:
    """Write the record of a usable build, with changes."""
    usable = {
        "native": None,
        "python": sysconfig.get_config_var("SOABI"),
        "torch": torch.__version__,
        "compiler": "c++ 12",
        "flags": "-O3",
        "capabilities": ["DEFAULT"],
        "cuda": "csrc/cuda holds no kernels",
        "nvcc": None,
        "cuda_architectures": [],
        "cuda_sources": "0123",
    }
    binary.with_name("_build.json").write_text(json.dumps(usable | changes))


def unusable_reason() -> str:
    """Return the reason that `_load` returns, after checking that it warns of it once, with the reinstall command."""
    with pytest.warns(native.NativeWarning) as caught:
        reason, _ = native._load()
    assert reason is not None
    assert [str(w.message) for w in caught] == [f"rru_fast runs without its native kernels: {reason}"]
    assert reason.endswith(HINT.partition("run: ")[2])
    return reason


@pytest.fixture
def fork_hooks(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """Hooks that this test registers to run before fork(), in place of registering them."""
    hooks: list[Callable[[], object]] = []
    monkeypatch.setattr(os, "register_at_fork", lambda before: hooks.append(before))
    return hooks


def test_kernels_that_do_not_load_leave_fork_alone(binary: Path, fork_hooks: list[Callable[[], object]]) -> None:
    unusable_reason()
    assert not fork_hooks


@pytest.mark.skipif(native.missing() is not None, reason="the C++ kernels are not built")
def test_loading_the_kernels_registers_one_hook_before_fork(fork_hooks: list[Callable[[], object]]) -> None:
    assert native._load()[0] is None
    assert len(fork_hooks) == 1


def test_a_binary_for_another_torch_is_refused(binary: Path) -> None:
    binary.touch()
    write_record(binary, torch="2.0.1+cu118")
    assert f"were built for torch 2.0.1+cu118, this is torch {torch.__version__};" in unusable_reason()


def test_a_binary_for_another_python_is_refused(binary: Path) -> None:
    binary.with_name("_C.cpython-39-x86_64-linux-gnu.so").touch()
    write_record(binary, python="cpython-39-x86_64-linux-gnu")
    assert "were built for Python cpython-39-x86_64-linux-gnu, this is Python cpython-3" in unusable_reason()


def test_a_record_without_its_binary_is_refused(binary: Path) -> None:
    write_record(binary)
    assert "were built, but _C.so does not exist" in unusable_reason()


def test_a_binary_without_its_record_is_refused(binary: Path) -> None:
    binary.touch()
    assert "_build.json, cannot be read" in unusable_reason()


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_an_unreadable_record_is_no_crash(binary: Path, text: str) -> None:
    binary.with_name("_build.json").write_text(text)
    unusable_reason()


def test_a_record_of_another_version_is_no_crash(binary: Path) -> None:
    binary.with_name("_build.json").write_text('{"native": null}')
    unusable_reason()


@pytest.mark.parametrize(("name", "value"), [("flags", None), ("capabilities", "AVX2"), ("compiler", 12), ("nvcc", 13)])
def test_a_record_with_a_wrong_field_is_no_crash(name: str, value: Any, binary: Path) -> None:
    binary.touch()
    write_record(binary, **{name: value})
    assert f"_build.json: got {name} {value!r}, wanted " in unusable_reason()


@pytest.mark.skipif(not ELF.exists(), reason="no shared library of 64 bits")
@pytest.mark.parametrize("end", [-5, 200_000, 100, 30])
def test_a_truncated_binary_is_refused_before_it_is_loaded(binary: Path, end: int) -> None:
    write_record(binary)
    whole = ELF.read_bytes()
    binary.write_bytes(whole)
    assert not native._is_truncated(binary)
    binary.write_bytes(whole[:end])
    assert "_C.so is damaged: it is shorter than its headers say" in unusable_reason()


@pytest.mark.parametrize(
    ("built", "current", "used"),
    [
        (["AVX2"], "DEFAULT", None),
        (["AVX512"], "AVX2", None),
        (["AVX2"], "NO AVX", None),
        (["AVX2"], "AVX2", "AVX2"),
        (["AVX2"], "AVX512", "AVX2"),
        (["DEFAULT"], "SVE256", "DEFAULT"),
        (["DEFAULT", "AVX2", "AVX512"], "AVX2", "AVX2"),
        (["DEFAULT", "AVX512"], "AVX2", "DEFAULT"),
    ],
)
def test_kernels_that_this_processor_does_not_support_are_refused(
    built: list[str], current: str, used: str | None, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: current)
    assert native._supported_capabilities(built)[-1:] == ([used] if used else [])
    if used is None:
        write_record(binary, capabilities=built)
        binary.touch()
        processor = f"this processor (or ATEN_CPU_CAPABILITY) runs {current}"
        hint = HINT.replace("run: ", "run: RRU_FAST_CAPABILITIES=all ")
        assert unusable_reason() == f"the native kernels were built for {built[0]}, {processor}; {hint}"


def test_sanitized_kernels_are_refused_without_their_runtime(binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    binary.touch()
    write_record(binary, flags="-O1 -fsanitize=address,undefined")
    assert "the native kernels are sanitized, and LD_PRELOAD has no libasan" in unusable_reason()


def test_kernels_disabled_on_purpose_are_a_reason_and_no_warning(binary: Path) -> None:
    write_record(binary, native="RRU_FAST_NATIVE=0 when it was installed", on_purpose=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native._load()[0] == "native kernels were not built: RRU_FAST_NATIVE=0 when it was installed"


def test_kernels_that_could_not_be_built_are_a_warning(binary: Path) -> None:
    write_record(binary, native="c++ failed on csrc/bindings.cpp: error: no", on_purpose=False)
    assert unusable_reason().startswith("native kernels were not built: c++ failed on csrc/bindings.cpp: error: no; ")


def test_a_checkout_that_was_never_built_says_so(binary: Path) -> None:
    assert unusable_reason() == f"native kernels have not been built; {HINT}"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | None], Path]:
    """Write the metadata of an installation of rru_fast, and return its package folder."""

    def write(installer: str, direct_url: str | None) -> Path:
        metadata = tmp_path / "site/rru_fast-0.1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Name: rru_fast\nVersion: 0.1.0\n")
        (metadata / "INSTALLER").write_text(f"{installer}\n")
        if direct_url:
            (metadata / "direct_url.json").write_text(direct_url)
        monkeypatch.syspath_prepend(tmp_path / "site")
        return tmp_path / "site/rru_fast"

    return write


PIP = "pip install --no-deps --force-reinstall --no-cache-dir"
UV = "uv pip install --no-build-isolation --no-deps --reinstall --no-cache"


@pytest.mark.parametrize(
    ("installer", "url", "wanted"),
    [
        ("pip", None, f"run: {PIP} --no-binary rru_fast rru_fast"),
        ("pip", '{"url": "file:///a%20b", "dir_info": {}}', f"run: {PIP} '/a b'"),
        (
            "pip",
            '{"url": "file:///a/rru_fast-0.1.0.tar.gz", "archive_info": {}}',
            f"run: {PIP} /a/rru_fast-0.1.0.tar.gz",
        ),
        ("pip", '{"url": "file:///a/b.whl", "archive_info": {}}', f"in rru_fast's source folder, run: {PIP} ."),
        (
            "pip",
            '{"url": "https://a/b", "vcs_info": {"vcs": "git", "commit_id": "c"}}',
            f"run: {PIP} git+https://a/b@c",
        ),
        ("uv", None, f"run: {UV} --no-binary rru_fast rru_fast"),
        ("uv", '{"url": "file:///a", "dir_info": {}}', f"run: {UV} /a"),
    ],
)
def test_the_reinstall_command_is_the_installers(
    installer: str, url: str | None, wanted: str, install: Callable[[str, str | None], Path]
) -> None:
    assert reinstall_command(install(installer, url)) == wanted


@pytest.mark.parametrize(("installer", "wanted"), [("pip", "pip install --no-deps -e"), ("uv", f"{UV} -e")])
def test_the_reinstall_command_of_an_editable_installation_is_editable(
    installer: str, wanted: str, install: Callable[[str, str | None], Path], tmp_path: Path
) -> None:
    install(installer, json.dumps({"url": tmp_path.as_uri(), "dir_info": {"editable": True}}))
    assert reinstall_command(tmp_path / "rru_fast") == f"run: {wanted} {tmp_path}"


def test_a_package_with_a_binary_that_does_not_load_warns_once_and_serves_by_composite(tmp_path: Path) -> None:
    source = Path(rru_fast.__file__).parent
    package = shutil.copytree(source, tmp_path / "rru_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    binary = package / native._BINARY_PATH.name
    binary.write_bytes(b"not a library")
    write_record(binary)
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
    assert last.endswith("in rru_fast's source folder, run: pip install --no-deps --force-reinstall --no-cache-dir .")


def test_this_checkout_has_native_kernels_wherever_there_is_a_compiler() -> None:
    try:
        toolchain.find_compiler()
    except toolchain.BuildError as error:
        pytest.skip(str(error))
    assert native.missing() is None
    assert any(f"built for torch {torch.__version__}" in line for line in native.describe())
    assert any("in use: " in line for line in native.describe())


def test_the_library_imports_silently_without_numpy() -> None:
    code = "import sys, warnings; sys.modules['numpy'] = None; import torch; "
    code += "warnings.simplefilter('error'); warnings.filterwarnings('ignore', '.*native kernels'); import rru_fast"
    command = [sys.executable, "-W", "ignore", "-c", code]  # torch itself warns without numpy
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_the_same_everywhere() -> None:
    stated = f'version = "{rru_fast.__version__}"'
    assert stated in (ROOT / "pyproject.toml").read_text().splitlines()
    assert f"version: {rru_fast.__version__}" in (ROOT / "CITATION.cff").read_text().splitlines()
