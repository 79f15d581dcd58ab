"""The CUDA backend: what it carries, what it leaves to another, and its emulation on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rru_fast
from rru_fast import backends, cuda, native, triton
from rru_fast.auto.kinds import RefineKind, StripPoolKind, refine_key
from rru_fast.testing import poisoned_memory, relative_error
from tests import parity
from tests.parity import Case

ROOT = Path(__file__).resolve().parents[2]
FALLBACK = "triton" if triton.interpreted() else "composite"
needs_kernels = pytest.mark.skipif(native.missing() is not None, reason="the C++ kernels are not built")
emulated = pytest.mark.skipif("cuda" not in parity.BACKENDS, reason="needs RRU_FAST_CUDA_EMULATE=1, and the kernels")


def in_another_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import torch, rru_fast\n{code}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RRU_FAST_CUDA_EMULATE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


UNIT = (
    "sizes = dict(hidden=30, spatial_hidden=8, backend='cuda'); x = torch.randn(2, 3, 20, 4, 2);"
    "unit = rru_fast.RRU(20, (4, 2), **sizes); from rru_fast import backends;"
)


@needs_kernels
def test_what_is_not_carried_runs_elsewhere_with_one_warning() -> None:
    raw = "unit = rru_fast.RRU(20, (4, 2), inputs='raw', **sizes)"
    done = in_another_process(
        f"{UNIT}\n{raw}\nfor _ in range(3): unit(x).features.sum().backward()\nprint(backends.ran())"
    )
    assert done.stdout == f"{{'refine': ['{FALLBACK}']}}\n"
    warned = f"rru_fast.refine: backend='cuda' runs {FALLBACK} for what it does not carry: inputs='raw'"
    assert done.stderr.count("FallbackWarning") == done.stderr.count(warned) == 1, done.stderr
    done = in_another_process(f"{UNIT}\nunit(x).features.sum().backward(); print(backends.ran())")
    assert done.stdout == "{'refine': ['cuda']}\n"
    assert "FallbackWarning" not in done.stderr
    done = in_another_process(f"{UNIT}\nunit.eval()(x).features.sum().backward(); print(backends.ran())")
    assert done.stdout == f"{{'refine': ['{FALLBACK}', 'cuda']}}\n"
    assert "FallbackWarning" not in done.stderr


@needs_kernels
def test_show_config_says_what_it_carries() -> None:
    shown = in_another_process("rru_fast.show_config()").stdout
    (line,) = (line for line in shown.splitlines() if line.startswith("  cuda "))
    assert line.endswith(
        f" available on the CPU, emulated: refine, but for its backward in eval mode; the rest runs in {FALLBACK}"
    )
    shown = in_another_process("rru_fast.show_config()", RRU_FAST_CUDA_EMULATE="0").stdout
    (line,) = (line for line in shown.splitlines() if line.startswith("  cuda "))
    assert "emulated" not in line


@needs_kernels
def test_a_wrong_value_of_the_variable_is_an_error() -> None:
    done = in_another_process("", RRU_FAST_CUDA_EMULATE="yes")
    assert done.stderr.endswith("ValueError: RRU_FAST_CUDA_EMULATE: got 'yes', wanted 0 or 1\n")


@needs_kernels
def test_an_error_of_the_emulation_names_the_backend_that_needs_none() -> None:
    code = f"""{UNIT}
