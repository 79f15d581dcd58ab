"""`batch_hard_triplet` of every backend against the float64 oracle and against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rru_fast
from benchmarks.measure import peak_bytes
from rru_fast import ops, triton
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
    (gradient,) = torch.autograd.grad((loss * weight).sum(), leaf)
    return {"loss": loss.detach(), "d_features": gradient, "positive": positive, "negative": negative}


def by_definition(f: Tensor, labels: Tensor, margin: float) -> tuple[list[float], list[int], list[int]]:
    """Eq. 8 for one group, an anchor at a time, ties to the lowest index."""
    losses, positives, negatives = [], [], []
    for a in range(len(f)):
        distance = [max(float((f[a] - f[b]).square().sum()), 1e-12) ** 0.5 for b in range(len(f))]
        same = [bool(labels[a] == labels[b]) for b in range(len(f))]
        positive = max((b for b in range(len(f)) if same[b]), key=lambda b: (distance[b], -b))
        others = [b for b in range(len(f)) if not same[b]]
        negative = min(others, key=lambda b: (distance[b], b)) if others else -1
        losses.append(max(0.0, margin + distance[positive] - distance[negative]) if others else 0.0)
        positives.append(positive)
        negatives.append(negative)
    return losses, positives, negatives


@every_backend
def test_where_distances_overflow_partners_are_still_of_the_right_people(backend: str) -> None:
    far = run(torch.tensor([[0.0], [1.0], [1e20]]), torch.tensor([0, 0, 1]), backend, reduction="none")
    assert far["loss"][:2].tolist() == [0.0, 0.0] and far["loss"][2].isnan()
    assert far["positive"][:2].tolist() == [1, 0] and far["negative"][:2].tolist() == [2, 2]
    features = torch.tensor([[0.0, 0.0], [1.0, 1.5e19], [3.0, 1.5e19], [2.0, 0.0]])
    assert run(features, torch.tensor([0, 1, 2, 0]), backend)["positive"].tolist() == [3, 1, 2, 0]


@every_backend
@pytest.mark.parametrize("others", [(0.0, 1.0), (-1.0, 1.0), (-2.0, -1.0)], ids=str)
def test_an_infinite_feature_leaves_no_loss_a_number(others: tuple[float, float], backend: str) -> None:
    features = torch.tensor([*others, float("inf")])[:, None]
    assert run(features, torch.tensor([0, 0, 1]), backend, reduction="none")["loss"].isnan().all()


@every_backend
@pytest.mark.parametrize(
    ("margin", "reduction"),
    [  # the mean is taken of what any margin gives
        pytest.param(margin, reduction, marks=pytest.mark.exhaustive if reduction == "mean" and margin != 0.3 else ())
        for margin in MARGINS
        for reduction in ("mean", "none")
    ],
)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_equals_the_oracle(
    shape: tuple[int, ...], margin: Any, metric: str, reduction: str, backend: str
) -> None:
    features, labels = random_batch(shape)
    options = {"margin": margin, "metric": metric, "reduction": reduction}
    with parity.poisoned():
        got = run(features, labels, backend, **options)
    oracle = run(features, labels, "reference", **options)
    assert torch.equal(got.pop("positive"), oracle.pop("positive"))
    assert torch.equal(got.pop("negative"), oracle.pop("negative"))
    for name, wanted in oracle.items():
        assert parity.error(got[name], wanted) <= parity.EXACT, name


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
    parity.assert_parity(draws, rounding=torch.finfo(dtype).eps)


def assert_hardest(features: Tensor, labels: Tensor, backend: str, first: int = 0) -> None:
    """The anchors' partners, from the first on, are as far and as near as any, by the differences in float64."""
    _, positive, negative = rru_fast.batch_hard_triplet(features, labels, return_indices=True, backend=backend)
    d2 = (features.double()[:, None] - features.double()).square().sum(-1)
    same = labels[:, None] == labels
    hardest = d2.masked_fill(~same, 0).amax(1), d2.masked_fill(same, float("inf")).amin(1)
    for partner, wanted in zip((positive, negative), hardest, strict=True):
        found = d2.gather(1, partner[:, None])[:, 0]
        torch.testing.assert_close(found[first:], wanted[first:], rtol=1e-6, atol=0)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("outlier", [0.0, 100.0])
