"""Training on the CUDA backend: which calls can be launched and how, the layouts that it reads, and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rru_fast import backends
from rru_fast.testing import assert_parity, relative_error
from tests import parity
from tests.cuda.test_backend import FALLBACK, UNIT, emulated, in_another_process, needs_kernels
from tests.parity import Case

PAPER = {"clips": 20, "channels": 2048, "height": 8, "width": 8, "d": 256, "num_attn": 128, "groups": 1}
"""The paper's shape."""
PRECISIONS = {"tf32": (torch.float32, "tf32"), "bf16": (torch.bfloat16, "ieee"), "f16": (torch.float16, "ieee")}


def plan(operands: str, backward: bool, **sizes: int) -> tuple[str, list[int]]:
    dtype, precision = {**PRECISIONS, "tf32x3": (torch.float32, "tf32x3"), "fp32": (torch.float32, "ieee")}[operands]
    of = {**PAPER, **sizes}
    x = torch.empty(of["clips"], 2, of["channels"], of["height"], of["width"], dtype=dtype)
    w_c = torch.empty(of["channels"], of["d"], dtype=dtype)
    lacks, launch = torch.ops.rru_fast.refine_cuda_training_plan(
        x, of["d"], of["num_attn"], w_c, of["groups"], precision, backward
    )
    return lacks, launch


@emulated
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("operands", [*PRECISIONS, "fp32"])
@pytest.mark.parametrize(
    ("sizes", "ctas", "channels", "launches"),
    [
        ({"clips": 1}, 16, 128, 1),
        ({"clips": 7}, 16, 128, 1),
        ({"clips": 8}, 8, 256, 1),
        ({"clips": 15}, 8, 256, 1),
        ({"clips": 16}, 4, 512, 1),
        ({}, 4, 512, 1),
        ({"clips": 30}, 4, 512, 1),
        ({"clips": 32, "groups": 4}, 8, 256, 4),  # 8 at once
        ({"clips": 20, "groups": 4}, 4, 512, 1),  # as the paper trained
        ({"clips": 64, "channels": 1024}, 2, 512, 1),
        ({"clips": 64, "channels": 512}, 2, 256, 1),
        ({"clips": 132, "channels": 512}, 1, 512, 1),
        ({"clips": 132, "channels": 128, "height": 4}, 1, 128, 1),
        ({"channels": 2000, "height": 7, "width": 7}, 4, 512, 1),
    ],
    ids=str,
)
def test_all_clips_are_on_the_chip_at_once(
    sizes: dict[str, int], ctas: int, channels: int, launches: int, operands: str, backward: bool
) -> None:
    """As many clusters as an H100 holds: the smallest share of channels a CTA of which all fit."""
    lacks, (found_ctas, threads, shared, multiple, found_launches) = plan(operands, backward, **sizes)
    assert (lacks, found_ctas, 128 * multiple, found_launches) == ("", ctas, channels, launches)
    assert threads == 256 and shared <= 232_448


@emulated
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("operands", "sizes", "why"),
    [
        ("tf32", {"clips": 31}, "B of 31, at most 30 clusters of 4 CTAs at once on this GPU"),
        ("bf16", {"clips": 64}, "B of 64, at most 30 clusters of 4 CTAs at once on this GPU"),
        ("bf16", {"clips": 64, "groups": 2}, "B of 64, at most 30 clusters of 4 CTAs at once on this GPU"),
        ("bf16", {"clips": 60, "groups": 5}, "B of 60, at most 30 clusters of 4 CTAs at once on this GPU"),
        ("tf32", {"channels": 2049}, "C of 2049, at most 2048"),
        ("tf32", {"height": 13, "width": 5}, "H * W of 65, at most 64"),
        ("tf32", {"d": 257}, "D of 257, at most 256"),
        ("tf32", {"num_attn": 129}, "A of 129, at most 128"),
        ("tf32x3", {}, "three TF32 products in training"),
    ],
    ids=str,
)
def test_what_cannot_be_launched_is_named(operands: str, sizes: dict[str, int], why: str, backward: bool) -> None:
    assert plan(operands, backward, **sizes)[0] == why


