"""`batch_hard_triplet` of every backend against the fp64 oracle and the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rru_fast
from benchmarks.harness.measure import peak_bytes
from rru_fast import ops, triton
from rru_fast.testing import EXACT, assert_parity, gradients, poisoned_memory, relative_error
from tests import parity
from tests.parity import BACKENDS

every_backend = pytest.mark.parametrize("backend", BACKENDS)
default_backend_first = pytest.mark.parametrize("backend", parity.DEFAULT_FIRST)
native_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"])
MARGINS: list[Any] = [0.3, 2.0, 0.0, "soft"]
SHAPES = [(20, 16), (8, 20, 33), (1, 1, 5), (3, 7, 2), (2, 65, 3), (1, 131, 70)]


def random_batch(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    n = shape[-2]
    return torch.randn(shape, generator=g, dtype=torch.float64), torch.randint(0, max(1, n // 3), (n,), generator=g)


def run(features: Tensor, labels: Tensor, backend: str, **options: Any) -> parity.Results:
    leaf = features.detach().requires_grad_()
    out = rru_fast.batch_hard_triplet(leaf, labels, return_indices=True, backend=backend, **options)
    assert isinstance(out, tuple)
    loss, positive, negative = out
    weight = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).view(loss.shape).to(loss)
    found = gradients([loss], [weight], {"features": leaf})
    return {"loss": loss.detach(), **found, "positive": positive, "negative": negative}


@every_backend
@pytest.mark.parametrize("others", [(0.0, 1.0), (-1.0, 1.0), (-2.0, -1.0)], ids=str)
def test_an_infinite_feature_makes_every_loss_nan(others: tuple[float, float], backend: str) -> None:
    features = torch.tensor([*others, float("inf")])[:, None]
    assert run(features, torch.tensor([0, 0, 1]), backend, reduction="none")["loss"].isnan().all()


@every_backend
@pytest.mark.parametrize(
    ("margin", "reduction"),
    [  # the mean is taken of the same losses whatever the margin
        pytest.param(margin, reduction, marks=pytest.mark.exhaustive if reduction != "none" and margin != 0.3 else ())
        for margin in MARGINS
        for reduction in ("mean", "sum", "none")
    ],
)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_equals_the_oracle(
    shape: tuple[int, ...], margin: Any, metric: str, reduction: str, backend: str
) -> None:
    features, labels = random_batch(shape)
    options = {"margin": margin, "metric": metric, "reduction": reduction}
    with poisoned_memory():
        got = run(features, labels, backend, **options)
    oracle = run(features, labels, "reference", **options)
    assert torch.equal(got.pop("positive"), oracle.pop("positive"))
    assert torch.equal(got.pop("negative"), oracle.pop("negative"))
    for name, wanted in oracle.items():
        assert relative_error(got[name], wanted) <= EXACT, name


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("margin", "metric"),
    [
        (0.3, "euclidean"),
        ("soft", "cosine"),
        pytest.param(0.3, "cosine", marks=pytest.mark.exhaustive),
        pytest.param("soft", "euclidean", marks=pytest.mark.exhaustive),
    ],
)
def test_error_is_at_most_twice_the_references(margin: Any, metric: str, dtype: torch.dtype, backend: str) -> None:
    draws = []
    for seed in parity.draws(backend, 9):
        features, labels = random_batch((4, 40, 24) if backend in parity.COMPILED else (2, 33, 24), seed)
        low = features.to(dtype)
        options = {"margin": margin, "metric": metric}
        runs = run(low, labels, backend, **options), run(low, labels, "reference", **options)
        oracle = run(low.double(), labels, "reference", **options)
        results = [{name: r[name] for name in ("loss", "d_features")} for r in (*runs, oracle)]
        draws.append((results[0], results[1], results[2]))
    assert_parity(draws)


@every_backend
def test_groups_are_independent_losses(backend: str) -> None:
    features, labels = random_batch((5, 12, 6))
    together = rru_fast.batch_hard_triplet(features, labels, backend=backend)
    apart = torch.stack([rru_fast.batch_hard_triplet(group, labels, backend=backend) for group in features])
    assert relative_error(together, apart.mean()) <= EXACT


@every_backend
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_coincident_points_have_loss_and_no_gradient(metric: str, backend: str) -> None:
    features = torch.ones(6, 4, dtype=torch.float64)
    results = run(features, torch.tensor([0, 0, 1, 1, 2, 2]), backend, margin=0.5, metric=metric)
    assert float(results["loss"]) == pytest.approx(0.5, abs=1e-5)
    assert results["d_features"].abs().max() < 1e-12


@every_backend
def test_distances_below_the_floor_are_clamped_and_have_no_gradient(backend: str) -> None:
    features = torch.tensor([[0.0, 0.0], [3e-7, 0.0], [2e-6, 0.0], [1.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    options = {"margin": 1.0, "reduction": "none"}
    got, oracle = run(features, labels, backend, **options), run(features, labels, "reference", **options)
    assert float(got["loss"][0]) == pytest.approx(1 + 1e-6 - 2e-6, abs=1e-12)
    for name in ("loss", "d_features"):
        # The oracle takes squared distances from products, which round at 1e-16, against distances of 1e-6.
        assert relative_error(got[name], oracle[name]) <= 1e-6, name


@every_backend
def test_an_anchor_without_a_negative_has_no_loss(backend: str) -> None:
    features, _ = random_batch((9, 4))
    for margin in (1.0, "soft"):
        results = run(features, torch.zeros(9, dtype=torch.int64), backend, margin=margin, reduction="none")
        assert results["loss"].abs().max() == 0
        assert results["d_features"].abs().max() == 0
        assert (results["negative"] == -1).all()


@every_backend
def test_nan_features_give_a_nan_loss(backend: str) -> None:
    features, labels = random_batch((12, 4))
    features[3, 2] = float("nan")
    assert rru_fast.batch_hard_triplet(features, labels, backend=backend).isnan()


@every_backend
def test_gradcheck(backend: str) -> None:
    features, labels = random_batch((2, 9, 3))
    for margin in (0.7, "soft"):
        for metric in ("euclidean", "cosine"):
            assert torch.autograd.gradcheck(
                lambda f, margin=margin, metric=metric: rru_fast.batch_hard_triplet(
                    f, labels, margin=margin, metric=metric, reduction="none", backend=backend
                ),
                features.requires_grad_(),
                fast_mode=backend not in parity.COMPILED,
            )


def test_the_tile_size_of_the_composite_does_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = random_batch((3, 50, 8))
    whole = run(features, labels, "composite")
    monkeypatch.setattr(ops.batch_hard.KERNELS["composite"], "TILE_BYTES", 3 * 50 * 8 * 7)  # seven anchors at a time
    for name, value in run(features, labels, "composite").items():
        assert relative_error(value, whole[name]) <= 1e-14, name


@default_backend_first
def test_extra_memory_grows_with_n_not_with_its_square(backend: str) -> None:
    n, d = 1024 if backend == "triton" and triton.interpreted() else 8192, 16
    features, labels = torch.randn(n, d), torch.arange(n) // 4
    peak = peak_bytes(lambda: rru_fast.batch_hard_triplet(features, labels, backend=backend), features.device)
    partners, matrix = 2 * labels.nbytes, 4 * n * n
    assert partners < peak < matrix / 6


@every_backend
def test_inputs_are_unchanged_and_runs_are_bitwise_equal(backend: str) -> None:
    features, labels = random_batch((3, 300, 8))
    before = features.clone()
    first, second = run(features, labels, backend), run(features, labels, backend)
    assert torch.equal(features, before)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@native_backend
@pytest.mark.parametrize("shape", [(8, 20, 100), (2, 300, 70)], ids=str)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_results_are_bitwise_equal_for_any_number_of_threads(
    dtype: torch.dtype, metric: str, shape: tuple[int, ...], backend: str
) -> None:
    features, labels = random_batch(shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(run(features.to(dtype), labels, backend, metric=metric))
    finally:
        torch.set_num_threads(before)
    for name, alone in results[0].items():
        assert torch.equal(alone, results[1][name]), name
        assert torch.equal(alone, results[2][name]), name


@every_backend
@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.exhaustive), torch.bfloat16], ids=str
)
def test_strides_do_not_change_results(dtype: torch.dtype, backend: str) -> None:
    features, labels = random_batch((4, 20, 6))
    features = features.to(dtype)
    layouts = {
        "strips": features.permute(1, 2, 0).contiguous().permute(2, 0, 1),  # the layout of (B, C, H) strips
        "every second": features.repeat_interleave(2, 2)[:, :, ::2],
        "cut from wider": torch.cat([features, features], 2)[:, :, :6],
        "groups last": features.transpose(0, 1).contiguous().transpose(0, 1),
    }
    wanted = run(features, labels, backend)
    for layout, same in layouts.items():
        assert torch.equal(same, features)
        for name, value in run(same, labels, backend).items():
            assert relative_error(value, wanted[name]) <= EXACT, (layout, name)
    shared = features[:1].expand(4, -1, -1)
    for name, value in run(shared, labels, backend, reduction="none").items():
        alone = run(shared.clone(), labels, backend, reduction="none")
        assert relative_error(value, alone[name]) <= EXACT, name


@every_backend
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_only_the_equality_of_labels_matters(dtype: torch.dtype, backend: str) -> None:
    features, labels = random_batch((2, 40, 6))
    wanted = run(features, labels, backend)
    ends = torch.iinfo(dtype)
    names = torch.randperm(100)[: int(labels.max()) + 1] + ends.min  # negative if the dtype is signed
    names[0] = ends.max
    for name, value in run(features, names.to(dtype)[labels], backend).items():
        assert torch.equal(value, wanted[name]), name


@native_backend
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 1e-40], ids=str)
@pytest.mark.parametrize("where", ["one number", "a feature", "everywhere"])
def test_extreme_values_give_the_loss_of_the_reference(where: str, value: float, metric: str, backend: str) -> None:
    for seed in range(5):
        features, labels = random_batch((1, 70, 6), seed)
        features = features.float()
        if where == "one number":
            features[0, 33, 2] = value
        elif where == "a feature":
            features[0, 33] = value * features[0, 33].sign()
        else:
            features = value * features.sign()
        options = {"metric": metric, "reduction": "none"}
        got = rru_fast.batch_hard_triplet(features, labels, backend=backend, **options)
        wanted = rru_fast.batch_hard_triplet(features, labels, backend="reference", **options)
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


@default_backend_first
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_opcheck(metric: str, backend: str) -> None:
    features, labels = random_batch((2, 10, 4))
    for requires_grad in (True, False):
        leaf = features.float().requires_grad_(requires_grad)
        for reduction in ("none", "mean"):
            inputs = (leaf, labels, None, None, 0.3, False, metric, reduction, backend)
            torch.library.opcheck(ops.batch_hard.batch_hard, inputs)
    call = (features, labels, None, None, 0.3, False, metric, "none")
    loss, *saved = ops.batch_hard.batch_hard(*call, backend)
    ones = torch.ones_like(loss)
    for upstream in ((ones, None, None), (ones, ones, ones), (None, None, ones)):
        inputs = (*upstream, *saved, *call, [True, False], backend)
        torch.library.opcheck(ops.batch_hard.batch_hard_backward, inputs)


@default_backend_first
def test_compiled_without_a_graph_break_equals_eager(backend: str) -> None:
    loss = rru_fast.BatchHardTripletLoss(margin=0.4, backend=backend)
    features, labels = random_batch((4, 20, 8))
    results = []
    for f in (loss, torch.compile(loss, fullgraph=True)):
        leaf = features.float().requires_grad_()
        value = f(leaf, labels)
        value.backward()
        results.append((value, leaf.grad))
    for eager, compiled in zip(*results, strict=True):
        assert relative_error(compiled, eager) <= 1e-6


@every_backend
def test_second_order_gradients_raise(backend: str) -> None:
    features, labels = random_batch((10, 4))
    leaf = features.requires_grad_()
    loss = rru_fast.batch_hard_triplet(leaf, labels, margin=2.0, backend=backend)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order gradients are not implemented"):
        gradient.sum().backward()


@every_backend
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("used", [(0, 1, 2), (1,), (2,), (0, 2)], ids=str)
def test_distances_are_returned_with_their_gradients(used: tuple[int, ...], metric: str, backend: str) -> None:
    features, labels = random_batch((3, 17, 6))
    labels[-1] = 100  # alone: its positive is itself
    found = []
    for name in (backend, "reference"):
        leaf = features.clone().requires_grad_()
        out = rru_fast.batch_hard_triplet(leaf, labels, metric=metric, return_distances=True, backend=name)
        torch.manual_seed(1)
        sum((out[i] * torch.randn_like(out[i])).sum() for i in used).backward()
        found.append((*out, leaf.grad))
    for got, wanted in zip(*found, strict=True):
        assert relative_error(got, wanted) <= EXACT
    loss, d_pos, d_neg, gradient = (v.detach() for v in found[0])
    assert d_pos.shape == d_neg.shape == (3, 17)
    assert torch.allclose(loss, (0.3 + d_pos - d_neg).relu().mean(), rtol=1e-12)
    assert gradient.abs().max() > 0


@every_backend
def test_the_distance_to_no_negative_is_infinite_and_has_no_gradient(backend: str) -> None:
    features, _ = random_batch((9, 4))
    for metric in ("euclidean", "cosine"):
        leaf = features.clone().requires_grad_()
        options = {"metric": metric, "return_distances": True, "backend": backend}
        _, _, d_neg = rru_fast.batch_hard_triplet(leaf, torch.zeros(9, dtype=torch.int64), **options)
        d_neg.sum().backward()
        assert (d_neg == torch.inf).all()
        assert (leaf.grad == 0).all()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_that_is_returned_comes_in_order_and_in_the_features_dtype(dtype: torch.dtype, backend: str) -> None:
    features, labels = random_batch((2, 10, 4))
    both = {"return_distances": True, "return_indices": True}
    loss, d_pos, d_neg, positive, negative = rru_fast.batch_hard_triplet(
        features.to(dtype), labels, reduction="none", backend=backend, **both
    )
    assert loss.dtype == d_pos.dtype == d_neg.dtype == dtype
    assert positive.dtype == negative.dtype == torch.int64
    own = features.to(dtype).double()
    for distances, index in ((d_pos, positive), (d_neg, negative)):
        partners = own.gather(1, index[..., None].expand_as(own))
        assert torch.allclose(distances.double(), (own - partners).norm(dim=-1), rtol=2e-2, atol=1e-5)
