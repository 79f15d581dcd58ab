"""Kernel launches of the composite `batch_hard` on a GPU, and its mining of small batches by differences."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rru_fast.arguments import BatchHardArguments, BatchHardNeed, BatchHardUpstream
from rru_fast.composite import batch_hard
from tests.ops import test_batch_hard as claims
from tests.ops import test_batch_hard_cosine as cosines
from tests.ops import test_batch_hard_gallery as galleries
from tests.ops import test_batch_hard_partners as partners

N, D = 64, 256
FORWARD, BACKWARD = {"euclidean": 18, "cosine": 24}, {"euclidean": 13, "cosine": 28}
ALLOCATIONS = {"empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided"}


class Launches(TorchDispatchMode):
    """Record the names of the operators that compute a tensor on `device`; each launches at least one kernel.

    Views and allocations are left out. Operators of several kernels (index_put_, sort, an out-of-place masked_fill)
    count once.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.names = device, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").split(".")[0]
        first = out[0] if isinstance(out, tuple) else out
        computed = isinstance(first, Tensor) and first.device.type == self.device
        if computed and not func.is_view and func.namespace == "aten" and name not in ALLOCATIONS:
            self.names.append(name)
        return out


def launches_of_composite(
    metric: str = "euclidean", n: int = N, device: str = "cuda", soft: bool = False, m: int | None = None
) -> tuple[list[str], list[str]]:
    """Operators of the composite forward and backward for fake features (1, n, D), and a gallery (1, m, D) if any."""
    with FakeTensorMode():

        def batch(n: int) -> tuple[Tensor, Tensor]:
            return torch.empty(1, n, D, device=device), torch.empty(n, dtype=torch.int64, device=device)

        gallery = (None, None) if m is None else batch(m)
        args = BatchHardArguments(*batch(n), *gallery, 0.3, soft, metric)
        with Launches(device) as forward:
            outputs = batch_hard.forward(args)
        upstream = BatchHardUpstream(torch.empty_like(outputs.loss), None, None)
        with Launches(device) as backward:
            batch_hard.backward(upstream, outputs.saved, args, BatchHardNeed(features=True, gallery=m is not None))
    return forward.names, backward.names


def eager(features: Tensor, labels: Tensor, metric: str) -> Tensor:
    """Loss per anchor in vectorized PyTorch, from one distance matrix."""
    if metric == "cosine":
        f = F.normalize(features)
        d = 1 - f @ f.t()
    else:
        square = features.square().sum(-1)
        d = (square[:, None] + square - 2 * features @ features.t()).clamp(min=1e-12).sqrt()
    same = labels[:, None] == labels
    d_pos = d.masked_fill(~same, float("-inf")).max(-1).values
    d_neg = d.masked_fill(same, float("inf")).min(-1).values
    return F.relu(0.3 + d_pos - d_neg)


def launches_of_eager(metric: str) -> tuple[list[str], list[str]]:
    """Operators of `eager` and of its backward by autograd, on the meta device: needs no GPU."""
    features = torch.empty(N, D, device="meta", requires_grad=True)
    with Launches("meta") as forward:
        loss = eager(features, torch.empty(N, dtype=torch.int64, device="meta"), metric)
    d_loss = torch.empty_like(loss)
    with Launches("meta") as backward:
        loss.backward(d_loss)
    return forward.names, backward.names


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_launches_of_a_small_batch_are_bounded(metric: str) -> None:
    for soft in (False, True):
        forward, backward = launches_of_composite(metric, soft=soft)
        assert len(forward) <= FORWARD[metric], forward
        assert len(backward) <= BACKWARD[metric] + soft, backward


@pytest.mark.parametrize(("metric", "bound"), [("euclidean", 0.75), ("cosine", 1.3)])
def test_launches_of_a_small_batch_are_bounded_by_those_of_eager(metric: str, bound: float) -> None:
    composite, eager_ = (sum(map(len, names)) for names in (launches_of_composite(metric), launches_of_eager(metric)))
    assert composite <= bound * eager_, (composite, eager_)


@pytest.mark.parametrize(("metric", "n", "bound"), [("cosine", 200, 62), ("euclidean", 200, 50)])
def test_launches_of_mining_by_products_are_bounded(metric: str, n: int, bound: int) -> None:
    forward, backward = launches_of_composite(metric, n)
    assert len(forward) + len(backward) <= bound, (forward, backward)


