"""`refine` of every backend against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rru_fast
from rru_fast import ops
from rru_fast.testing import EXACT, poisoned_memory, relative_error
from rru_fast.types import State
from tests import parity
from tests.parity import BACKENDS, GROUPS, ODD_SHAPES, VARIANTS, Case

every_backend = pytest.mark.parametrize("backend", BACKENDS)
default_backend_first = pytest.mark.parametrize("backend", parity.DEFAULT_FIRST)
native = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ kernels are not built")
ALL_WEIGHTS = ("w", "gamma", "beta", "w_s1", "w_s2", "w_c")


LARGE = 4000  # elements of x: half a minute in Triton's interpreter


@every_backend
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=pytest.mark.exhaustive if case.mode != "train" and size > LARGE else ())
        for case in [*VARIANTS, *GROUPS, *ODD_SHAPES]
        for size in [case.x_numel]
    ],
)
def test_float64_equals_the_oracle(case: Case, backend: str) -> None:
    call = parity.make_call(case)
    with poisoned_memory():
        got = parity.run(case, call, backend)
    oracle = parity.run(case, call, "reference")
    for name, wanted in oracle.items():
        assert relative_error(got[name], wanted) <= EXACT, name


def runs_by_default(case: Case, dtype: torch.dtype) -> bool:
    """Return True unless other calls round the same way; fp64 runs every case."""
    if case in ODD_SHAPES:
        return case.mode == "train" and dtype == torch.float32 and case.x_numel < LARGE
    variant = case.attention == "both" and (case.mode == "train" or case.inputs == "appearance+motion")
    return variant and case.bn_groups < 3


@every_backend
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            case, dtype, id=f"{case}-{dtype}", marks=() if runs_by_default(case, dtype) else pytest.mark.exhaustive
        )
        for case in [*VARIANTS, *GROUPS, *ODD_SHAPES]
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ],
)
def test_error_is_at_most_twice_the_references(case: Case, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and case.shape[1] > 10:
        pytest.skip("a minute per draw in Triton's interpreter; float64 covers the case")
    # The error of a few numbers is mostly chance: take more draws where they are cheap.
    few = case.x_numel < 50 or backend in (*parity.COMPILED, "cuda")
    parity.assert_refine_parity(case, dtype, backend, 15 if dtype == torch.float32 and few else 5)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_in_16_bit_are_aligned_with_the_oracle(dtype: torch.dtype, backend: str) -> None:
    case = Case((4, 5, 64, 4, 4), hidden=32, spatial_hidden=16)
    call = parity.make_call(case, dtype)
    got = parity.run(case, call.map(lambda v: v.to(dtype)), backend)
    parity.assert_aligned(got, parity.run(case, call, "reference"), tolerance=0.02)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_weights_work_with_16_bit_maps(dtype: torch.dtype, backend: str) -> None:
    case = Case()
    call = parity.make_call(case, dtype)
    oracle = parity.run(case, call, "reference")
    mixed = call.map(lambda v: v.to(dtype))
    mixed.weights = {name: weight.float() for name, weight in call.weights.items()}
    mixed.buffers = (call.buffers[0].float(), call.buffers[1].float())
    got = parity.run(case, mixed, backend)
    assert got["d_w"].dtype == torch.float32
    # Only the maps are rounded: weight gradients are off by at most a few roundings of S.
    for name, wanted in oracle.items():
        assert relative_error(got[name], wanted) <= 8 * torch.finfo(dtype).eps, name


def channels_last(v: Tensor) -> Tensor:
    return v.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": channels_last,
    "time_first": lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
    "every_other_column": lambda v: v.repeat_interleave(2, 4)[..., ::2],
    "columns_first": lambda v: v.transpose(3, 4).contiguous().transpose(3, 4),
    "offset": lambda v: torch.cat((v[:1], v))[1:],
}


@every_backend
@pytest.mark.parametrize("mode", ["train", "continued"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_change_results(layout: str, mode: str, backend: str) -> None:
    case = Case(mode=mode)
    call = parity.make_call(case)
    wanted = parity.run(case, call, backend)
    call.x, call.d_features = LAYOUTS[layout](call.x), LAYOUTS[layout](call.d_features)
    assert call.x.stride() != wanted["features"].stride() or call.x.storage_offset() > 0
    got = parity.run(case, call, backend)
    for name in wanted:
        assert relative_error(got[name], wanted[name]) <= EXACT, name


@every_backend
def test_an_expanded_video_equals_the_oracle(backend: str) -> None:
    case = Case()
    call = parity.make_call(case)
    call.x = call.x[:, :1].expand(case.shape)
    got, oracle = parity.run(case, call, backend), parity.run(case, call, "reference")
    assert relative_error(got["d_w"], oracle["d_w"]) <= EXACT
    assert torch.equal(got["features"], call.x)  # nothing moves: A_t = 0


@every_backend
@pytest.mark.parametrize("frozen", [("x",), ALL_WEIGHTS, ("x", "w", "w_c"), ("w_s1",)], ids=str)
def test_gradients_with_frozen_inputs_equal_the_oracle(frozen: tuple[str, ...], backend: str) -> None:
    case = Case()
    call = parity.make_call(case)
    got, oracle = parity.run(case, call, backend, frozen), parity.run(case, call, "reference", frozen)
    assert got.keys() == oracle.keys()
    for name, wanted in oracle.items():
        assert relative_error(got[name], wanted) <= EXACT, name


@every_backend
@pytest.mark.parametrize("used", ["features", "strips"])
def test_a_loss_on_one_output_gives_the_gradient_of_the_reference(used: str, backend: str) -> None:
    case = Case()
    gradients = {}
    for name in (backend, "reference"):
        call = parity.make_call(case)
        x = call.x.requires_grad_()
        out = rru_fast.refine(x, **call.weights, training=True, backend=name)
        (gradients[name],) = torch.autograd.grad(getattr(out, used).square().sum(), x)
    assert relative_error(gradients[backend], gradients["reference"]) <= EXACT


@every_backend
@pytest.mark.parametrize("case", [Case(mode="train"), Case(mode="ragged"), Case(inputs="raw", bn_groups=3)], ids=str)
def test_inputs_are_unchanged_and_runs_are_bitwise_equal(case: Case, backend: str) -> None:
    call = parity.make_call(case).map(lambda v: v.float())
    before = call.map(lambda v: v.clone())
    first, second = parity.run(case, call, backend), parity.run(case, call, backend)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert torch.equal(call.x, before.x)
    assert torch.equal(call.d_features, before.d_features)
    for name in call.weights:
        assert torch.equal(call.weights[name], before.weights[name]), name


@native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case((9, 3, 70, 9, 8), hidden=70, spatial_hidden=9, bn_groups=3),  # one task per clip in all three runs
        Case((5, 4, 600, 4, 4), hidden=66, inputs="raw"),  # one task per clip on one or two threads
        Case((10, 4, 15, 5, 2), hidden=63, spatial_hidden=17),  # BLAS would sum in another order
        Case((1, 4, 520, 8, 8), hidden=66, mode="continued", attention="channel"),
        Case((4, 4, 70, 5, 5), inputs="appearance", mode="ragged", attention="spatial"),
    ],
    ids=str,
)
def test_results_are_bitwise_equal_for_any_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    call = parity.make_call(case, dtype).map(lambda v: v.to(dtype))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(parity.run(case, call, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


@native
def test_bfloat16_needs_no_onednn() -> None:
    case = Case((3, 3, 70, 4, 4), hidden=16)
    call = parity.make_call(case, torch.bfloat16).map(lambda v: v.to(torch.bfloat16))
    oracle = parity.run(case, call.map(lambda v: v.double()), "reference")
    parity.run(case, call, "cpu")
    with torch.backends.mkldnn.flags(enabled=False):
        for name, value in parity.run(case, call, "cpu").items():
            assert relative_error(value, oracle[name]) <= 20 * torch.finfo(torch.bfloat16).eps, name


@every_backend
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_reach_outputs_and_gradients(
    value: float, dtype: torch.dtype, mode: str, backend: str
) -> None:
    case = Case((4, 4, 6, 3, 2), mode=mode)
    call = parity.make_call(case).map(lambda v: v.to(dtype))
    call.x[1, 1, 2, 1, 1] = value
    got, reference = parity.run(case, call, backend), parity.run(case, call, "reference")
    if value != value:  # the order of products decides which differences of infinities are NaN
        assert torch.equal(got["features"].isnan(), reference["features"].isnan())
        assert torch.equal(got["strips"].isnan(), reference["strips"].isnan())
    for name in ("features", "strips", "d_x", "d_w", "d_w_c"):
        assert not got[name].isfinite().all(), name


@every_backend
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training: bool, backend: str) -> None:
    call = parity.make_call(Case((2, 3, 3, 2, 1), hidden=2, spatial_hidden=2))
    names = list(call.weights)

    def f(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = (buffer.clone() for buffer in call.buffers)
        named = dict(zip(names, weights, strict=True))
        return rru_fast.refine(
            x, **named, running_mean=mean, running_var=var, training=training, eps=0.1, backend=backend
        )[:2]

    leaves = [v.requires_grad_() for v in (call.x, *call.weights.values())]
    assert torch.autograd.gradcheck(f, leaves, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=backend not in parity.COMPILED)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_video_in_chunks_equals_the_whole_video(dtype: torch.dtype, backend: str) -> None:
    case = Case((2, 9, 6, 3, 2), mode="eval")
    call = parity.make_call(case).map(lambda v: v.to(dtype))
    mean, var = call.buffers

    def refine(x: Tensor, state: State | None = None) -> rru_fast.Refined:
        return rru_fast.refine(x, **call.weights, running_mean=mean, running_var=var, state=state, backend=backend)

    whole = refine(call.x)
    parts, state = [], None
    for chunk in call.x.split((1, 4, 1, 3), 1):
        out = refine(chunk, state)
        parts.append(out.features)
        state = out.state
    assert state is not None
    allowed = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: torch.finfo(torch.bfloat16).eps}[dtype]
    assert relative_error(torch.cat(parts, 1), whole.features) <= allowed
    assert whole.state is not None
    assert relative_error(state.s, whole.state.s) <= allowed


@every_backend
def test_gradients_flow_through_chunks(backend: str) -> None:
    call = parity.make_call(Case((2, 6, 5, 2, 2), mode="eval"))
    mean, var = call.buffers
    x = call.x.requires_grad_()
    arguments = dict(call.weights, running_mean=mean, running_var=var, backend=backend)
    (wanted,) = torch.autograd.grad(rru_fast.refine(x, **arguments).features[:, -1].square().sum(), x)
    first = rru_fast.refine(x[:, :2], **arguments)
    second = rru_fast.refine(x[:, 2:], **arguments, state=first.state)
    (got,) = torch.autograd.grad(second.features[:, -1].square().sum(), x)
    assert relative_error(got, wanted) <= EXACT


@pytest.mark.parametrize("backend", ["reference", *parity.BACKENDS])
def test_frames_past_a_clips_length_are_ignored(backend: str) -> None:
    case = Case(mode="ragged")
    call = parity.make_call(case)
    call.lengths = torch.tensor([4, 2, 1])
    wanted = parity.run(case, call, backend)
    past = torch.arange(case.shape[1]) >= call.lengths[:, None]
    call.x = call.x.masked_fill(past[:, :, None, None, None], float("nan"))
    got = parity.run(case, call, backend)
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name
    alone = parity.make_call(case)
    single = rru_fast.refine(
        alone.x[1:2, :2], **alone.weights, running_mean=alone.buffers[0], running_var=alone.buffers[1], backend=backend
    )
    assert relative_error(got["strips"][1:2], single.strips) <= EXACT
    assert got["features"][1, 2:].abs().max() == 0


@every_backend
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16], ids=str
)
def test_the_integer_dtype_of_lengths_does_not_change_results(dtype: torch.dtype, backend: str) -> None:
    case = Case(mode="ragged")
    call = parity.make_call(case)
    wanted = parity.run(case, call, backend)
    assert call.lengths is not None
    call.lengths = call.lengths.to(dtype)
    for name in (backend, "reference"):
        got = parity.run(case, call, name)
        for key in ("features", "strips", "next_x", "next_s"):
            assert relative_error(got[key], wanted[key]) <= EXACT, key


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_state_is_a_copy(backend: str) -> None:
    call = parity.make_call(Case((2, 6, 5, 2, 2), mode="eval"))
    arguments = dict(call.weights, running_mean=call.buffers[0], running_var=call.buffers[1], backend=backend)
    wanted = rru_fast.refine(call.x, **arguments).features[:, 3:]
    buffer = call.x[:, :3].clone()
    with torch.inference_mode():
        state = rru_fast.refine(buffer, **arguments).state
    buffer.copy_(call.x[:, 3:])
    call.weights["w"].requires_grad_()
    assert relative_error(rru_fast.refine(buffer, **arguments, state=state).features, wanted) <= EXACT
    assert state is not None
    assert state.x.untyped_storage().nbytes() == state.x.nbytes


@pytest.mark.parametrize("inputs", ["appearance+motion", "raw"])
def test_the_block_size_over_time_does_not_change_results(inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((3, 8, 6, 3, 2), inputs=inputs)
    call = parity.make_call(case)
    whole = parity.run(case, call, "composite")
    monkeypatch.setattr(ops.refine.KERNELS["composite"], "PROJECTION_BYTES", 3 * 3 * 6 * 6 * 8)  # three frames
    for name, value in parity.run(case, call, "composite").items():
        assert relative_error(value, whole[name]) <= EXACT, name


@pytest.mark.parametrize("backend", parity.COMPILED)
def test_memory_saved_at_the_papers_shape_is_bounded(backend: str) -> None:
    module = rru_fast.RRU(2048, backend=backend)
    x = torch.rand(20, 8, 2048, 8, 8)
    known = {v.untyped_storage().data_ptr() for v in (x, *module.parameters())}
    saved: dict[int, int] = {}

    def note(v: Tensor) -> Tensor:
        saved[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(note, lambda v: v):
        out = module(x)
    known.add(out.features.untyped_storage().data_ptr())
    saved_bytes = sum(size for pointer, size in saved.items() if pointer not in known)
    assert 9 * 2**20 < saved_bytes <= 16 * 2**20  # U alone is 9.2 million bytes