args = (x, torch.zeros(64, dtype=torch.uint8), None, None, None, None, torch.empty_like(x), torch.empty(2, 20, 4))
torch.ops.rru_fast.refine_cuda_eval(*args, None, [], 30, 0, "ieee", 0, 4, 0)"""
    assert "ValueError: first, end: got 0, 4, wanted frames of 3" in in_another_process(code).stderr


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, None),
        ({"inputs": "raw"}, "inputs='raw'"),
        ({"inputs": "appearance"}, None),
        ({"dtype": "float64"}, "float64"),
        ({"channels": 2048}, None),
        ({"channels": 2049}, "C of 2049, at most 2048"),
        ({"positions": 65}, "H * W of 65, at most 64"),
        ({"hidden": 257}, "D of 257, at most 256"),
        ({"spatial_hidden": 129}, "A of 129, at most 128"),
    ],
    ids=str,
)
def test_what_is_carried_follows_from_the_call(changed: dict[str, Any], why: str | None) -> None:
    call = {"dtype": "float32", "inputs": "appearance+motion", "channels": 64, "positions": 64, "hidden": 32}
    assert cuda.not_carried("refine", **call | changed) == why  # type: ignore[arg-type]
    for op in ("strip_pool", "batch_hard"):
        assert cuda.not_carried(op) == f"there is no CUDA kernel of {op}"


def test_auto_measures_it_for_kinds_alone_that_it_carries() -> None:
    def kind(training: bool, channels: int = 64) -> RefineKind:
        x, w, w_s1 = torch.empty(2, 3, channels, 4, 4), torch.empty(32, 2 * channels), torch.empty(16, 16)
        return RefineKind.from_key(refine_key(x, w, w_s1, None, "appearance+motion", training, False))

    for training in (False, True):
        assert kind(training).is_carried("cuda") and not kind(training, 4096).is_carried("cuda")
    assert kind(True).is_carried("triton")
    assert not StripPoolKind("float32", False, "contiguous", 1, 1, 1, 1, 1).is_carried("cuda")


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["90"], (9, 0), True),
        (["90"], (8, 0), False),
        (["90"], (10, 0), False),
        (["90+PTX"], (10, 0), True),
        (["90a"], (9, 0), True),
        (["90a+PTX"], (10, 0), False),
        (["80"], (9, 0), False),
        (["80+PTX"], (9, 0), False),
        (["80", "100"], (10, 3), True),
        (["103"], (10, 0), False),
    ],
    ids=str,
)
def test_a_build_serves_gpus_of_its_architectures(
    architectures: list[str], capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "cuda_architectures", lambda: architectures)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv("RRU_FAST_CUDA_EMULATE", "0")
    assert cuda.serves(torch.device("cuda")) is runs
    assert not cuda.serves(torch.device("cpu"))


def forward(call: parity.Call, **options: Any) -> rru_fast.Refined:
    mean, var = call.buffers
    own = {"running_mean": mean, "running_var": var, "lengths": call.lengths, "state": call.state, "backend": "cuda"}
    weights: dict[str, Any] = call.weights
    with torch.no_grad(), poisoned_memory():
        return rru_fast.refine(call.x, **weights, **own | options)


@emulated
@pytest.mark.parametrize("mode", ["eval", "ragged", "continued"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_segments_of_frames_equal_one_launch_and_the_oracle(
    dtype: torch.dtype, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case((3, 8, 20, 4, 3), hidden=9, spatial_hidden=5, mode=mode)
    exact = parity.make_call(case, dtype)
    call = exact.map(lambda v: v.to(dtype))
    backends.forget_runs()
    whole = forward(call)
    assert backends.ran() == {"refine": ["cuda"]}
    oracle = forward(exact, backend="reference")
    for got, wanted in ((whole.features, oracle.features), (whole.strips, oracle.strips)):
        assert relative_error(got, wanted) <= {4: 1e-6, 2: 4e-3}[dtype.itemsize]
    for frames in (1, 3):
        rows = 9 if "triton" in parity.BACKENDS else 20  # of a product, or of its operand
        monkeypatch.setattr("rru_fast.cuda.refine.eval.SEGMENT_BYTES", frames * 4 * 3 * rows * 12)
        parts = forward(call)
        # A convolution of other sizes may round in another way.
        assert relative_error(parts.features, whole.features) <= 2 * torch.finfo(dtype).eps
        assert relative_error(parts.strips, whole.strips) <= 2 * torch.finfo(dtype).eps


@emulated
def test_no_layout_with_positions_at_one_stride_is_copied() -> None:
    from rru_fast.cuda.refine.eval import EvalForward

    case = Case((2, 3, 20, 4, 6), mode="eval")
    arguments = parity.operator_arguments(case, parity.make_call(case).map(lambda v: v.float()))

    def read(maps: torch.Tensor) -> torch.Tensor:
        return EvalForward(replace(arguments, x=maps), save=False).x

    x = torch.randn(case.shape)
    channels_last = x.movedim(2, -1).contiguous().movedim(-1, 2)
    for maps in (x, channels_last, x[:, ::2], x[:, :, 1:4], x.transpose(0, 1), x[..., :1]):
        assert read(maps) is maps
    for maps in (x.transpose(3, 4), x[..., 1:]):
        assert read(maps).is_contiguous()


@emulated
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001], ids=hex)
@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_every_nan_spreads_as_in_the_reference(precision: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's own NaN has all bits of its mantissa set, to which rounding to TF32 adds one."""
    monkeypatch.setenv("RRU_FAST_FLOAT32", precision)
    # Without motion, whose product is not the kernel's.
    case = Case((2, 4, 20, 4, 2), hidden=9, inputs="appearance", mode="eval")
    call = parity.make_call(case).map(lambda v: v.float())
    call.x.view(torch.int32)[0, 2, 3, 1, 1] = bits
    mean, var = call.buffers
    got = forward(call, inputs="appearance")
    weights: dict[str, Any] = {**call.weights, "inputs": "appearance"}
    wanted = rru_fast.refine(call.x, **weights, running_mean=mean, running_var=var, backend="reference")
    assert torch.equal(got.features.isnan(), wanted.features.isnan())
    assert got.features[0, 2:].isnan().all() and not got.features[1].isnan().any()


