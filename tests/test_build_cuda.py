"""Build a tiny CUDA kernel along with the others. Needs nvcc, no GPU."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from build_tools import toolchain
from tests.build_tree import STAND_IN_CUDA, Tree, run, stand_in_tree

try:
    toolchain.find_compiler()
    CUDA = toolchain.find_cuda()
except toolchain.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

MATCHES = (torch.version.cuda or "").split(".")[0] == CUDA.version.split(".")[0]
matching = pytest.mark.skipif(not MATCHES, reason=f"nvcc is of CUDA {CUDA.version}, torch of {torch.version.cuda}")


@pytest.fixture(scope="module")
def first_build(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = stand_in_tree(tmp_path_factory.mktemp("built") / "a tree")
    assert tree.build(RRU_FAST_CUDA="0").returncode == 0
    tree.write("csrc/cuda/twice.cu", STAND_IN_CUDA)
    return tree


@pytest.fixture
def tree(first_build: Tree, tmp_path: Path) -> Tree:
    return first_build.copy(tmp_path / "a tree")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def cuobjdump() -> str:
    """The one of the toolkit, else the one in triton's wheel."""
    inside = Path(find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"  # type: ignore[union-attr,arg-type]
    found = next((p for p in (CUDA.nvcc.parent / "cuobjdump", inside) if p.is_file()), None)
    if found is None:
        pytest.skip("no cuobjdump")
    return str(found)


@matching
def test_a_matching_nvcc_builds_for_80_and_90_where_there_is_no_gpu(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tree.root / "bin/nvidia-smi", "exit 9")  # as with no driver loaded
    monkeypatch.setenv("PATH", f"{tree.root / 'bin'}", prepend=":")
    assert tree.build().returncode == 0
    record = tree.record()
    assert record["cuda"] is None
    assert (record["nvcc"], record["cuda_architectures"]) == (CUDA.version, ["80", "90"])
    (binary,) = tree.binaries()
    images = run([cuobjdump(), "--list-elf", str(binary)], tree.root).stdout
    assert "sm_80" in images and "sm_90" in images
    assert int(tree.call("runtime")) // 1000 == int(CUDA.version.split(".")[0])  # loads and runs without a GPU


def test_cuda_0_leaves_cuda_out_and_the_rest_in(tree: Tree) -> None:
    assert tree.build(RRU_FAST_CUDA="0").returncode == 0
    assert tree.record()["cuda"] == "RRU_FAST_CUDA=0 when it was installed"
    assert (tree.call("sum"), tree.call("runtime")) == ("42", "0")


def test_cuda_1_without_a_toolkit_fails_with_the_reason(tree: Tree) -> None:
    done = tree.build(RRU_FAST_CUDA="1", CUDA_HOME="/nowhere")
    assert done.returncode == 1
    assert "RRU_FAST_CUDA=1, but the kernels cannot be built: no working nvcc: /nowhere/bin/nvcc" in done.stderr


def test_cuda_1_without_cuda_sources_fails_with_the_reason(tree: Tree) -> None:
    shutil.rmtree(tree.root / "csrc/cuda")
    assert "csrc/cuda holds no kernels yet" in tree.build(RRU_FAST_CUDA="1").stderr


def test_an_nvcc_of_another_major_is_used_only_when_demanded(tree: Tree) -> None:
    home = tree.root / "toolkit"
    script(home / "bin/nvcc", '[ "$1" = --version ] && exec echo "release 8.0, V8.0.1"; echo "error: ran" >&2; exit 2')
    (home / "lib64").mkdir()
    (home / "lib64/libcudart_static.a").touch()
    assert tree.build(CUDA_HOME=str(home)).returncode == 0
    assert tree.record()["cuda"].startswith(f"nvcc: got CUDA 8.0, wanted that of torch {torch.__version__}, ")
    demanded = tree.build(CUDA_HOME=str(home), RRU_FAST_CUDA="1")
    assert demanded.returncode == 1
    assert "nvcc failed on csrc/cuda/twice.cu: error: ran" in demanded.stderr


@matching
def test_a_cuda_source_that_does_not_compile_costs_only_cuda(tree: Tree) -> None:
    tree.write("csrc/cuda/twice.cu", "int cuda_runtime() { return undeclared; }")
    assert tree.build().returncode == 0
    assert "csrc/cuda/twice.cu" in tree.record()["cuda"] and "undeclared" in tree.record()["cuda"]
    assert (tree.call("sum"), tree.call("runtime")) == ("42", "0")


@matching
def test_architectures_are_those_of_torch_cuda_arch_list(tree: Tree) -> None:
    assert tree.build(TORCH_CUDA_ARCH_LIST="9.0+PTX", RRU_FAST_CUDA="1").returncode == 0
    (binary,) = tree.binaries()
    listed = run([cuobjdump(), "--list-elf", "--list-ptx", str(binary)], tree.root).stdout
    assert "sm_80" not in listed
    assert {"cubin", "ptx"} == {line.rsplit(".", 1)[-1] for line in listed.splitlines() if "sm_90" in line}


def test_architectures_without_a_list_are_those_of_the_gpus_present(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    smi = script(tmp_path / "nvidia-smi", "echo 12.0; echo 9.0; echo 9.0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert toolchain.cuda_architectures() == ["90", "120"]
    smi.write_text("#!/bin/sh\necho 'Failed to initialize NVML'; exit 9\n")
    assert toolchain.cuda_architectures() == ["80", "90"]


def test_an_architecture_list_of_no_meaning_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(toolchain.BuildError, match=r"^TORCH_CUDA_ARCH_LIST: got 'Hopper', wanted numbers such as"):
        toolchain.cuda_architectures()


@pytest.mark.parametrize("how", ["link", "script", "link to a script"])
def test_the_toolkit_is_found_behind(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    target = script(tmp_path / "elsewhere/nvcc", f'exec "{CUDA.nvcc}" "$@"') if "script" in how else CUDA.nvcc
    (tmp_path / "bin").mkdir()
    if how == "script":
        shutil.copy(target, tmp_path / "bin/nvcc")
    else:
        (tmp_path / "bin/nvcc").symlink_to(target)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    assert toolchain.find_cuda().nvcc == CUDA.nvcc.resolve()


def test_cuda_home_wins_over_the_nvcc_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "bin/nvcc", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setenv("CUDA_HOME", str(CUDA.nvcc.parents[1]))
    assert toolchain.find_cuda() == CUDA