@pytest.mark.parametrize("own", [1.0, 0.03, 0.001])
def test_partners_are_right_under_a_large_common_vector(
    own: float, outlier: float, dtype: torch.dtype, backend: str
) -> None:
    if dtype == torch.float16 and (backend == "reference" or own == 0.001):
        pytest.skip("computes in float16; or float16 holds nothing but the common vector")
    n = 128 if backend in parity.COMPILED else 64
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        common = torch.randn(48, generator=g, dtype=torch.float64)
        features = (common + own * torch.randn(n, 48, generator=g, dtype=torch.float64)).to(dtype)
        features[0] += outlier
        labels = torch.arange(n) // 4
        assert_hardest(features, labels, backend)


@every_backend
@pytest.mark.parametrize("dark", [0.03, 0.001])
def test_partners_among_dark_clips_are_right_beside_those_of_others(dark: float, backend: str) -> None:
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        features = torch.randn(32, 256, generator=g).relu()
        features[4:12] = dark * torch.rand(8, 256, generator=g)
        assert_hardest(features, torch.arange(32) // 4, backend)


@every_backend
@pytest.mark.parametrize("own", [0.03, 0.001])
def test_a_blank_clip_does_not_hide_the_common_vector(own: float, backend: str) -> None:
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        features = torch.randn(48, generator=g) + own * torch.randn(64, 48, generator=g)
        features[:2] = 0
        assert_hardest(features, torch.arange(64) // 4, backend, first=2)


@every_backend
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_common_vector_has_no_share_in_the_gradient(metric: str, backend: str) -> None:
    features, labels = random_batch((2, 33, 24))
    features = (10 + 0.1 * features).float()
    got, oracle = (
        run(features, labels, backend, metric=metric),
        run(features.double(), labels, "reference", metric=metric),
    )
    in_dtype = run(features, labels, "reference", metric=metric)
    for name in ("loss", "d_features"):
        allowed = 2 * parity.error(in_dtype[name], oracle[name]) + torch.finfo(torch.float32).eps
        assert parity.error(got[name], oracle[name]) <= allowed, name
    if metric == "euclidean":
        assert parity.error(got["d_features"], oracle["d_features"]) <= 1e-5


@every_backend
@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=9),
    people=st.integers(1, 4),
    margin=st.sampled_from([0.0, 0.5, 3.0]),
    data=st.data(),
)
def test_small_integer_points_follow_the_definition_ties_included(
    backend: str, values: list[tuple[int, int]], people: int, margin: float, data: st.DataObject
) -> None:
    # Distances between integer points are exact, so ties are real ties.
    labels = torch.tensor(data.draw(st.lists(st.integers(1, people), min_size=len(values), max_size=len(values))))
    f = torch.tensor(values, dtype=torch.float32)
    loss, positive, negative = rru_fast.batch_hard_triplet(
        f, labels, margin=margin, reduction="none", return_indices=True, backend=backend
    )
    losses, positives, negatives = by_definition(f, labels, margin)
    assert positive.tolist() == positives
    assert negative.tolist() == negatives
    assert loss.tolist() == pytest.approx(losses, abs=3e-6)


@every_backend
def test_groups_are_independent_losses(backend: str) -> None:
    features, labels = random_batch((5, 12, 6))
    together = rru_fast.batch_hard_triplet(features, labels, backend=backend)
    apart = torch.stack([rru_fast.batch_hard_triplet(group, labels, backend=backend) for group in features])
    assert parity.error(together, apart.mean()) <= parity.EXACT


@every_backend
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_coincident_points_have_loss_and_no_gradient(metric: str, backend: str) -> None:
    features = torch.ones(6, 4, dtype=torch.float64)
    results = run(features, torch.tensor([0, 0, 1, 1, 2, 2]), backend, margin=0.5, metric=metric)
    assert float(results["loss"]) == pytest.approx(0.5, abs=1e-5)
    assert results["d_features"].abs().max() < 1e-12


