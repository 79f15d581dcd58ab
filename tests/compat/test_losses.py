"""Published batch-hard losses under accelerate: the same loss and gradients, called in every way that theirs are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rru_fast
from benchmarks.implementations import loss_modules, loss_objects
from benchmarks.implementations.losses import FORMS
from rru_fast.compat import loss_examples
from tests import parity
from tests.helpers.modules import PEOPLE, bound_backend, warnings_as
from tests.ranks import in_ranks


def batches(n: int = 12, d: int = 6) -> list[Tensor]:
    """Features of several sizes, of which some anchors of each are inactive at common margins."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for scale in (0.05, 0.5, 5.0):
        for apart in (0.0, 1.0, 3.0):
            centers = torch.randn(n // 3, d, generator=generator).double().repeat_interleave(3, 0)
            found.append(scale * (torch.randn(n, d, generator=generator).double() + apart * centers))
    return found


def results(call: Callable[..., Any], loss: Any, features: Tensor, labels: Tensor = PEOPLE) -> list[Tensor]:
    """The outputs and the gradient of their sum; a form that casts is run in float64."""
    leaf = features.clone().requires_grad_()
    with loss_examples.InFloat64():
        out = call(loss, leaf, labels)
    outputs = list(out) if isinstance(out, tuple) else [out]
    total = sum((v.sum() for v in outputs if isinstance(v, Tensor) and v.requires_grad), torch.zeros(()))
    return [torch.as_tensor(v).detach() for v in outputs] + [torch.autograd.grad(total, leaf)[0]]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted)
    for one, two in zip(got, wanted, strict=True):
        assert one.shape == two.shape
        assert torch.allclose(one.double(), two.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", parity.DEFAULT_FIRST)
@pytest.mark.parametrize("name", FORMS)
def test_a_published_loss_is_swapped_and_equals_itself(name: str, backend: str) -> None:
    form = FORMS[name]
    plain = form.make()
    with warnings_as("error"):
        fast = rru_fast.accelerate(form.make(), backend=backend)
        for features in batches():
            assert_same(results(form.call, fast, features), results(form.call, plain, features))
    assert bound_backend(fast) == backend
    assert vars(rru_fast.restore(fast)).keys() == vars(plain).keys()
    assert type(fast) is type(plain)


ZEROS = torch.where(PEOPLE > 1, PEOPLE.float(), torch.tensor([0.0, -0.0]).repeat(6))  # 0 of both signs, 2 and 3


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "labels",
    [PEOPLE / 4, PEOPLE > 1, PEOPLE[:, None], PEOPLE.int(), ZEROS],
    ids=["float", "bool", "column", "int32", "zeros of both signs"],
)
def test_labels_of_every_kind_give_what_they_give_there(name: str, labels: Tensor) -> None:
    form = FORMS[name]
    plain, fast = form.make(), rru_fast.accelerate(form.make())
    for features in batches()[:3]:
        found: list[Any] = []
        for loss in (plain, fast):
            try:
                found.append(results(form.call, loss, features, labels))
            except (RuntimeError, IndexError, TypeError, ValueError, AssertionError) as error:
                found.append(type(error))
        if isinstance(found[0], type):
            # Batches that many originals cannot reshape the operator serves.
            assert found[1] is found[0] or found[1][0].isfinite().all()
        else:
            assert_same(found[1], found[0])


NEW = ("mutual", "soft", "scale", "distances", "training_step")


def test_an_attribute_of_any_form_may_change() -> None:
    """Every attribute, of the loss and of what it holds, set to other values: the results stay the original's."""
    changes = 0
    for name in FORMS:
        form = FORMS[name]
        plain, fast = form.make(), rru_fast.accelerate(form.make())
        for path, value in [*paths(plain), *(((word,), 2.0) for word in NEW if not hasattr(plain, word))]:
            for other in others(value):
                losses = [copy.deepcopy(loss) for loss in (plain, fast)]
                found: list[Any] = []
                for loss in losses:
                    owner = loss
                    for step in path[:-1]:
                        owner = getattr(owner, step)
                    setattr(owner, path[-1], other)
                    try:
                        with warnings_as("ignore"):
                            found.append(results(form.call, loss, batches()[4]))
                    except Exception as error:  # whatever the original raises
                        found.append(type(error))
                changes += 1
                if isinstance(found[0], type) or isinstance(found[1], type):
                    assert found[0] is found[1], (name, path, other)
                else:
                    assert_same(found[1], found[0])
    assert changes > 500


