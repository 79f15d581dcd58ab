"""Backends and show_config, the public names, docstring examples, and imports between layers."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch

import rru_fast
from rru_fast import backends, report

# Without the extension: only rru_fast.native loads it, after its checks.
MODULES = ["rru_fast", *(m.name for m in pkgutil.walk_packages(rru_fast.__path__, "rru_fast.") if m.name[-3:] != "._C")]


def test_show_config_names_versions_and_every_backend_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    rru_fast.show_config()
    shown = capsys.readouterr().out
    assert f"rru_fast {rru_fast.__version__}, torch {torch.__version__}" in shown
    for name, reason in backends.BACKENDS.items():
        (line,) = (line for line in shown.splitlines() if line.strip().startswith(f"{name} "))
        assert ": " + reason in line if reason else line.partition(name)[2].strip().startswith("available")


def test_show_config_names_the_precision_of_fp32_products_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def line() -> str:
        (found,) = (line for line in report.report().splitlines() if line.startswith("fp32 products on a GPU: "))
        return found.partition(": ")[2]

    conv, matmul = "(torch.backends.cudnn.conv)", "(torch.backends.cuda.matmul)"
    monkeypatch.delenv("RRU_FAST_FLOAT32", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert line() == f"TF32 in refine {conv}, fp32 in batch_hard {matmul}"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert line() == f"fp32 in refine {conv}, TF32 in batch_hard {matmul}"
    finally:
        torch.set_float32_matmul_precision(before)
    monkeypatch.setenv("RRU_FAST_FLOAT32", "tf32x3")
    assert line().endswith(", tf32x3 in both by triton and cuda (RRU_FAST_FLOAT32)")


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_auto_chooses_an_available_backend(device: str) -> None:
    chosen = backends.choose("auto", torch.device(device))
    assert backends.BACKENDS[chosen] is None
    assert chosen != "reference"


@pytest.mark.parametrize(("missing", "chosen"), [(None, "cpu"), ("no compiler", "composite")])
def test_auto_chooses_the_native_kernels_on_a_cpu_where_available(
    missing: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backends.BACKENDS, "cpu", missing)
    assert backends.choose("auto", torch.device("cpu")) == chosen
    assert backends.choose("auto", torch.device("cuda")) == "composite"


def test_the_cpu_backend_serves_only_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "cpu", None)
    assert {"reference", "composite", "cpu"} <= set(backends.serving(torch.device("cpu")))
    assert "cpu" not in backends.serving(torch.device("cuda"))


def test_the_cpu_backend_refuses_tensors_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "cpu", None)
    with pytest.raises(ValueError, match=r"^backend: got 'cpu' with tensors on meta, wanted 'auto', or tensors on"):
        rru_fast.strip_pool(torch.empty(1, 1, 1, 1, 1, device="meta"), backend="cpu")


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


@pytest.mark.parametrize("name", rru_fast.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    if name != "__version__":
        assert inspect.getdoc(getattr(rru_fast, name))


def imports_of(path: Path) -> set[str]:
    """First-party modules that a file imports, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name.split(".")[0] in ("rru_fast", "training", "benchmarks")}


# What each layer may import of rru_fast; a package may also import its own files.
FOOT = {"types", "distributed", "checks"}
MAY_IMPORT = {
    "types.py": set(),
    "arguments.py": set(),
    "distributed.py": set(),
    "testing.py": set(),
    "checks.py": {"types", "distributed"},
    "reference": FOOT,
    "composite": {"arguments", "distributed"},
    "cache.py": set(),
    "precision.py": set(),
    "triton": {"arguments", "cache", "distributed", "precision"},
    "native.py": {"install_hint"},
    "cuda": {"arguments", "composite", "native", "precision", "triton"},
    "backends.py": {"cuda", "native", "triton"},
    "auto": {"backends", "cache", "cuda", "native", "triton"},
    "ops": {"arguments", "auto", "backends", "composite", "cuda", "native", "triton"},
    "cuda_graphs.py": FOOT,
    "functional.py": FOOT | {"arguments", "auto", "backends", "ops", "reference"},
    "calibrate": {"auto", "backends", "functional", "modules", "testing"},
    "report.py": {"auto", "backends", "cuda", "native"},
    "modules.py": FOOT | {"auto", "backends", "cuda_graphs", "functional", "reference"},
    "compat": FOOT | {"functional", "modules", "reference"},
    "contrib": FOOT | {"backends", "compat", "functional", "modules", "reference"},
}


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_layers_import_only_lower_layers(layer: str) -> None:
    root = Path(rru_fast.__file__).parent
    files = [root / layer] if layer.endswith(".py") else list((root / layer).rglob("*.py"))
    assert files
    allowed = MAY_IMPORT[layer] | {layer.removesuffix(".py")}
    for path in files:
        for name in imports_of(path):
            package, _, rest = name.partition(".")
            of_whole = package == "rru_fast" and not rest  # `from rru_fast import ...` names it too
            assert of_whole or (package == "rru_fast" and rest.split(".")[0] in allowed), f"{path.name} imports {name}"