@needs_kernels
def test_more_clips_than_fit_run_elsewhere_with_one_warning() -> None:
    many = "x = torch.randn(8, 2, 256, 1, 1); unit = rru_fast.RRU(256, (1, 1), **{**sizes, 'hidden': 32})"
    # 8 clusters of 16 do not fit, 8 of 4 do.
    done = in_another_process(f"{UNIT}\n{many}\nunit(x).features.sum().backward(); print(backends.ran())")
    assert (done.stdout, "FallbackWarning" in done.stderr) == ("{'refine': ['cuda']}\n", False), done.stderr
    many = many.replace("8, 2,", "40, 2,")
    done = in_another_process(f"{UNIT}\n{many}\nunit(x).features.sum().backward(); print(backends.ran())")
    assert done.stdout == f"{{'refine': ['{FALLBACK}']}}\n"
    assert done.stderr.count("FallbackWarning") == 1, done.stderr
    assert "does not carry: B of 40, at most 30 clusters of 4 CTAs at once on this GPU" in done.stderr


@needs_kernels
def test_maps_that_can_be_read_16_bytes_at_a_time_are_not_copied() -> None:
    from rru_fast.cuda.refine.training import rows_of

    x = torch.randn(2, 4, 6, 4, 4)
    for maps in (x, x[:, ::2], x[1:], x[:, :, 1:3], x[:, :, :1], x.transpose(0, 1), x[:1, :1], x.bfloat16()):
        rows = rows_of(maps)
        assert rows.data_ptr() == maps.data_ptr() and torch.equal(rows, maps.flatten(3))
    channels_last = x.movedim(2, -1).contiguous().movedim(-1, 2)
    unaligned = torch.cat((torch.zeros(1), x.flatten()))[1:].view_as(x)
    for maps in (channels_last, unaligned, x.transpose(3, 4), x[..., 2:], x[..., :2]):
        rows = rows_of(maps)
        assert rows.data_ptr() % 16 == 0 and rows.is_contiguous() and torch.equal(rows, maps.flatten(3))
    padded = rows_of(x[..., :3])
    assert padded.shape == (2, 4, 6, 16) and torch.equal(padded[..., :12], x[..., :3].flatten(3))
    assert not padded[..., 12:].any()


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spatial", [(4, 4), (3, 3)], ids=str)
@pytest.mark.parametrize("layout", ["channels last", "frames last", "frames apart", "expanded gradient"])
def test_every_layout_gives_the_same_results(layout: str, spatial: tuple[int, int], dtype: torch.dtype) -> None:
    case = Case((3, 4, 20, *spatial), hidden=9, spatial_hidden=5)
    call = parity.make_call(case, dtype).map(lambda v: v.to(dtype))
    if layout == "expanded gradient":
        call = replace(call, d_features=call.d_features[:1, :1, :1].contiguous())
        changed = replace(call, d_features=call.d_features.expand_as(call.x))
        call = replace(call, d_features=changed.d_features.contiguous())
    elif layout == "channels last":
        changed = call.map(lambda v: v.movedim(2, -1).contiguous().movedim(-1, 2) if v.dim() == 5 else v)
    elif layout == "frames last":
        changed = call.map(lambda v: v.movedim(1, -1).contiguous().movedim(-1, 1) if v.dim() == 5 else v)
    else:
        changed = call.map(lambda v: torch.stack((v, v), 2)[:, :, 0] if v.dim() == 5 else v)
    wanted, got = parity.run(case, call, "cuda"), parity.run(case, changed, "cuda")
    for name in wanted:  # a product over another layout may round in another way
        assert relative_error(got[name], wanted[name]) <= 2 * torch.finfo(dtype).eps, name


@emulated
@pytest.mark.parametrize("frozen", [("x",), ("w", "gamma", "beta", "w_s1", "w_s2", "w_c")], ids=["x", "weights"])
def test_gradients_that_nobody_needs_change_no_other(frozen: tuple[str, ...]) -> None:
    case = Case((3, 4, 20, 3, 3), hidden=9, spatial_hidden=5)
    call = parity.make_call(case).map(lambda v: v.float())
    all_of_them, some = parity.run(case, call, "cuda"), parity.run(case, call, "cuda", frozen)
    assert set(all_of_them) - set(some) == {f"d_{name}" for name in frozen}
    for name, value in some.items():
        assert torch.equal(value, all_of_them[name]), name


