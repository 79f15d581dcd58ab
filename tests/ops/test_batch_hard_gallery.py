"""`batch_hard_triplet` with a gallery, of every backend against the fp64 oracle and the definition."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

import rru_fast
from benchmarks.harness.measure import peak_bytes
from rru_fast import ops, triton
from rru_fast.testing import EXACT, assert_parity, poisoned_memory, relative_error
from tests import parity
from tests.ops.test_batch_hard import MARGINS, default_backend_first, every_backend, native_backend

INF, NAN = float("inf"), float("nan")
METRICS = ["euclidean", "cosine"]
# Of features, and M. More candidates than anchors, as many, fewer, one, and more than a kernel takes at a time.
SHAPES = [((20, 16), 33), ((8, 20, 33), 20), ((3, 12, 2), 5), ((2, 6, 3), 1), ((1, 1, 5), 7), ((2, 65, 70), 140)]


class Batch(NamedTuple):
    """Features with labels, and a gallery: that has none of the first label, and some of a label of its own."""

    features: Tensor
    labels: Tensor
    gallery: Tensor
    gallery_labels: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        return self._replace(features=self.features.to(dtype), gallery=self.gallery.to(dtype))


def random_batch(shape: tuple[int, ...] = (2, 17, 6), m: int = 29, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    n, identities = shape[-2], max(2, m // 4)
    features = torch.randn(shape, generator=g, dtype=torch.float64)
    gallery = torch.randn((*shape[:-2], m, shape[-1]), generator=g, dtype=torch.float64)
    labels = torch.randint(0, identities, (n,), generator=g)
    return Batch(features, labels, gallery, torch.randint(1, identities + 1, (m,), generator=g))


def run(batch: Batch, backend: str, needed: tuple[bool, bool] = (True, True), **options: Any) -> parity.Results:
    """Return loss, partners, distances and gradients, those of infinite distances left out."""
    features, gallery = (
        v.detach().requires_grad_(need) for v, need in zip((batch.features, batch.gallery), needed, strict=True)
    )
    flags = {"return_indices": True, "return_distances": True, "backend": backend}
    with torch.set_grad_enabled(any(needed)):
        loss, d_pos, d_neg, positive, negative = rru_fast.batch_hard_triplet(
            features, batch.labels, gallery=gallery, gallery_labels=batch.gallery_labels, **options, **flags
        )
    results = {"loss": loss.detach(), "positive": positive, "negative": negative}
    results |= {name: d.detach() for name, d in (("d_pos", d_pos), ("d_neg", d_neg))}
    if any(needed):
        weights = torch.linspace(0.5, 1.5, d_pos.numel(), dtype=torch.float64).view(d_pos.shape).to(loss)
        upstream = [weights if loss.dim() else weights.sum(), (2 * weights - 2).masked_fill(d_pos.isinf(), NAN)]
        upstream.append((1.3 - weights).masked_fill(d_neg.isinf(), NAN))  # no upstream reaches a missing partner
        torch.autograd.backward((loss, d_pos, d_neg), upstream)
    gradients = {"d_features": features.grad, "d_gallery": gallery.grad}
    return results | {name: gradient for name, gradient in gradients.items() if gradient is not None}


def assert_same(got: parity.Results, wanted: parity.Results, tolerance: float = EXACT) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].shape == value.shape, name
        if not value.is_floating_point():
            assert torch.equal(got[name], value), name
            continue
        assert torch.equal(got[name].isinf(), value.isinf()), name
        finite = (v.where(v.isfinite() | v.isnan(), 0) for v in (got[name], value))
        assert relative_error(*finite) <= tolerance, name


@every_backend
@pytest.mark.parametrize(
    ("margin", "reduction"),
    [
        pytest.param(margin, reduction, marks=pytest.mark.exhaustive if reduction != "none" and margin != 0.3 else ())
        for margin in MARGINS
        for reduction in ("mean", "sum", "none")
    ],
)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("shape", "m"), SHAPES, ids=str)
def test_float64_equals_the_oracle(
    shape: tuple[int, ...], m: int, metric: str, margin: Any, reduction: str, backend: str
) -> None:
    batch, options = random_batch(shape, m), {"margin": margin, "metric": metric, "reduction": reduction}
    with poisoned_memory():
        got = run(batch, backend, **options)
    oracle = run(batch, "reference", **options)
    assert_same(got, oracle)
    assert oracle["d_features"].any()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_error_is_at_most_twice_the_references(metric: str, dtype: torch.dtype, backend: str) -> None:
    draws = []
    for seed in parity.draws(backend, 9):
        batch = random_batch((2, 33, 24), 50, seed).to(dtype)
        in_double = batch.to(torch.float64)
        runs = run(batch, backend, metric=metric), run(batch, "reference", metric=metric)
        oracle = run(in_double, "reference", metric=metric)
        names = ("loss", "d_features", "d_gallery")
        results = [{name: r[name] for name in names} for r in (*runs, oracle)]
        assert all(runs[0][name].dtype == dtype for name in names)
        draws.append((results[0], results[1], results[2]))
    assert_parity(draws)


@every_backend
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("copied", [False, True])
def test_features_as_their_own_gallery_equal_no_gallery(copied: bool, metric: str, backend: str) -> None:
    features, labels, *_ = random_batch((3, 20, 6))
    leaf = features.clone().requires_grad_()
    options = {"return_indices": True, "return_distances": True, "metric": metric, "backend": backend}
    outputs = []
    for gallery in ({}, {"gallery": leaf.clone() if copied else leaf, "gallery_labels": labels}):
        out = rru_fast.batch_hard_triplet(leaf, labels, **gallery, **options)
        (gradient,) = torch.autograd.grad(out[0] + out[1].square().sum() - out[2].sum(), leaf)
        outputs.append((*out, gradient))
    for got, wanted in zip(*outputs, strict=True):
        assert relative_error(got, wanted) <= EXACT


@every_backend
@pytest.mark.parametrize("metric", METRICS)
def test_features_under_other_labels_are_a_gallery(metric: str, backend: str) -> None:
    features, labels, *_ = random_batch((3, 20, 6))
    options = {"metric": metric, "return_indices": True, "backend": backend}
    mined_in = {"gallery": features, "gallery_labels": labels + 100}
    loss, positive, negative = rru_fast.batch_hard_triplet(features, labels, **mined_in, **options)
    assert loss == 0 and (positive == -1).all() and torch.equal(negative[0], torch.arange(20))


@every_backend
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("margin", [5.0, "soft"])
def test_an_anchor_without_a_positive_or_a_negative_has_no_loss(margin: Any, metric: str, backend: str) -> None:
    batch = random_batch()
    for label, missing, distance in ((7, "negative", INF), (-1, "positive", -INF)):
        changed = batch._replace(labels=torch.full_like(batch.labels, 7))
        changed = changed._replace(gallery_labels=torch.full_like(batch.gallery_labels, label))
        found = run(changed, backend, margin=margin, metric=metric, reduction="none")
        assert not found["loss"].any()
        assert (found[missing] == -1).all()
        assert (found["d_neg" if missing == "negative" else "d_pos"] == distance).all()
        other = "positive" if missing == "negative" else "negative"
        assert (found[other] >= 0).all()
        assert found["d_features"].isfinite().all() and found["d_gallery"].isfinite().all()
        assert found["d_gallery"].any()  # of the distance that there is
        leaf, gallery = batch.features.clone().requires_grad_(), batch.gallery.clone().requires_grad_()
        with_gallery = {"gallery": gallery, "gallery_labels": changed.gallery_labels}
        loss = rru_fast.batch_hard_triplet(leaf, changed.labels, **with_gallery, margin=margin, backend=backend)
        loss.backward()
        assert not leaf.grad.any() and not gallery.grad.any()


@every_backend
@settings(max_examples=60, deadline=None)
@given(
    points=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12),
    identities=st.integers(1, 4),
    data=st.data(),
)
def test_small_integer_points_match_the_definition_including_ties(
    backend: str, points: list[tuple[int, int]], identities: int, data: st.DataObject
) -> None:
    # Distances between integer points are exact, so ties are real ties.
    y = data.draw(st.lists(st.integers(1, identities), min_size=len(points), max_size=len(points)))
    n = data.draw(st.integers(1, len(points) - 1))
    f, labels = torch.tensor(points, dtype=torch.float32), torch.tensor(y)
    found = run(Batch(f[:n], labels[:n], f[n:], labels[n:]), backend, reduction="none")
    for a in range(n):
        distance = [(f[a] - b).square().sum().clamp(min=1e-12).sqrt().item() for b in f[n:]]
        positives = [b for b in range(len(distance)) if y[n + b] == y[a]]
        negatives = [b for b in range(len(distance)) if y[n + b] != y[a]]
        positive = max(positives, key=lambda b: (distance[b], -b), default=-1)
        negative = min(negatives, key=lambda b: (distance[b], b), default=-1)
        assert (found["positive"][a], found["negative"][a]) == (positive, negative)
        loss = max(0.0, 0.3 + distance[positive] - distance[negative]) if min(positive, negative) >= 0 else 0.0
        assert float(found["loss"][a]) == pytest.approx(loss, abs=3e-6)


@every_backend
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_numbers_that_are_not_finite_give_the_losses_and_partners_of_the_reference(
    value: float, metric: str, backend: str
) -> None:
    for of in ("features", "gallery"):
        batch = random_batch((2, 17, 6), 29)
        getattr(batch, of)[1, 5, 2], getattr(batch, of)[1, 9] = value, value
        got, wanted = (run(batch, name, metric=metric, reduction="none") for name in (backend, "reference"))
        for name in ("positive", "negative"):
            assert torch.equal(got[name], wanted[name]), name
        assert torch.equal(got["loss"].isnan(), wanted["loss"].isnan())
        assert relative_error(got["loss"][0], wanted["loss"][0]) <= EXACT
        assert wanted["loss"][1].isnan().any()
        assert got["d_features"][0].isfinite().all() and got["d_gallery"][0].isfinite().all()


@every_backend
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_strides_do_not_change_results(dtype: torch.dtype, metric: str, backend: str) -> None:
    batch = random_batch((4, 20, 6), 15).to(dtype)
    layouts = {
        "groups last": lambda f: f.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "every second": lambda f: f.repeat_interleave(2, 2)[:, :, ::2],
        "cut from wider": lambda f: torch.cat([f, f], 2)[:, :, 6:],
    }
    wanted = run(batch, backend, metric=metric)
    for change in layouts.values():
        for names in (("features",), ("gallery",), ("features", "gallery")):
            changed = batch._replace(**{name: change(getattr(batch, name)) for name in names})
            assert_same(run(changed, backend, metric=metric), wanted)
    every_second = batch._replace(gallery_labels=batch.gallery_labels.repeat_interleave(2)[::2])
    assert_same(run(every_second, backend, metric=metric), wanted)
    shared = batch._replace(gallery=batch.gallery[:1].expand(4, -1, -1))
    alone = batch._replace(gallery=shared.gallery.clone())
    assert_same(run(shared, backend, metric=metric), run(alone, backend, metric=metric))


@every_backend
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("margin", [0.7, "soft"])
def test_gradcheck(margin: Any, metric: str, backend: str) -> None:
    features, labels, gallery, gallery_labels = random_batch((2, 7, 3), 9)

    def triplet(f: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        loss, d_pos, d_neg = rru_fast.batch_hard_triplet(
            f,
            labels,
            gallery=g,
            gallery_labels=gallery_labels,
            margin=margin,
            metric=metric,
            reduction="none",
            return_distances=True,
            backend=backend,
        )
        return loss, *(d.masked_fill(d.isinf(), 0) for d in (d_pos, d_neg))

    inputs = features.requires_grad_(), gallery.requires_grad_()
    assert torch.autograd.gradcheck(triplet, inputs, fast_mode=backend not in parity.COMPILED)


class Needs(TorchDispatchMode):
    """Record which gradients every call of the operator's backward is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.rru_fast.batch_hard_backward.default:
            *_, need, _backend = args
            self.seen.append(list(need))
        return func(*args, **(kwargs or {}))


