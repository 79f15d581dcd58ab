"""Builds of a stand-in CUDA kernel along with the C++ ones. Needs nvcc, no GPU."""

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

MAJOR = CUDA.version.split(".")[0]
needs_matching_torch = pytest.mark.skipif(
    (torch.version.cuda or "").split(".")[0] != MAJOR, reason=f"nvcc: {CUDA.version}, torch: {torch.version.cuda}"
)


@pytest.fixture(scope="module")
def first_build(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = stand_in_tree(tmp_path_factory.mktemp("built") / "a tree")
    assert tree.build(RRU_FAST_CUDA="0").returncode == 0
    tree.write("csrc/cuda/twice.cu", STAND_IN_CUDA)
    return tree


@pytest.fixture
def tree(first_build: Tree, tmp_path: Path) -> Tree:
    return first_build.copy(tmp_path / "a tree")


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def cuobjdump() -> str:
    """Find cuobjdump in the toolkit, else in triton's wheel."""
    in_triton = Path(find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"  # type: ignore[union-attr,arg-type]
    found = next((p for p in (CUDA.nvcc.parent / "cuobjdump", in_triton) if p.is_file()), None)
    if found is None:
        pytest.skip("no cuobjdump")
    return str(found)


@needs_matching_torch
def test_a_matching_nvcc_builds_for_90_where_there_is_no_gpu(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    write_script(tree.root / "bin/nvidia-smi", "exit 9")  # as without a driver
    monkeypatch.setenv("PATH", f"{tree.root / 'bin'}", prepend=":")
    assert tree.build().returncode == 0
    record = tree.record()
    assert record["cuda"] is None
    assert (record["nvcc"], record["cuda_architectures"]) == (CUDA.version, ["90"])
    (binary,) = tree.binaries()
    images = run([cuobjdump(), "--list-elf", str(binary)], tree.root).stdout
    assert "sm_90" in images and "sm_80" not in images
    assert int(tree.call("runtime")) // 1000 == int(MAJOR)  # the binary loads and runs without a GPU


def test_cuda_0_builds_only_the_cpp_kernels(tree: Tree) -> None:
    assert tree.build(RRU_FAST_CUDA="0").returncode == 0
    assert tree.record()["cuda"] == "RRU_FAST_CUDA=0 when it was installed"
    assert (tree.call("sum"), tree.call("runtime")) == ("42", "0")


def test_cuda_1_without_a_toolkit_fails_with_the_reason(tree: Tree) -> None:
    done = tree.build(RRU_FAST_CUDA="1", CUDA_HOME="/nowhere")
    assert done.returncode == 1
    assert "RRU_FAST_CUDA=1, but the kernels cannot be built: no working nvcc: /nowhere/bin/nvcc" in done.stderr


def test_cuda_1_without_cuda_sources_fails_with_the_reason(tree: Tree) -> None:
    shutil.rmtree(tree.root / "csrc/cuda")
    assert "csrc/cuda holds no kernels" in tree.build(RRU_FAST_CUDA="1").stderr


def test_an_nvcc_of_another_major_version_is_used_only_if_required(tree: Tree) -> None:
    home = tree.root / "toolkit"
    version = '[ "$1" = --version ] && exec echo "release 8.0, V8.0.1"'
    write_script(home / "bin/nvcc", f'{version}; echo "error: ran" >&2; exit 2')
    (home / "lib64").mkdir()
    (home / "lib64/libcudart_static.a").touch()
    assert tree.build(CUDA_HOME=str(home)).returncode == 0
    assert tree.record()["cuda"].startswith(f"nvcc: got CUDA 8.0, wanted that of torch {torch.__version__}, ")
    required = tree.build(CUDA_HOME=str(home), RRU_FAST_CUDA="1")
    assert required.returncode == 1
    assert "nvcc failed on csrc/cuda/twice.cu: error: ran" in required.stderr


@needs_matching_torch
def test_a_cuda_compile_error_leaves_out_only_cuda(tree: Tree) -> None:
    tree.write("csrc/cuda/twice.cu", "#ifdef __CUDACC__\nint cuda_runtime() { return undeclared; }\n#endif")
    assert tree.build().returncode == 0
    assert "csrc/cuda/twice.cu" in tree.record()["cuda"] and "undeclared" in tree.record()["cuda"]
    assert (tree.call("sum"), tree.call("runtime")) == ("42", "0")


@needs_matching_torch
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
    nvidia_smi = write_script(tmp_path / "nvidia-smi", "echo 12.0; echo 9.0; echo 9.0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert toolchain.cuda_architectures() == ["90", "120"]
    nvidia_smi.write_text("#!/bin/sh\necho 'Failed to initialize NVML'; exit 9\n")
    assert toolchain.cuda_architectures() == ["90"]


def test_an_invalid_architecture_list_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(toolchain.BuildError, match=r"^TORCH_CUDA_ARCH_LIST: got 'Hopper', wanted numbers such as"):
        toolchain.cuda_architectures()


@pytest.mark.parametrize("nvcc_on_path", ["link", "script", "link to a script"])
def test_the_toolkit_is_found_behind(nvcc_on_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    target = CUDA.nvcc
    if "script" in nvcc_on_path:
        target = write_script(tmp_path / "elsewhere/nvcc", f'exec "{CUDA.nvcc}" "$@"')
    (tmp_path / "bin").mkdir()
    if nvcc_on_path == "script":
        shutil.copy(target, tmp_path / "bin/nvcc")
    else:
        (tmp_path / "bin/nvcc").symlink_to(target)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    assert toolchain.find_cuda().nvcc == CUDA.nvcc.resolve()


def test_cuda_home_overrides_the_nvcc_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_script(tmp_path / "bin/nvcc", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setenv("CUDA_HOME", str(CUDA.nvcc.parents[1]))
    assert toolchain.find_cuda() == CUDA
