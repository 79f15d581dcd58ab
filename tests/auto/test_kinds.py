"""Kinds of calls, made of their keys."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rru_fast.auto import kinds
from rru_fast.auto.kinds import BatchHardKind, Kind, RefineKind, StripPoolKind

MAPS = torch.zeros(5, 3, 6, 4, 2)


def refine_kind(x: Tensor = MAPS, dtype: torch.dtype = torch.float32, **changes: object) -> RefineKind:
    options = {"inputs": "raw", "training": True, "gradients": False} | changes
    w, w_s1, w_c = (torch.zeros(shape, dtype=dtype) for shape in ((7, 12), (3, 8), (6, 7)))
    weights = {"w_s1": w_s1, "w_c": w_c} | {name: options.pop(name) for name in ("w_s1", "w_c") if name in options}
    return RefineKind.from_key(kinds.refine_key(x, w, **weights, **options))  # type: ignore[arg-type]


def strip_pool_kind(s: Tensor) -> StripPoolKind:
    return StripPoolKind.from_key(kinds.strip_pool_key(s.device, s.dtype, s.shape, s.stride(), True))


def batch_hard_kind(features: Tensor, gallery: Tensor | None = None) -> BatchHardKind:
    return BatchHardKind.from_key(kinds.batch_hard_key(features, gallery, "cosine", True))


def test_a_kind_holds_what_decides_the_speed_of_a_call() -> None:
    found = refine_kind()
    assert found == RefineKind(
        dtype="float32",
        gradients=False,
        layout="contiguous",
        weight_dtype="float32",
        precision="",
        training=True,
        inputs="raw",
        attention="both",
        clips=5,
        frames=3,
        channels=6,
        height=4,
        width=2,
        hidden=7,
        spatial_hidden=3,
    )
    assert str(found) == "refine, training, no gradients, float32, 5 x 3 x 6 x 4 x 2, D 7 A 3, raw"
    half = refine_kind(MAPS.bfloat16(), w_s1=None, training=False, gradients=True, graphed=True)
    assert (half.attention, half.spatial_hidden, half.weight_dtype) == ("channel", 0, "float32")
    assert str(half) == (
        "refine, eval, bfloat16 with float32 weights, 5 x 3 x 6 x 4 x 2, D 7, channel, raw, CUDA graph"
    )
    assert refine_kind(w_c=None).attention == "spatial"
    assert str(strip_pool_kind(MAPS.double())) == "strip_pool, float64, 5 x 3 x 6 x 4 x 2"
    features = torch.zeros(2, 9, 4)
    assert str(batch_hard_kind(features[0], torch.zeros(30, 4))) == "batch_hard, float32, 9 x 4 in 30, cosine"
    assert str(batch_hard_kind(features.mT.contiguous().mT)) == "batch_hard, float32, 2 x 9 x 4, cosine, strided"


def test_sizes_that_vary_are_rounded_up_to_powers_of_2() -> None:
    rounded = refine_kind().rounded()
    assert (rounded.clips, rounded.frames, rounded.channels, rounded.hidden) == (8, 4, 6, 7)
    assert rounded == refine_kind(torch.zeros(8, 4, 6, 4, 2)).rounded() == rounded.rounded()
    assert rounded != refine_kind(torch.zeros(9, 4, 6, 4, 2)).rounded()
    mined = batch_hard_kind(torch.zeros(2, 9, 4), torch.zeros(2, 30, 4)).rounded()
    assert (mined.groups, mined.anchors, mined.gallery, mined.columns) == (2, 16, 32, 4)
    assert batch_hard_kind(torch.zeros(9, 4)).rounded().gallery == 0


@pytest.mark.parametrize(
    ("maps", "layout"),
    [
        (MAPS, "contiguous"),
        (torch.zeros(5, 3, 1, 4, 2), "contiguous"),
        (torch.zeros(5, 3, 4, 2, 6).permute(0, 1, 4, 2, 3), "channels last"),
        (torch.zeros(15, 6, 4, 2).to(memory_format=torch.channels_last).view(5, 3, 6, 4, 2), "channels last"),
        (torch.zeros(5, 3, 6, 4, 3)[..., :2], "strided"),
        (torch.zeros(3, 5, 6, 4, 2).transpose(0, 1), "strided"),
    ],
)
def test_layouts(maps: Tensor, layout: str) -> None:
    assert strip_pool_kind(maps).layout == layout
    assert refine_kind(maps if maps.shape[2] == 6 else MAPS).layout == (layout if maps.shape[2] == 6 else "contiguous")


@pytest.mark.parametrize("op", ["conv", "matmul"])
def test_the_precision_is_that_of_pytorchs_settings(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = torch.backends.cudnn.conv if op == "conv" else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    monkeypatch.delenv("RRU_FAST_FLOAT32", raising=False)
    gpu = torch.device("cuda")
    try:
        for value in ("tf32", "ieee"):
            setting.fp32_precision = value
            assert kinds._setting(op) == value
    finally:
        setting.fp32_precision = before
    for value in ("tf32", "ieee"):
        assert kinds.product_precision(gpu, torch.float32, value) == value
        assert kinds.product_precision(gpu, torch.bfloat16, value) == value
        assert kinds.product_precision(gpu, torch.float64, value) == ""
        assert kinds.product_precision(torch.device("cpu"), torch.float32, value) == ""
    monkeypatch.setenv("RRU_FAST_FLOAT32", "tf32x3")
    assert kinds.product_precision(gpu, torch.float32, "none") == "ieee/tf32x3"


@pytest.mark.parametrize("kind", [refine_kind(), strip_pool_kind(MAPS), batch_hard_kind(torch.zeros(4, 3))])
def test_a_kind_is_read_back_as_written(kind: Kind) -> None:
    assert kinds.from_json(json.loads(json.dumps(kind.to_json()))) == kind
    for wrong in ({}, {"op": "none"}, {"op": kind.op}, {**kind.to_json(), "more": 1}):
        with pytest.raises((KeyError, TypeError)):
            kinds.from_json(wrong)


def test_kinds_of_one_category_differ_in_sizes_that_vary_alone() -> None:
    kind = refine_kind()
    assert replace(kind, clips=64, frames=1).category == kind.category
    for change in (
        {"channels": 512},
        {"spatial_hidden": 9},
        {"training": False},
        {"gradients": True},
        {"dtype": "float16"},
        {"layout": "strided"},
    ):
        assert replace(kind, **change).category != kind.category  # type: ignore[arg-type]


def test_a_forward_and_its_backward_share_a_key_whatever_their_strides_and_settings() -> None:
    w, w_c = torch.zeros(7, 12), torch.zeros(6, 7)
    keys = [kinds.refine_key(x, w, None, w_c, "raw", True, True) for x in (MAPS, MAPS.mT.contiguous().mT)]
    assert keys[0] != keys[1]
    assert kinds.across_passes(keys[0]) == kinds.across_passes(keys[1])
    other = kinds.refine_key(MAPS, w, None, w_c, "raw", False, True)
    assert kinds.across_passes(other) != kinds.across_passes(keys[0])