def paths(loss: Any, above: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """The ways to the attributes of a loss, and their values."""
    swapped = {"forward", "_accelerated_from", "_replicate_for_data_parallel"}
    own = {key: value for key, value in vars(loss).items() if key not in vars(nn.Module()) and key not in swapped}
    own |= vars(loss).get("_modules", {})
    found = [((*above, key), value) for key, value in own.items()]
    for key, value in own.items():
        if isinstance(value, nn.Module) or type(value).__name__ == "SimpleNamespace":
            found += paths(value, (*above, key))
    return found


def others(value: Any) -> list[Any]:
    """Other values that an attribute might be given."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 0.5, 0.0, None]
    if isinstance(value, str):
        return ["cosine", "euclidean", "sum", "none", "batch_soft", "yes"]
    return [nn.SoftMarginLoss(), nn.MarginRankingLoss(0.9)] if isinstance(value, nn.Module) else [0.3, True]


CALLS: dict[str, tuple[Callable[[], Any], Callable[..., Any], str]] = {
    "another argument": (
        lambda: loss_objects.CentroidsTripletLoss(0.5, "euclidean"),
        lambda loss, f, y: loss(f, y, warmup_margin=True),
        "it is called with warmup_margin",
    ),
    "other features for the second": (
        lambda: loss_modules.CMNASTripletLoss(margin=0.4, feat_norm="no"),
        lambda loss, f, y: loss(f, f.flip(0), y),
        "it is called with a global_feat2 that is not its global_feat1",
    ),
    "keywords that it ignores": (
        loss_modules.MMTrackingTripletLoss,
        lambda loss, f, y: loss(f, y, epoch=3),
        "it is called with epoch",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_the_operator_does_not_serve_runs_the_original_with_a_warning(name: str) -> None:
    make, call, reason = CALLS[name]
    plain, fast = make(), rru_fast.accelerate(make())
    with pytest.warns(UserWarning, match=f"accelerate: {type(plain).__name__} runs its own forward, since {reason}$"):
        got = results(call, fast, batches()[4])
    assert_same(got, results(call, plain, batches()[4]))


class LabelsFirst(loss_objects.StrongBaselineTripletLoss):
    """A loss whose labels come first."""

    def __call__(self, labels: Tensor, embeddings: Tensor) -> Tensor:  # type: ignore[override]
        return super().__call__(embeddings, labels)[0]


def test_a_loss_whose_labels_come_first_is_swapped() -> None:
    plain, fast = LabelsFirst(0.3), rru_fast.accelerate(LabelsFirst(0.3))
    assert bound_backend(fast) == "auto"
    for call in (lambda loss, f, y: loss(y, f), lambda loss, f, y: loss(embeddings=f, labels=y)):
        for features in batches():
            assert_same(results(call, fast, features), results(call, plain, features))


def test_a_mask_selects_anchors_and_no_partners() -> None:
    plain, fast = (loss_objects.CentroidsTripletLoss(0.5, "euclidean") for _ in range(2))
    rru_fast.accelerate(fast)
    for mask in (torch.arange(12) % 4 != 0, torch.arange(12) == 5, torch.tensor([3, 1, 3])):
        with warnings_as("error"):
            got = results(lambda loss, f, y, m=mask: loss(f, y, mask=m), fast, batches()[4])
        assert_same(got, results(lambda loss, f, y, m=mask: loss(f, y, mask=m), plain, batches()[4]))


@pytest.mark.parametrize("name", ["strong-baseline", "MMT", "torchreid", "AP3D"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_loss_of_16_bit_features_has_the_dtype_that_it_has_there(name: str, dtype: torch.dtype) -> None:
    form = FORMS[name]
    plain, fast = form.make(), rru_fast.accelerate(form.make())
    for features in batches()[4:7]:
        low = features.to(dtype)
        own, got = (form.call(loss, low, PEOPLE) for loss in (plain, fast))
        oracle = form.call(plain, low.double(), PEOPLE)
        assert got.dtype == own.dtype
        error, limit = (got.double() - oracle).abs(), (own.double() - oracle).abs()
        assert error <= 2 * limit + torch.finfo(dtype).eps * oracle.abs().clamp(min=1e-3)


@pytest.mark.parametrize("name", ["Cross-Modal-Re-ID", "open-reid", "MMT"])
def test_ties_are_counted_as_there(name: str) -> None:
    form = FORMS[name]
    plain, fast = form.make(), rru_fast.accelerate(form.make())
    corners = torch.randint(0, 2, (12, 6), generator=torch.Generator().manual_seed(3)).double()
    for shift in (0.0, 0.5, 1.0):
        own, got = (loss(corners + shift, PEOPLE) for loss in (plain, fast))
        assert type(own[1]) is type(got[1])
        assert float(own[1]) == float(got[1])


class DefaultTripletLoss:
    """A loss that normalizes unless it is told not to."""

    def __init__(self) -> None:
        self.margin = 0.3

    def __call__(self, f: Tensor, y: Tensor, normalize_feature: bool = True) -> Tensor:
        f = f / (f.norm(dim=1, keepdim=True) + 1e-12) if normalize_feature else f
        return loss_objects.StrongBaselineTripletLoss(self.margin)(f, y)[0]


def test_a_flag_that_is_set_by_default_may_be_cleared() -> None:
    plain, fast = DefaultTripletLoss(), rru_fast.accelerate(DefaultTripletLoss())
    assert bound_backend(fast) == "auto"
    features = batches()[4]
    assert_same(*(results(lambda loss, f, y: loss(f, y), loss, features) for loss in (fast, plain)))
    with pytest.warns(UserWarning, match="runs its own forward, since it is called with normalize_feature"):
        got = results(lambda loss, f, y: loss(f, y, normalize_feature=False), fast, features)
    assert_same(got, results(lambda loss, f, y: loss(f, y, False), plain, features))


class NormalizedTripletLoss:
    """A loss that normalizes anyway, and again if it is told to."""

    def __init__(self) -> None:
        self.margin = 0.3

    def __call__(self, f: Tensor, y: Tensor, normalize_feature: bool = False) -> Tensor:
        f = nn.functional.normalize(nn.functional.normalize(f) if normalize_feature else f)
        return loss_objects.StrongBaselineTripletLoss(self.margin)(f, y)[0]


@pytest.mark.parametrize("flags", [{}, {"normalize_feature": False}, {"normalize_feature": True}], ids=str)
def test_a_flag_given_as_it_is_by_default_changes_nothing(flags: dict[str, bool]) -> None:
    plain, fast = NormalizedTripletLoss(), rru_fast.accelerate(NormalizedTripletLoss())
    features = batches()[4]
    with warnings_as("error"):
        got = results(lambda loss, f, y: loss(f, y, **flags), fast, features)
    assert_same(got, results(lambda loss, f, y: loss(f, y, **flags), plain, features))


@pytest.mark.parametrize("name", ["strong-baseline, soft", "MMT, soft"])
def test_soft_margins_are_exact_however_large_the_gap(name: str) -> None:
    form = FORMS[name]
    plain, fast = form.make(), rru_fast.accelerate(form.make())
    features = torch.zeros(12, 1, dtype=torch.float64)
    features[:, 0] = torch.arange(12.0) % 3 * 10.0005  # gaps of 10.0005 and 20.001, where PyTorch's softplus rounds
    assert_same(results(form.call, fast, features)[:1], results(form.call, plain, features)[:1])


class CastTripletLoss(nn.Module):
    """A loss that computes in float32 whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.margin = 0.3

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return loss_objects.StrongBaselineTripletLoss(self.margin)(inputs.float(), targets)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_loss_keeps_its_dtype(dtype: torch.dtype) -> None:
    plain, fast = CastTripletLoss(), rru_fast.accelerate(CastTripletLoss())
    features = batches()[4].to(dtype)
    own, got = plain(features, PEOPLE), fast(features, PEOPLE)
    assert got.dtype == own.dtype == torch.float32
    assert torch.allclose(got, own, rtol=1e-5)


def test_returned_distances_may_be_changed_in_place() -> None:
    fast = rru_fast.accelerate(loss_objects.StrongBaselineTripletLoss(0.3))
    leaf = batches()[4].requires_grad_()
    loss, dist_ap, dist_an = fast(leaf, PEOPLE)
    dist_ap.mul_(2), dist_an.zero_()
    (loss + dist_ap.mean()).backward()
    assert leaf.grad is not None and leaf.grad.abs().max() > 0


def gather_one(rank: int) -> dict[str, Any]:
    """Return results of Simple-CCReID's loss in a group of one rank."""
    form = FORMS["Simple-CCReID"]
    plain, fast = form.make(), rru_fast.accelerate(form.make())
    pairs = [[results(form.call, loss, features) for loss in (plain, fast)] for features in batches()]
    return {"backend": bound_backend(fast), "pairs": pairs}


def test_a_loss_that_gathers_is_swapped_in_a_group_of_one(tmp_path: Path) -> None:
    (found,) = in_ranks(1, tmp_path, gather_one)
    assert found["backend"] == "auto"
    for plain, fast in found["pairs"]:
        assert_same(fast, plain)