@emulated
@pytest.mark.parametrize(("precision", "least", "most"), [("ieee", 0, 4e-7), ("tf32x3", 0, 8e-7), ("tf32", 1e-5, 1e-3)])
def test_every_precision_has_its_own_error(
    precision: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RRU_FAST_FLOAT32", precision)
    call = parity.make_call(Case((2, 6, 60, 4, 4), hidden=20, mode="eval"), torch.float32)
    mean, var = call.buffers
    wanted = rru_fast.refine(call.x, **call.weights, running_mean=mean, running_var=var, backend="reference").features
    assert least <= relative_error(forward(call.map(lambda v: v.float())).features, wanted) <= most


@emulated
@pytest.mark.skipif("triton" in parity.BACKENDS, reason="Triton multiplies it")
@pytest.mark.parametrize(("asked", "allowed", "motion"), [("ieee", True, "ieee"), ("tf32x3", True, "ieee")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_motion_is_multiplied_in_the_precision_that_is_asked_for(
    dtype: torch.dtype, asked: str, allowed: bool, motion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def setting() -> str:
        found: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        return found

    seen: list[str] = []

    def conv1d(*args: Any) -> torch.Tensor:
        seen.append(setting())
        return torch.conv1d(*args)

    monkeypatch.setattr("torch.nn.functional.conv1d", conv1d)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    monkeypatch.setenv("RRU_FAST_FLOAT32", asked)
    before = setting()
    call = parity.make_call(Case((2, 3, 20, 4, 2), hidden=9, mode="eval"), dtype).map(lambda v: v.to(dtype))
    forward(call)
    assert seen == [motion if dtype == torch.float32 else before]
    assert setting() == before == "tf32"


@emulated
def test_maps_at_an_address_that_is_not_aligned_are_read_one_by_one() -> None:
    call = parity.make_call(Case((2, 3, 20, 8, 4), hidden=9, mode="eval")).map(lambda v: v.float())
    wanted = forward(call).features
    call.x = torch.cat((torch.zeros(1), call.x.flatten()))[1:].view_as(call.x)
    assert call.x.data_ptr() % 16 != 0
    assert torch.equal(forward(call).features, wanted)


@emulated
def test_weights_packed_for_other_sizes_are_refused() -> None:
    x, weights = torch.zeros(1, 2, 20, 4, 2), torch.zeros(64, dtype=torch.uint8)
    outputs = torch.empty_like(x), torch.empty(1, 20, 4)
    with pytest.raises(ValueError, match=r"^packed: got shape \[64\], wanted \["):
        torch.ops.rru_fast.refine_cuda_eval(
            x, weights, None, None, None, None, *outputs, None, [], 30, 0, "ieee", 0, 2, 0
        )


@emulated
def test_calibration_refuses_a_backend_that_leaves_its_calls_to_another() -> None:
    from rru_fast.calibrate.measure import BackendError, hold

    # Of maps of one column, a CTA's strips take more shared memory than fp32 leaves.
    x, w, w_s1 = torch.empty(1, 2, 2048, 64, 1), torch.empty(256, 4096), torch.empty(16, 64)
    kind = RefineKind.from_key(refine_key(x, w, w_s1, None, "appearance+motion", False, False))
    assert kind.is_carried("cuda")
    with pytest.raises(BackendError, match=rf"^leaves refine, eval, .* to {FALLBACK}$"):
        hold(kind, torch.device("cpu"), "cuda", lambda doing, backend: None)


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_papers_unit_is_right_at_its_real_size(dtype: torch.dtype, width: int) -> None:
    """16 CTAs of 256 threads, as on a GPU."""
    case = Case((1, 2, 2048, 8, width), hidden=256, spatial_hidden=128, mode="eval")
    call = parity.make_call(case, dtype)
    mean, var = call.buffers
    wanted = rru_fast.refine(call.x, **call.weights, running_mean=mean, running_var=var, backend="reference")
    got = forward(call.map(lambda v: v.to(dtype)))
    for name in ("features", "strips"):
        assert relative_error(getattr(got, name), getattr(wanted, name)) <= {4: 1e-6, 2: 4e-3}[dtype.itemsize], name


@emulated
def test_fragments_and_pushes_are_as_the_kernels_take_them() -> None:
    from benchmarks.gpu.fragments import DTYPES, fragments

    found = list(fragments(torch.device("cpu")))
    assert [finding for finding in found if "failed" in finding] == []
    assert found[-1] == {"TF32 operands": "dropped"}
    assert len(found) == len(DTYPES) + 1


@emulated
def test_a_wrong_product_is_named_by_its_first_element() -> None:
    from benchmarks.gpu.fragments import wrong_elements

    wanted = torch.zeros(2, 3)
    found = wanted.clone()
    found[1, 2] = 5
    assert wrong_elements(found, wanted) == "1 of 6 wrong, at (1, 2) 5, wanted 0"