@every_backend
@pytest.mark.parametrize("metric", METRICS)
def test_only_the_gradients_that_are_needed_are_computed(metric: str, backend: str) -> None:
    batch = random_batch()
    both = run(batch, backend, metric=metric)
    for needed, left_out in (((True, False), "d_gallery"), ((False, True), "d_features")):
        with Needs() as needs:
            found = run(batch, backend, needed, metric=metric)
        assert needs.seen == [list(needed)]
        assert_same(found, {name: value for name, value in both.items() if name != left_out}, 0)
    assert run(batch, backend, (False, False), metric=metric).keys() == both.keys() - {"d_features", "d_gallery"}


@default_backend_first
@pytest.mark.parametrize("metric", METRICS)
def test_extra_memory_grows_with_the_gallery_not_with_the_matrix(metric: str, backend: str) -> None:
    n, m, d = (512, 1024, 16) if backend == "triton" and triton.interpreted() else (4096, 16384, 16)
    features, gallery = torch.randn(n, d, requires_grad=True), torch.randn(m, d)

    def call() -> None:
        labels = {"labels": torch.arange(n) // 4, "gallery": gallery, "gallery_labels": torch.arange(m) // 8}
        rru_fast.batch_hard_triplet(features, **labels, metric=metric, backend=backend).backward()

    peak, matrix = peak_bytes(call, features.device), 4 * n * m
    assert 2 * 8 * n < peak < matrix / 4


@every_backend
def test_inputs_are_unchanged_and_runs_are_bitwise_equal(backend: str) -> None:
    batch = random_batch((3, 70, 8), 150).to(torch.float32)
    before = batch.features.clone(), batch.gallery.clone()
    assert_same(run(batch, backend), run(batch, backend), 0)
    assert torch.equal(batch.features, before[0]) and torch.equal(batch.gallery, before[1])


@native_backend
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_results_are_bitwise_equal_for_any_number_of_threads(dtype: torch.dtype, metric: str, backend: str) -> None:
    batch, before, results = random_batch((2, 90, 70), 300).to(dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(run(batch, backend, metric=metric))
    finally:
        torch.set_num_threads(before)
    assert_same(results[1], results[0], 0)
    assert_same(results[2], results[0], 0)


@every_backend
@pytest.mark.parametrize("dtypes", [("int32", "int64"), ("int64", "uint8"), ("int16", "int8"), ("uint16", "int32")])
def test_labels_of_different_dtypes_compare_by_value(dtypes: tuple[str, str], backend: str) -> None:
    batch = random_batch()
    own, other = (getattr(torch, name) for name in dtypes)
    wanted = run(batch, backend)
    got = run(batch._replace(labels=batch.labels.to(own), gallery_labels=batch.gallery_labels.to(other)), backend)
    assert_same(got, wanted, 0)
    for name in (backend, "reference"):
        unlike = batch._replace(
            labels=torch.full_like(batch.labels, 255).to(torch.uint8),
            gallery_labels=torch.full_like(batch.gallery_labels, -1).to(torch.int8),
        )
        assert (run(unlike, name)["positive"] == -1).all()


@every_backend
@pytest.mark.parametrize("own", [0.03, 0.001])
def test_partners_are_right_under_a_large_common_vector(own: float, backend: str) -> None:
    for seed in range(3):
        batch = random_batch((32, 48), 70, seed).to(torch.float32)
        common = torch.randn(48, generator=torch.Generator().manual_seed(seed))
        batch = batch._replace(features=common + own * batch.features, gallery=common + own * batch.gallery)
        got, oracle = run(batch, backend), run(batch.to(torch.float64), "reference")
        for name in ("positive", "negative"):
            assert torch.equal(got[name], oracle[name]), name
        assert relative_error(got["d_gallery"], oracle["d_gallery"]) <= 1e-4


@default_backend_first
@pytest.mark.parametrize("metric", METRICS)
def test_opcheck(metric: str, backend: str) -> None:
    batch = random_batch((2, 6, 4), 9).to(torch.float32)
    options = (0.3, False, metric, "mean", backend)
    for needed in ((True, True), (True, False), (False, True), (False, False)):
        leaves = (v.clone().requires_grad_(need) for v, need in zip((batch[0], batch[2]), needed, strict=True))
        features, gallery = leaves
        inputs = (features, batch.labels, gallery, batch.gallery_labels)
        torch.library.opcheck(ops.batch_hard.batch_hard, (*inputs, *options))
    loss, *saved = ops.batch_hard.batch_hard(*batch, *options)
    ones = torch.ones_like(saved[0])
    for upstream in ((loss, None, None), (loss, ones, ones), (None, ones, None)):
        for need in ([True, True], [True, False], [False, True]):
            inputs = (*upstream, *saved, *batch, *options[:-1], need, backend)
            torch.library.opcheck(ops.batch_hard.batch_hard_backward, inputs)


@default_backend_first
def test_compiled_without_a_graph_break_equals_eager(backend: str) -> None:
    loss = rru_fast.BatchHardTripletLoss(margin=0.4, return_distances=True, backend=backend)
    batch, results = random_batch((4, 20, 8), 13).to(torch.float32), []
    for f in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [v.clone().requires_grad_() for v in (batch.features, batch.gallery)]
        value, d_pos, d_neg = f(leaves[0], batch.labels, leaves[1], batch.gallery_labels)
        value.backward()
        results.append((value, d_pos.clamp(min=0), d_neg.clamp(max=99), *(leaf.grad for leaf in leaves)))
    for eager, compiled in zip(*results, strict=True):
        assert relative_error(compiled, eager) <= 1e-6


@every_backend
def test_vmap_over_either_or_both_equals_a_loop(backend: str) -> None:
    batch = random_batch((3, 6, 5), 8)

    def triplet(f: Tensor, g: Tensor) -> Tensor:
        options = {"gallery": g, "gallery_labels": batch.gallery_labels, "margin": 3.0, "backend": backend}
        return rru_fast.batch_hard_triplet(f, batch.labels, **options)

    for dims in ((0, 0), (0, None), (None, 0)):
        inputs = [v if dim == 0 else v[0] for v, dim in zip((batch.features, batch.gallery), dims, strict=True)]
        leaves = [v.clone().requires_grad_() for v in inputs]
        got = vmap(triplet, dims)(*leaves)
        wanted = torch.stack([triplet(*(v if v.dim() == 2 else v[i] for v in leaves)) for i in range(3)])
        assert relative_error(got, wanted) <= EXACT
        for gradients in zip(*(torch.autograd.grad(v.square().sum(), leaves) for v in (got, wanted)), strict=True):
            assert relative_error(*gradients) <= EXACT
