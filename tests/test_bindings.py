"""The C++ operators called directly, past Python's checks: a wrong argument raises one clear error, never crashes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from rru_fast import native
from rru_fast.arguments import (
    BatchHardArguments,
    BatchHardOutputs,
    BatchHardSaved,
    BatchHardUpstream,
    RefineArguments,
    RefineOutputs,
    RefineSaved,
    RefineUpstream,
)
from tests.helpers.valid_args import A, B, C, D, H, T, W, arguments

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="the C++ kernels are not built")

REFINE_OPTIONS = {
    "lengths": None,
    "state_x": None,
    "state_s": None,
    "inputs": "appearance+motion",
    "training": False,
    "eps": 1e-3,
    "bn_groups": 1,
    "process_group": "",
    "elements_per_rank": [],
}


def test_the_schemas_have_the_dataclasses_fields() -> None:
    schemas = {name: getattr(torch.ops.rru_fast, name).default._schema for name in OPERATORS}
    names = {name: [argument.name for argument in schema.arguments] for name, schema in schemas.items()}
    of_refine, of_batch_hard = names_of(RefineArguments), names_of(BatchHardArguments)
    assert names["refine"] == [*of_refine, "save", "backend"]
    assert names["refine_backward"] == [*names_of(RefineUpstream, RefineSaved), *of_refine, "need", "backend"]
    assert names["batch_hard"] == [*of_batch_hard, "reduction", "backend"]
    saved = names_of(BatchHardUpstream, BatchHardSaved)
    assert names["batch_hard_backward"] == [*saved, *of_batch_hard, "reduction", "need", "backend"]
    results = {name: [result.name for result in schema.returns] for name, schema in schemas.items()}
    assert results["refine"] == names_of(RefineOutputs)
    assert results["batch_hard"] == names_of(BatchHardOutputs)


OPERATORS = ("refine", "refine_backward", "batch_hard", "batch_hard_backward")


def names_of(*classes: type[Any]) -> list[str]:
    return [field.name for cls in classes for field in fields(cls)]


def refine_arguments(**changed: Any) -> dict[str, Any]:
    return arguments(**REFINE_OPTIONS | changed)


STATE = torch.randn(B, C, H, W)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.randn(B, T, C, H)}, ValueError, r"x: got shape \[2, 3, 4, 3\], wanted 5 dimensions"),
    ({"x": torch.randn(B, 0, C, H, W)}, ValueError, r"x: got shape .*, wanted 5 dimensions, every size at least 1"),
    ({"x": torch.ones(B, T, C, H, W, dtype=torch.int32)}, TypeError, "x: got dtype Int, wanted float64"),
    ({"w": torch.randn(D, C)}, ValueError, r"w: got shape \[5, 4\], wanted \[5, 8\]"),
    ({"gamma": torch.ones(D + 1)}, ValueError, r"gamma: got shape \[6\], wanted \[5\]"),
    ({"beta": torch.ones(1)}, ValueError, "beta: got shape"),
    ({"w_s2": None}, ValueError, "w_s1, w_s2: got one of them, wanted both"),
    ({"w_s1": torch.randn(A, 5)}, ValueError, r"w_s1: got shape \[3, 5\], wanted \[3, 6\]"),
    ({"w_s2": torch.randn(H * W, A + 1)}, ValueError, r"w_s2: got shape \[6, 4\], wanted \[6, 3\]"),
    ({"w_s1": None, "w_s2": None, "w_c": None}, ValueError, "w_s1, w_s2, w_c: got none, wanted"),
    ({"w_c": torch.randn(D, C)}, ValueError, r"w_c: got shape \[5, 4\], wanted \[4, 5\]"),
    ({"running_mean": None}, ValueError, "running_mean, running_var: got None in eval mode, wanted both"),
    ({"running_var": torch.ones(D - 1)}, ValueError, "running_var: got shape"),
    ({"inputs": "motion"}, ValueError, "inputs: got 'motion', wanted 'appearance[+]motion', 'appearance' or 'raw'"),
    ({"bn_groups": 3, "training": True}, ValueError, "bn_groups: got 3, wanted a divisor of the 2 clips"),
    ({"bn_groups": 0}, ValueError, "bn_groups: got 0, wanted"),
    (
        {"elements_per_rank": [4, 4]},
        ValueError,
        "process_group: got one with training=0, bn_groups=1, wanted batch statistics",
    ),
    (
        {"elements_per_rank": [4, 4], "bn_groups": 2, "training": True},
        ValueError,
        "process_group: got one with training=1, bn_gr",
    ),
    (
        {"elements_per_rank": [4, 0], "training": True},
        ValueError,
        r"elements_per_rank: got \[4, 0\], wanted at least 1 of every rank",
    ),
    (
        {"elements_per_rank": [4, 4], "training": True, "process_group": "x"},
        RuntimeError,
        "resolve the process group .*name x",
    ),
    ({"lengths": torch.tensor([1, 4])}, ValueError, "lengths: got 4, wanted 1 to T=3"),
    ({"lengths": torch.tensor([1, 0])}, ValueError, "lengths: got 0, wanted 1 to T=3"),
    ({"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths: got dtype Float, wanted Long"),
    ({"lengths": torch.tensor([1, 2]), "training": True}, ValueError, "lengths, state: got them with batch statistics"),
    ({"state_x": STATE}, ValueError, "state_x, state_s: got one of them, wanted both"),
    ({"state_x": STATE, "state_s": STATE.double()}, TypeError, "state_s: got dtype Double, wanted Float"),
    ({"state_x": STATE[:1], "state_s": STATE}, ValueError, "state_x: got shape"),
]


@pytest.mark.parametrize(("changed", "error", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_refine_names_what_does_not_fit(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        torch.ops.rru_fast.refine(**refine_arguments(**changed), save=True, backend="cpu")


@pytest.mark.parametrize("name", ["d_features", "d_strips", "features", "u", "z_s", "z_c", "h", "mean", "var"])
def test_refine_backward_names_what_does_not_fit(name: str) -> None:
    good = refine_arguments(training=True)
    features, strips, mean, var, u, z_s, z_c, h = torch.ops.rru_fast.refine(**good, save=True, backend="cpu")
    saved = {"features": features, "mean": mean, "var": var, "u": u, "z_s": z_s, "z_c": z_c, "h": h}
    call = {"d_features": features, "d_strips": strips, **saved, **good, "need": [True] * 9, "backend": "cpu"}
    torch.ops.rru_fast.refine_backward(**call)
    with pytest.raises(ValueError, match=f"{name}: got shape"):
        torch.ops.rru_fast.refine_backward(**call | {name: call[name][1:]})
    with pytest.raises(TypeError, match=f"{name}: got dtype Double, wanted Float"):
        torch.ops.rru_fast.refine_backward(**call | {name: call[name].double()})


BATCH_HARD_OPTIONS = {
    "gallery": None,
    "gallery_labels": None,
    "margin": 0.3,
    "soft": False,
    "metric": "euclidean",
    "reduction": "none",
    "backend": "cpu",
}


def batch_hard(**changed: Any) -> Any:
    good = {"features": torch.randn(2, 6, 3), "labels": torch.arange(6) // 2}
    return torch.ops.rru_fast.batch_hard(**good | BATCH_HARD_OPTIONS | changed)


def batch_hard_backward(**changed: Any) -> Any:
    inputs = {"features": torch.randn(2, 6, 3), "labels": torch.arange(6) // 2}
    loss, d_pos, d_neg, positive, negative = batch_hard(**inputs)
    good = {"d_loss": loss, "d_d_pos": d_pos, "d_d_neg": d_neg, "d_pos": d_pos, "d_neg": d_neg}
    good |= {"positive": positive, "negative": negative, **inputs, **BATCH_HARD_OPTIONS, "need": [True, False]}
    return torch.ops.rru_fast.batch_hard_backward(**good | changed)


GALLERY, GALLERY_LABELS = torch.randn(2, 4, 3), torch.arange(4) // 2
ONE_OF_TWO = "gallery, gallery_labels: got one of them, wanted both or neither"
OTHERS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: batch_hard(features=torch.randn(6)), ValueError, r"features: got shape \[6\], wanted 3 dimensions"),
    (lambda: batch_hard(labels=torch.arange(5)), ValueError, r"labels: got shape \[5\], wanted \[6\]"),
    (lambda: batch_hard(labels=torch.rand(6)), TypeError, "labels: got dtype Float, wanted an integer dtype"),
    (lambda: batch_hard(metric="taxi"), ValueError, "metric: got 'taxi', wanted 'euclidean' or 'cosine'"),
    (lambda: batch_hard(reduction="max"), ValueError, "reduction: got 'max', wanted 'mean', 'sum' or 'none'"),
    (lambda: batch_hard(gallery=GALLERY), ValueError, ONE_OF_TWO),
    (lambda: batch_hard(gallery_labels=GALLERY_LABELS), ValueError, ONE_OF_TWO),
    (
        lambda: batch_hard(gallery=GALLERY[:1], gallery_labels=GALLERY_LABELS),
        ValueError,
        r"gallery: got shape \[1, 4, 3\], wanted \[2, 4, 3\]",
    ),
    (
        lambda: batch_hard(gallery=GALLERY[0], gallery_labels=GALLERY_LABELS),
        ValueError,
        r"gallery: got shape \[4, 3\], wanted 3 dimensions",
    ),
    (
        lambda: batch_hard(gallery=GALLERY.double(), gallery_labels=GALLERY_LABELS),
        TypeError,
        "gallery: got dtype Double, wanted Float",
    ),
    (
        lambda: batch_hard(gallery=GALLERY, gallery_labels=torch.arange(5)),
        ValueError,
        r"gallery_labels: got shape \[5\], wanted \[4\]",
    ),
    (lambda: batch_hard_backward(features=torch.randn(6)), ValueError, r"features: got shape \[6\], wanted 3 dim"),
    (lambda: batch_hard_backward(labels=torch.arange(5)), ValueError, r"labels: got shape \[5\], wanted \[6\]"),
    (lambda: batch_hard_backward(metric="taxi"), ValueError, "metric: got 'taxi', wanted 'euclidean' or 'cosine'"),
    (lambda: batch_hard_backward(d_loss=torch.ones(1)), ValueError, r"d_loss: got shape \[1\], wanted \[2, 6\]"),
    (
        lambda: batch_hard_backward(reduction="mean"),
        ValueError,
        r"d_loss: got shape \[2, 6\], wanted \[\]",
    ),
    (lambda: batch_hard_backward(d_d_pos=torch.ones(6)), ValueError, r"d_d_pos: got shape \[6\], wanted \[2, 6\]"),
    (lambda: batch_hard_backward(need=[True]), ValueError, "need: got 1 values, wanted 2, one per gradient"),
    (lambda: batch_hard_backward(positive=torch.full((2, 6), 6)), IndexError, "positive: got index 6, wanted -1 to 5"),
    (lambda: batch_hard_backward(negative=torch.full((2, 6), -2)), IndexError, "negative: got index -2, wanted"),
    (
        lambda: batch_hard_backward(gallery=GALLERY, gallery_labels=GALLERY_LABELS, positive=torch.full((2, 6), 4)),
        IndexError,
        "positive: got index 4, wanted -1 to 3",
    ),
    (
        lambda: torch.ops.rru_fast.strip_pool(torch.randn(3), "cpu"),
        ValueError,
        r"s: got shape \[3\], wanted 5 dimensions",
    ),
    (
        lambda: torch.ops.rru_fast.strip_pool_backward(torch.randn(2, 3, 4), [2, 0, 3, 4, 2], "cpu"),
        ValueError,
        r"s_sizes: got \[2, 0, 3, 4, 2\], wanted \(B, T, C, H, W\), T and W at least 1",
    ),
    (
        lambda: torch.ops.rru_fast.strip_pool_backward(torch.randn(2, 3, 4), [2, 5, 3, 6, 2], "cpu"),
        ValueError,
        r"d_strips: got shape \[2, 3, 4\], wanted \[2, 3, 6\]",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), OTHERS, ids=[message[:40] for _, _, message in OTHERS])
def test_the_other_operators_name_what_does_not_fit(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_build_info_describes_the_build() -> None:
    from rru_fast import _C  # type: ignore[attr-defined]

    info = _C.build_info()
    assert info["torch"] == torch.__version__
    assert info["simd_here"] in info["simd"]
    assert "-std=c++20" in info["flags"]
    assert info["compiler"]
    assert info["cuda_architectures"] == native.cuda_architectures()
    assert info["emulation"] is True  # in a checkout


def test_the_module_leaves_the_lock_of_a_free_threaded_python_off() -> None:
    # Only such a Python's headers compile the declaration; `tests/test_endurance.py` calls the kernels in four threads.
    source = (Path(__file__).parents[1] / "csrc/bindings.cpp").read_text()
    assert "PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used())" in source