@pytest.mark.parametrize(("metric", "bound"), [("euclidean", 37), ("cosine", 64)])
def test_launches_with_a_gallery_are_bounded(metric: str, bound: int) -> None:
    forward, backward = launches_of_composite(metric, m=2 * N)
    assert len(forward) + len(backward) <= bound, (forward, backward)
    assert "_cdist_forward" in forward
    forward, _ = launches_of_composite(metric, m=1024 * N)
    assert "baddbmm" in forward


@pytest.mark.parametrize(
    ("metric", "n", "device", "product"),
    [
        ("euclidean", 128, "cuda", "_cdist_forward"),
        ("euclidean", 129, "cuda", "baddbmm"),
        ("cosine", 128, "cuda", "_cdist_forward"),
        ("cosine", 129, "cuda", "baddbmm"),
        ("euclidean", 64, "cpu", "baddbmm"),
    ],
)
def test_only_a_small_batch_on_a_gpu_is_mined_by_differences(metric: str, n: int, device: str, product: str) -> None:
    forward, _ = launches_of_composite(metric, n, device)
    assert [name for name in forward if name in ("_cdist_forward", "baddbmm", "bmm", "mm")] == [product]


CLAIMS = [
    *(
        partial(claims.test_float64_equals_the_oracle, shape, margin, metric, "none")
        for shape in claims.SHAPES
        for margin in claims.MARGINS
        for metric in ("euclidean", "cosine")
    ),
    *(
        partial(claims.test_error_is_at_most_twice_the_references, 0.3, metric, dtype)
        for metric in ("euclidean", "cosine")
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        partial(claims.test_an_infinite_feature_makes_every_loss_nan, others)
        for others in ((0.0, 1.0), (-1.0, 1.0), (-2.0, -1.0))
    ),
    claims.test_groups_are_independent_losses,
    partial(claims.test_coincident_points_have_loss_and_no_gradient, "euclidean"),
    claims.test_distances_below_the_floor_are_clamped_and_have_no_gradient,
    claims.test_an_anchor_without_a_negative_has_no_loss,
    claims.test_nan_features_give_a_nan_loss,
    claims.test_inputs_are_unchanged_and_runs_are_bitwise_equal,
    partial(claims.test_strides_do_not_change_results, torch.float64),
    partners.test_partners_have_the_right_identity_where_distances_overflow,
    *(
        partial(partners.test_partners_are_right_under_a_large_common_vector, own, 100.0, torch.float32)
        for own in (0.03, 0.001)
    ),
    partial(partners.test_partners_of_dark_clips_are_right_in_a_batch_with_bright_ones, 0.001),
    partial(partners.test_a_blank_clip_does_not_hide_the_common_vector, 0.001),
    partners.test_small_integer_points_match_the_definition_including_ties,
    partners.test_the_first_nan_is_the_partner_and_gradients_are_nan,
    *(
        partial(galleries.test_float64_equals_the_oracle, shape, m, metric, margin, "none")
        for shape, m in galleries.SHAPES
        for metric in galleries.METRICS
        for margin in (2.0, "soft")
    ),
    *(
        partial(galleries.test_numbers_that_are_not_finite_give_the_losses_and_partners_of_the_reference, value, metric)
        for value in (float("nan"), float("inf"))
        for metric in galleries.METRICS
    ),
    *(partial(galleries.test_features_under_other_labels_are_a_gallery, metric) for metric in galleries.METRICS),
    galleries.test_small_integer_points_match_the_definition_including_ties,
    *(
        partial(cosines.test_short_and_zero_vectors_have_distances_and_gradients_of_normalize, which, length, gallery)
        for which in ("one", "all")
        for length in (1e-14, 0.9e-12)  # a zero vector is as far from all others but for rounding: ties
        for gallery in (False, True)
    ),
    *(partial(cosines.test_a_vector_whose_norm_overflows_is_a_zero_vector, gallery) for gallery in (False, True)),
    partial(cosines.test_float32_distances_of_near_parallel_vectors_keep_their_digits, True, 1e-4),
    partial(cosines.test_float32_distances_of_near_parallel_vectors_keep_their_digits, False, 1e-4),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: getattr(claim, "func", claim).__name__)
def test_mining_by_differences_passes_the_tests_of_mining_by_products(
    claim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_hard, "by_differences", lambda anchors, candidates: True)
    claim(backend="composite")
