"""The Triton backend: availability, precision of fp32 products, addressing, autotuning and CUDA graphs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import rru_fast
from rru_fast import backends, cuda_graphs, report, triton
from rru_fast.arguments import RefineNeed, RefineUpstream
from rru_fast.precision import conv_precision, matmul_precision
from rru_fast.testing import EXACT, relative_error
from tests import parity
from tests.parity import Case

ROOT = Path(__file__).resolve().parents[1]
interpreted = pytest.mark.skipif(not triton.interpreted(), reason="needs TRITON_INTERPRET=1")


def in_another_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available() or triton.interpreted(), reason="the kernels can run here")
def test_without_a_gpu_it_says_how_the_kernels_can_be_run() -> None:
    with pytest.raises(ValueError, match=r"got 'triton', wanted .*: no NVIDIA GPU is seen; TRITON_INTERPRET=1 runs"):
        rru_fast.RRU(6, (3, 2), backend="triton")
    assert "triton     not available: no NVIDIA GPU is seen" in report.report()


def test_importing_the_library_imports_no_triton_and_starts_no_cuda() -> None:
    code = "import sys, torch, rru_fast; print('triton' in sys.modules, torch.cuda.is_initialized())"
    bare = in_another_process("import sys, torch; print('triton' in sys.modules)", TRITON_INTERPRET="")
    done = in_another_process(code, TRITON_INTERPRET="")
    assert done.stdout.split() == [bare.stdout.strip(), "False"], done.stderr


@interpreted
def test_on_a_cpu_auto_does_not_choose_the_interpreter() -> None:
    assert backends.choose("auto", torch.device("cpu")) != "triton"
    assert backends.choose("triton", torch.device("cpu")) == "triton"


def test_distances_are_multiplied_as_matmuls_and_transitions_as_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for asked, wanted in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            for allowed in (True, False):
                torch.set_float32_matmul_precision(asked)
                torch.backends.cudnn.allow_tf32 = allowed
                assert matmul_precision(torch.float32) == wanted
                assert conv_precision(torch.float32) == ("tf32" if allowed else "ieee")
                for rule in (matmul_precision, conv_precision):
                    assert rule(torch.float64) == rule(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    for rule in (matmul_precision, conv_precision):
        monkeypatch.setenv("RRU_FAST_FLOAT32", "tf32x3")
        assert rule(torch.float32) == "tf32x3"
        monkeypatch.setenv("RRU_FAST_FLOAT32", "fast")
        with pytest.raises(ValueError, match="RRU_FAST_FLOAT32: got 'fast', wanted one of ieee, tf32, tf32x3"):
            rule(torch.float32)


def test_by_default_transitions_are_multiplied_in_tf32_and_distances_in_float32() -> None:
    code = (
        "import torch; from rru_fast.precision import conv_precision, matmul_precision; "
        "print(conv_precision(torch.float32), matmul_precision(torch.float32))"
    )
    assert in_another_process(code, RRU_FAST_FLOAT32="").stdout.split() == ["tf32", "ieee"]


def test_maps_are_addressed_where_they_lie_and_copied_only_where_positions_are_uneven() -> None:
    strided = pytest.importorskip("rru_fast.triton._strided")
    x = torch.randn(2, 3, 5, 4, 6)
    channels_last = x.movedim(2, -1).contiguous().movedim(-1, 2)
    for tensor in (x, channels_last, x[:, ::2], x[:, :, 1:4], x.transpose(0, 1), x[..., :1], x[..., :1, :]):
        assert strided.as_strided_maps(tensor).ptr is tensor
    for tensor in (x.transpose(3, 4), x[..., 1:], x[..., ::2, :]):
        copy = strided.as_strided_maps(tensor).ptr
        assert copy.is_contiguous() and torch.equal(copy, tensor)


def test_offsets_beyond_31_bits_are_seen() -> None:
    strided = pytest.importorskip("rru_fast.triton._strided")
    for channels, needed in ((2**15, False), (2**15 + 1, True)):
        tensor = torch.empty(1, 1, channels, 256, 256, device="meta")
        assert strided.needs_int64(strided.as_strided_maps(tensor)) is needed


@interpreted
@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_every_precision_has_its_own_error(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RRU_FAST_FLOAT32", precision)
    case = Case()
    call = parity.make_call(case, torch.float32)
    got = parity.run(case, call.map(lambda v: v.float()), "triton")
    # The interpreter multiplies tf32x3 in fp32. TF32 rounds operands to 11 bits: 2^-12 on average.
    least, most = (1e-6, 2e-3) if precision == "tf32" else (0, 2e-6)
    errors = {name: relative_error(got[name], wanted) for name, wanted in parity.run(case, call, "reference").items()}
    assert max(errors.values()) <= most
    assert errors["d_w"] > least


@interpreted
def test_factors_are_rounded_to_tf32_to_the_nearest_and_not_cut_off() -> None:
    from tests.rounding_kernel import rounding_kernel

    ulp = 2.0**-10  # of TF32, at 1
    special = [1.0, 1 + 0.49 * ulp, 1 + 0.5 * ulp, 1 + 0.51 * ulp, -1 - 0.5 * ulp, 0.0, float("inf"), -float("inf")]
    wanted = [1.0, 1.0, 1 + ulp, 1 + ulp, -1 - ulp, 0.0, float("inf"), -float("inf")]
    v = torch.tensor([*special, *torch.randn(118).tolist(), float("nan"), float("nan")])
    v[-1:].view(torch.int32).fill_(
        0x7FFFFFFF
    )  # the NaN of NVIDIA GPUs: rounding by adding to its bits would overflow into the sign
    out = torch.empty_like(v)
    rounding_kernel[(1,)](out, v, N=128)
    assert out[: len(wanted)].tolist() == wanted
    assert out[-2:].isnan().all()
    assert ((out[:-2] - v[:-2]).abs() <= v[:-2].abs() * ulp / 2)[8:].all()
    assert (out[8:-2].view(torch.int32) & 0x1FFF == 0).all()


@interpreted
def test_splitting_the_channels_changes_no_more_than_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    from rru_fast.triton import _device

    case = Case((3, 3, 100, 3, 3), hidden=20, bn_groups=3)
    call = parity.make_call(case)
    oracle = parity.run(case, call, "reference")
    for num_sms in (1, 1000):  # one program for all channels; one per block of channels
        monkeypatch.setattr(_device, "num_sms", lambda tensor, n=num_sms: n)
        for name, value in parity.run(case, call, "triton").items():
            assert relative_error(value, oracle[name]) <= EXACT, name


@interpreted
def test_offsets_in_64_bits_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from rru_fast.triton.refine import arguments

    case = Case(mode="continued")
    call = parity.make_call(case)
    wanted = parity.run(case, call, "triton")
    monkeypatch.setattr(arguments, "needs_int64", lambda maps: True)
    for name, value in parity.run(case, call, "triton").items():
        assert torch.equal(value, wanted[name]), name


@interpreted
def test_a_tuned_config_is_on_disk_and_changes_no_more_than_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rru_fast.triton import _autotune

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case = Case((2, 2, 5, 2, 1), hidden=3, spatial_hidden=2)
    call = parity.make_call(case)
    oracle = parity.run(case, call, "reference")
    monkeypatch.setenv("RRU_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(_autotune, "_known", {})
    for name, value in parity.run(case, call, "triton").items():
        assert relative_error(value, oracle[name]) <= EXACT, name
    files = sorted((tmp_path / "rru_fast" / "autotune").iterdir())
    assert [next(iter(json.loads(file.read_text()))).split()[0] for file in files] == ["refine", "refine_backward"]
    monkeypatch.setattr(_autotune, "_known", {})
    monkeypatch.setattr(_autotune, "_best", None)  # fails if a config on disk is measured again
    parity.run(case, call, "triton")


def test_autotuning_is_on_or_off(monkeypatch: pytest.MonkeyPatch) -> None:
    autotune = pytest.importorskip("rru_fast.triton._autotune")
    cpu = torch.zeros(1)
    for asked, wanted in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("RRU_FAST_AUTOTUNE", asked)
        assert autotune.enabled(cpu) is wanted
    monkeypatch.setenv("RRU_FAST_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="RRU_FAST_AUTOTUNE: got 'yes', wanted 0 or 1"):
        autotune.enabled(cpu)


def test_a_cuda_graph_needs_a_gpu_and_a_backend_of_a_gpus() -> None:
    rru = rru_fast.RRU(6, (3, 2), hidden=5, cuda_graph=True)
    assert "cuda_graph=True" in repr(rru)
    with pytest.raises(ValueError, match="cuda_graph: got True with tensors on cpu, wanted tensors on a GPU"):
        rru(torch.rand(2, 3, 6, 3, 2))
    for backend in ("reference", *(["cpu"] if backends.BACKENDS["cpu"] is None else [])):
        with pytest.raises(ValueError, match=f"cuda_graph: got True with backend='{backend}', wanted 'auto'"):
            rru_fast.RRU(6, (3, 2), backend=backend, cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph: got 1, wanted True or False"):
        rru_fast.RRU(6, (3, 2), cuda_graph=1)
    with pytest.raises(ValueError, match="cuda_graph: got True, wanted False"):
        rru_fast.reference.RRU(6, (3, 2), cuda_graph=True)


def test_a_graph_is_of_a_precision_and_of_its_weights() -> None:
    w, other, x = torch.rand(3, 4), torch.rand(3, 4), torch.rand(2, 4)

    def kind(w: torch.Tensor = w, x: torch.Tensor = x, setting: object = "both") -> object:
        return cuda_graphs.graph_key({"w": w}, [], {"x": x}, (setting,))

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)  # before it is first set, fp32_precision is "none"
    first = kind()
    assert kind(x=torch.rand(2, 4)) == first  # inputs are copied in
    for changed in (kind(w=other), kind(x=torch.rand(3, 4)), kind(x=x.double()), kind(setting="spatial")):
        assert changed != first
    try:
        torch.set_float32_matmul_precision("high")
        assert kind() != first
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.no_grad():
        assert kind() != first
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RRU_FAST_FLOAT32", "tf32x3")
        assert kind() != first
    assert kind() == first


def test_a_graphs_backward_after_the_next_call_raises_and_gives_no_wrong_gradient() -> None:
    calls, memory = [1], torch.rand(2, 3, requires_grad=True)
    (first,) = cuda_graphs.expire_on_replay(calls, (memory * 1,))
    first.sum().backward()
    assert torch.equal(memory.grad, torch.ones(2, 3))  # type: ignore[arg-type]
    (first,) = cuda_graphs.expire_on_replay(calls, (memory * 1,))
    calls[0] += 1
    (second,) = cuda_graphs.expire_on_replay(calls, (memory * 1,))
    with pytest.raises(RuntimeError, match="cuda_graph: got the backward of a call after 1 later ones of its shape"):
        (first + second).sum().backward()


def test_a_graphs_output_changed_in_place_has_no_backward() -> None:
    leaf = torch.rand(2, 3, requires_grad=True)
    features, _ = cuda_graphs.expire_on_replay([1], (leaf * 1, leaf * 2))
    with pytest.raises(RuntimeError, match=r"modified inplace"):
        features.mul_(2).sum().backward()


@pytest.mark.parametrize("takes_a_mode", [True, False])
def test_a_graph_is_captured_so_that_other_threads_can_go_on(
    takes_a_mode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[object] = []

    def graph(graph: object, pool: object = None, capture_error_mode: str = "global") -> None:
        modes.append(capture_error_mode)

    def older(call: object, samples: object, allow_unused_input: bool = False) -> object:
        torch.cuda.graph(None)  # type: ignore[arg-type]
        return call

    def newer(
        call: object, samples: object, allow_unused_input: bool = False, capture_error_mode: str = "global"
    ) -> object:
        graph(None, None, capture_error_mode)
        return call

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", newer if takes_a_mode else older)
    cuda_graphs.make_graphed(lambda: (), ())
    assert modes == ["thread_local"]
    assert torch.cuda.graph is graph


def test_graphs_captured_by_two_threads_leave_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    began, ended = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def older(number: int, samples: object, allow_unused_input: bool = False) -> object:
        began[number].set()
        (began[1] if number == 0 else ended[0]).wait(
            0.3
        )  # the first continues once the second has begun, and ends first
        return number

    def capture(number: int) -> None:
        cuda_graphs.make_graphed(number, ())  # type: ignore[arg-type]
        ended[number].set()

    def graph() -> None:
        pass

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", older)
    threads = [threading.Thread(target=capture, args=(number,)) for number in range(2)]
    threads[0].start()
    assert began[0].wait(10)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert torch.cuda.graph is graph


def test_no_number_of_clips_is_too_many_for_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rru_fast.triton._launch")
    from benchmarks.launches.recording import refine_arguments
    from rru_fast.triton import _launch, refine, strip_pool

    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(_launch, "launch", lambda kernel, grid, **arguments: grids.append(grid))
    with torch.device("meta"):
        x = torch.empty(70_000, 2, 16, 2, 2)
        args = refine_arguments(rru_fast.reference.RRU(16, (2, 2), hidden=8, spatial_hidden=4), x)
        outputs = refine.forward(args, save=True)
        upstream = RefineUpstream(outputs.features, outputs.strips)
        refine.backward(upstream, outputs.saved, args, RefineNeed(need_x=True, need_weights=True))
        strip_pool.backward(strip_pool.forward(x), 2, 2)
    assert max(grid[0] for grid in grids) >= 70_000
    assert max(size for grid in grids for size in grid[1:]) <= 65_535


def test_accelerate_gives_and_restore_takes_cuda_graphs() -> None:
    model = rru_fast.accelerate(rru_fast.reference.RRU(6, (3, 2)), cuda_graph=True)
    assert model.cuda_graph
    assert not rru_fast.accelerate(model).cuda_graph
    with pytest.raises(ValueError, match="cuda_graph: got True with backend='reference'"):
        rru_fast.accelerate(model, backend="reference", cuda_graph=True)
    assert not hasattr(rru_fast.restore(model), "cuda_graph")