@emulated
@pytest.mark.parametrize("inputs", ["appearance+motion", "appearance"])
def test_two_runs_are_bitwise_equal(inputs: str) -> None:
    case = Case((5, 4, 40, 3, 3), hidden=9, spatial_hidden=5, inputs=inputs)
    call = parity.make_call(case).map(lambda v: v.float())
    first, second = parity.run(case, call, "cuda"), parity.run(case, call, "cuda")
    assert all(torch.equal(first[name], second[name]) for name in first)


@emulated
def test_the_forward_of_one_backend_and_the_backward_of_another_agree() -> None:
    from rru_fast.arguments import RefineNeed, RefineUpstream
    from rru_fast.composite import refine as composite
    from rru_fast.cuda import refine

    case = Case((3, 4, 20, 3, 3), hidden=9, spatial_hidden=5)
    call = parity.make_call(case).map(lambda v: v.float())
    arguments = parity.operator_arguments(case, call)
    upstream, need = RefineUpstream(call.d_features, call.d_strips), RefineNeed(True, True)
    by_cuda, by_composite = refine.forward(arguments, True).saved, composite.forward(arguments, True).saved
    wanted = composite.backward(upstream, by_composite, arguments, need)
    for found in (
        refine.backward(upstream, by_composite, arguments, need),
        composite.backward(upstream, by_cuda, arguments, need),
    ):
        for name in ("x", "w", "gamma", "beta", "w_s1", "w_s2", "w_c"):
            assert relative_error(getattr(found, name), getattr(wanted, name)) < 2e-6, name


@emulated
@pytest.mark.parametrize(("precision", "least", "most"), [("ieee", 0, 1e-6), ("tf32", 1e-5, 3e-3)])
def test_every_precision_has_its_own_error(
    precision: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RRU_FAST_FLOAT32", precision)
    case = Case((2, 6, 60, 4, 4), hidden=20)
    call = parity.make_call(case, torch.float32)
    wanted, got = parity.run(case, call, "reference"), parity.run(case, call.map(lambda v: v.float()), "cuda")
    for name in ("features", "d_x"):
        assert least <= relative_error(got[name], wanted[name]) <= most, name


@emulated
def test_three_tf32_products_are_left_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RRU_FAST_FLOAT32", "tf32x3")
    call = parity.make_call(Case()).map(lambda v: v.float())
    backends.forget_runs()
    with pytest.warns(
        UserWarning, match=r"does not carry: three TF32 products \(RRU_FAST_FLOAT32=tf32x3\) in training"
    ):
        parity.run(Case(), call, "cuda")
    assert backends.ran() == {"refine": [FALLBACK]}


@emulated
def test_gradients_of_fp16_maps_beyond_fp16_do_not_overflow() -> None:
    case = Case((2, 4, 20, 4, 2), hidden=9)
    call = parity.make_call(case, torch.float16)
    call.weights["w"] *= 2**-12  # its norm is large, and with it dU; dX is not
    call.d_features *= 2000
    low = call.map(lambda v: v.to(torch.float16))
    low = replace(low, weights={name: weight.float() for name, weight in call.weights.items()})
    got, wanted = parity.run(case, low, "cuda"), parity.run(case, call, "reference")
    assert all(value.isfinite().all() for value in got.values())
    assert got["d_w"].abs().max() > 65504
    assert relative_error(got["d_x"], wanted["d_x"]) < 4e-3


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize(("clips", "channels"), [(1, 128), (8, 256), (16, 512)], ids=["16 CTAs", "8 CTAs", "4 CTAs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_papers_unit_is_right_at_its_real_size(dtype: torch.dtype, clips: int, channels: int) -> None:
    """Each share of 2048 channels a CTA, 256 threads of it, as on a GPU."""
    case = Case((clips, 2, 2048, 8, 8), hidden=256, spatial_hidden=128)
    call = parity.make_call(case, dtype)
    low: Any = call.map(lambda v: v.to(dtype))
    precision = "ieee"
    _, launch = torch.ops.rru_fast.refine_cuda_training_plan(low.x, 256, 128, low.weights["w_c"], 1, precision, True)
    assert 128 * launch[3] == channels
    backends.forget_runs()
    got = parity.run(case, low, "cuda")
    assert backends.ran() == {"refine": ["cuda"]}
    assert_parity([(got, parity.run(case, low, "reference"), parity.run(case, call, "reference"))])