@every_backend
def test_points_nearer_than_the_floor_have_its_distance_and_no_gradient(backend: str) -> None:
    features = torch.tensor([[0.0, 0.0], [3e-7, 0.0], [2e-6, 0.0], [1.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    options = {"margin": 1.0, "reduction": "none"}
    got, oracle = run(features, labels, backend, **options), run(features, labels, "reference", **options)
    assert float(got["loss"][0]) == pytest.approx(1 + 1e-6 - 2e-6, abs=1e-12)
    for name in ("loss", "d_features"):
        assert parity.error(got[name], oracle[name]) <= 1e-6, name  # the oracle's matrix form rounds at 1e-16 / 1e-6


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


def test_the_composites_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = random_batch((3, 50, 8))
    whole = run(features, labels, "composite")
    monkeypatch.setattr(ops.batch_hard.KERNELS["composite"], "TILE_BYTES", 3 * 50 * 8 * 7)  # seven anchors at a time
    for name, value in run(features, labels, "composite").items():
        assert parity.error(value, whole[name]) <= 1e-14, name


@default_backend_first
def test_extra_memory_grows_with_n_not_with_its_square(backend: str) -> None:
    n, d = 1024 if backend == "triton" and triton.interpreted() else 8192, 16
    features, labels = torch.randn(n, d), torch.arange(n) // 4
    peak = peak_bytes(lambda: rru_fast.batch_hard_triplet(features, labels, backend=backend), features.device)
    partners, matrix = 2 * labels.nbytes, 4 * n * n
    assert partners < peak < matrix / 6


@every_backend
def test_inputs_are_left_alone_and_runs_are_bitwise_equal(backend: str) -> None:
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
def test_threads_change_no_bit(dtype: torch.dtype, metric: str, shape: tuple[int, ...], backend: str) -> None:
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
def test_any_strides_give_the_same(dtype: torch.dtype, backend: str) -> None:
    features, labels = random_batch((4, 20, 6))
    features = features.to(dtype)
    layouts = {
        "strips": features.permute(1, 2, 0).contiguous().permute(2, 0, 1),  # how (B, C, H) strips arrive
        "every second": features.repeat_interleave(2, 2)[:, :, ::2],
        "cut from wider": torch.cat([features, features], 2)[:, :, :6],
        "groups last": features.transpose(0, 1).contiguous().transpose(0, 1),
    }
    wanted = run(features, labels, backend)
    for layout, same in layouts.items():
        assert torch.equal(same, features)
        for name, value in run(same, labels, backend).items():
            assert parity.error(value, wanted[name]) <= parity.EXACT, (layout, name)
    shared = features[:1].expand(4, -1, -1)
    for name, value in run(shared, labels, backend, reduction="none").items():
        alone = run(shared.clone(), labels, backend, reduction="none")
        assert parity.error(value, alone[name]) <= parity.EXACT, name


@every_backend
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_are_only_names(dtype: torch.dtype, backend: str) -> None:
    features, labels = random_batch((2, 40, 6))
    wanted = run(features, labels, backend)
    ends = torch.iinfo(dtype)
    names = torch.randperm(100)[: int(labels.max()) + 1] + ends.min  # negative where the dtype has that
    names[0] = ends.max
    for name, value in run(features, names.to(dtype)[labels], backend).items():
        assert torch.equal(value, wanted[name]), name


@native_backend
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 1e-40], ids=str)
@pytest.mark.parametrize("where", ["one number", "a feature", "everywhere"])
def test_values_beyond_the_ordinary_give_the_references_loss(
    where: str, value: float, metric: str, backend: str
) -> None:
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


@every_backend
def test_the_first_nan_is_the_partner_and_nan_the_gradient(backend: str) -> None:
    features, labels = random_batch((1, 100, 6))
    features[0, 50], features[0, 80] = float("nan"), float("nan")
    labels[50], labels[80] = 1, 2
    got, wanted = run(features, labels, backend), run(features, labels, "reference")
    assert torch.equal(got["positive"], wanted["positive"])
    assert torch.equal(got["negative"], wanted["negative"])
    assert {50, 80} == set(got["negative"][0, :50].tolist())
    assert got["d_features"].isnan().all()


@default_backend_first
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_opcheck(metric: str, backend: str) -> None:
    features, labels = random_batch((2, 10, 4))
    for requires_grad in (True, False):
        leaf = features.float().requires_grad_(requires_grad)
        torch.library.opcheck(ops.batch_hard.batch_hard, (leaf, labels, 0.3, False, metric, backend))
    loss, *saved = ops.batch_hard.batch_hard(features, labels, 0.3, False, metric, backend)
    inputs = (torch.ones_like(loss), features, *saved, 0.3, False, metric, backend)
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
        assert parity.error(compiled, eager) <= 1e-6


@every_backend
def test_second_order_gradients_raise(backend: str) -> None:
    features, labels = random_batch((10, 4))
    leaf = features.requires_grad_()
    loss = rru_fast.batch_hard_triplet(leaf, labels, margin=2.0, backend=backend)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order gradients are not implemented"):
        gradient.sum().backward()
