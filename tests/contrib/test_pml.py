"""`rru_fast.contrib.pml` against pytorch-metric-learning's own miner and loss."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper
from torch import Tensor

from benchmarks.harness.measure import peak_bytes
from rru_fast.contrib.pml import BatchHardMiner, BatchHardTripletLoss
from rru_fast.testing import assert_parity, relative_error
from tests.helpers.modules import LABEL_KINDS
from tests.parity import BACKENDS
from tests.ranks import in_ranks

TIGHT = 1e-12
DISTANCES: dict[str, Callable[[], Any]] = {
    "normalized": distances.LpDistance,
    "euclidean": lambda: distances.LpDistance(normalize_embeddings=False),
    "cosine": distances.CosineSimilarity,
}
each_distance = pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)


class TripletMarginLoss(losses.TripletMarginLoss):  # type: ignore[misc]
    """pml's loss on the triplets of pml's miner, unless it is given some."""

    def compute_loss(self, embeddings: Any, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any) -> Any:
        if indices_tuple is None:
            miner = miners.BatchHardMiner(distance=self.distance)
            indices_tuple = miner(embeddings, labels, ref_emb, ref_labels)
        return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)


def batch(n: int = 20, dim: int = 7, labels: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw embeddings and labels; the last label occurs once."""
    g = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, dim, generator=g, dtype=torch.float64)
    y = torch.randint(0, labels - 1, (n,), generator=g)
    y[-1] = labels - 1
    return embeddings, y


def value_and_gradient(loss: Callable[[Tensor], Tensor], embeddings: Tensor) -> dict[str, Tensor]:
    leaf = embeddings.detach().requires_grad_()
    value = loss(leaf)
    value.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return {"loss": value.detach(), "gradient": leaf.grad}


def assert_equal(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], embeddings: Tensor
) -> dict[str, Tensor]:
    """Compare values and gradients of two losses; return those of the second."""
    got, wanted = value_and_gradient(ours, embeddings), value_and_gradient(theirs, embeddings)
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype
        assert relative_error(got[name], wanted[name]) <= TIGHT, name
    return wanted


def pair(**options: Any) -> tuple[Any, Any]:
    """Return our loss and pml's with the same options; `distance` is a function that makes one."""
    distance = options.pop("distance", distances.LpDistance)
    return (
        BatchHardTripletLoss(distance=distance(), **options),
        TripletMarginLoss(distance=distance(), **options),
    )


def test_the_library_does_not_import_pml() -> None:
    code = "import sys, rru_fast; sys.exit('pytorch_metric_learning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_import_without_pml_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    monkeypatch.delitem(sys.modules, "rru_fast.contrib.pml")
    message = (
        "^rru_fast.contrib.pml: got no pytorch-metric-learning, wanted it installed: "
        "pip install pytorch-metric-learning$"
    )
    with pytest.raises(ImportError, match=message):
        importlib.import_module("rru_fast.contrib.pml")


def test_an_import_without_what_pml_needs_names_that(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("pytorch_metric_learning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.delitem(sys.modules, "rru_fast.contrib.pml")
    with pytest.raises(ModuleNotFoundError, match="tqdm"):
        importlib.import_module("rru_fast.contrib.pml")


@pytest.mark.parametrize("backend", BACKENDS)
@each_distance
@pytest.mark.parametrize("n", [20, 150])
def test_the_miner_returns_pmls_triplets(n: int, distance: Any, backend: str) -> None:
    embeddings, labels = batch(n, labels=n // 3)
    got = BatchHardMiner(distance=distance(), backend=backend)(embeddings, labels)
    wanted = miners.BatchHardMiner(distance=distance())(embeddings, labels)
    assert 0 < len(wanted[0]) < n
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [5, 0, 1, 5]], ids=["one", "all different", "one pair"])
@each_distance
def test_anchors_without_a_positive_or_a_negative_are_left_out(distance: Any, labels: list[int]) -> None:
    embeddings, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor(labels)
    got = BatchHardMiner(distance=distance())(embeddings, y)
    wanted = miners.BatchHardMiner(distance=distance())(embeddings, y)
    assert all(map(torch.equal, got, wanted))
    ours, theirs = pair(distance=distance)
    assert_equal(lambda e: ours(e, y), lambda e: theirs(e, y), embeddings)


@pytest.mark.parametrize("backend", BACKENDS)
@each_distance
def test_no_anchor_is_its_own_positive(distance: Any, backend: str) -> None:
    embeddings = torch.randn(3, 5, dtype=torch.float64)[[0, 1, 0, 1, 2, 0]]
    labels = torch.tensor([0, 1, 0, 1, 2, 0])
    anchors, positives, negatives = BatchHardMiner(distance=distance(), backend=backend)(embeddings, labels)
    assert anchors.tolist() == [0, 1, 2, 3, 5]
    assert (positives != anchors).all()
    assert torch.equal(labels[positives], labels[anchors])
    assert (labels[negatives] != labels[anchors]).all()


@pytest.mark.parametrize("apart", [0, 1e-9, 1e-7])
@pytest.mark.parametrize("smooth_loss", [False, True])
@each_distance
def test_coincident_and_near_partners_have_pmls_loss_and_gradient(
    distance: Any, smooth_loss: bool, apart: float
) -> None:
    # One of each label's two is `apart` from the other; so are two of different labels.
    embeddings = torch.tensor([[1, 0], [1, apart], [0, 2], [apart, 2], [0, 2 - apart], [3, 3]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    ours, theirs = pair(distance=distance, smooth_loss=smooth_loss)
    triplets = BatchHardMiner(distance=distance())(embeddings, labels)
    assert_equal(lambda e: ours(e, labels), lambda e: theirs(e, labels, triplets), embeddings)


@each_distance
def test_the_miner_records_pmls_statistics(distance: Any) -> None:
    embeddings, labels = batch()
    ours, theirs = (
        miner(distance=distance_of(distance), collect_stats=True) for miner in (BatchHardMiner, miners.BatchHardMiner)
    )
    ours(embeddings, labels)
    theirs(embeddings, labels)
    assert ours._record_these_stats == theirs._record_these_stats
    for got, wanted in ((ours, theirs), (ours.distance, theirs.distance)):
        for name in wanted._record_these_stats:
            assert getattr(got, name) == pytest.approx(getattr(wanted, name), rel=TIGHT, abs=0), name


def distance_of(make: Callable[[], Any]) -> Any:
    """Return a distance that records statistics."""
    distance = make()
    collecting = type(distance)(collect_stats=True)
    collecting.normalize_embeddings = distance.normalize_embeddings
    return collecting


@pytest.mark.parametrize("options", [{}, {"allowed_pos_range": (0.2, 2.5)}, {"allowed_neg_range": (0.3, 2.5)}])
@pytest.mark.parametrize("gallery", [False, True])
@each_distance
def test_the_miner_takes_ranges_and_a_gallery_as_pmls_does(
    distance: Any, gallery: bool, options: dict[str, Any]
) -> None:
    embeddings, labels = batch()
    others = batch(30, seed=1) if gallery else ()
    got = BatchHardMiner(distance=distance(), **options)(embeddings, labels, *others)
    wanted = miners.BatchHardMiner(distance=distance(), **options)(embeddings, labels, *others)
    assert len(wanted[0])
    assert all(map(torch.equal, got, wanted))


REDUCERS: dict[str, Callable[[], Any]] = {
    "default": lambda: None,
    "mean": reducers.MeanReducer,
    "sum": reducers.SumReducer,
    "nonzero": reducers.AvgNonZeroReducer,
    "threshold": lambda: reducers.ThresholdReducer(low=1.0, high=3.0),
    "class weighted": lambda: reducers.ClassWeightedReducer(torch.linspace(0.5, 2, 7, dtype=torch.float64)),
    "multiple": lambda: reducers.MultipleReducers({"loss": reducers.SumReducer()}),
}


@pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS)
@pytest.mark.parametrize("smooth_loss", [False, True])
@each_distance
def test_the_loss_is_pmls_with_every_reducer(distance: Any, smooth_loss: bool, reducer: Any) -> None:
    embeddings, labels = batch()
    ours, theirs = pair(distance=distance, smooth_loss=smooth_loss, margin=0.2, reducer=reducer())
    found = assert_equal(lambda e: ours(e, labels), lambda e: theirs(e, labels), embeddings)
    assert found["gradient"].any()


@pytest.mark.parametrize(
    ("reducer", "error"), [("DivisorReducer", KeyError), ("PerAnchorReducer", NotImplementedError)]
)
def test_reducers_that_take_no_triplets_in_pml_take_none(reducer: str, error: type[Exception]) -> None:
    embeddings, labels = batch()
    for loss in pair(reducer=getattr(reducers, reducer)()):
        with pytest.raises(error):
            loss(embeddings, labels)


def test_no_reduction_returns_pmls_losses_and_triplets() -> None:
    embeddings, labels = batch()
    ours, theirs = (loss(embeddings, labels)["loss"] for loss in pair(reducer=reducers.DoNothingReducer()))
    assert relative_error(ours["losses"], theirs["losses"]) <= TIGHT
    assert all(map(torch.equal, ours["indices"], theirs["indices"]))
    assert ours["reduction_type"] == theirs["reduction_type"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("margin", [0.0, 0.3, 2, -0.5])
@pytest.mark.parametrize("smooth_loss", [False, True])
@each_distance
def test_the_loss_is_pmls_with_every_margin(distance: Any, smooth_loss: bool, margin: float, backend: str) -> None:
    embeddings, labels = batch(40)
    embeddings[0] *= 25 / embeddings[0].norm()  # gaps a little beyond 20, from which softplus is linear
    _, theirs = pair(distance=distance, smooth_loss=smooth_loss, margin=margin)
    ours = BatchHardTripletLoss(margin, distance=distance(), smooth_loss=smooth_loss, backend=backend)
    assert_equal(lambda e: ours(e, labels), lambda e: theirs(e, labels), embeddings)


@pytest.mark.parametrize("reducer", [None, reducers.SumReducer()], ids=["default", "sum"])
@pytest.mark.parametrize(
    "regularizer",
    [regularizers.LpRegularizer(), regularizers.CenterInvariantRegularizer(), regularizers.ZeroMeanRegularizer()],
    ids=lambda regularizer: type(regularizer).__name__,
)
@pytest.mark.parametrize("label", [slice(None), 0], ids=["triplets", "no triplets"])
def test_regularizers_are_added_as_in_pml(regularizer: Any, reducer: Any, label: Any) -> None:
    embeddings, labels = batch()
    labels = labels[label].expand(len(embeddings))
    ours, theirs = pair(embedding_regularizer=regularizer, embedding_reg_weight=0.3, reducer=reducer)
    assert_equal(lambda e: ours(e, labels), lambda e: theirs(e, labels), embeddings)


@pytest.mark.parametrize("mined_by", [BatchHardMiner, miners.BatchHardMiner, miners.MultiSimilarityMiner])
@each_distance
def test_given_triplets_and_pairs_are_used(distance: Any, mined_by: Any) -> None:
    embeddings, labels = batch()
    indices = mined_by(distance=distance())(embeddings, labels)
    ours, theirs = pair(distance=distance, margin=0.2)
    found = assert_equal(lambda e: ours(e, labels, indices), lambda e: theirs(e, labels, indices), embeddings)
    assert_equal(lambda e: ours(e, indices_tuple=indices), lambda e: theirs(e, labels, indices), embeddings)
    assert found["gradient"].any()


def test_arguments_go_by_keyword() -> None:
    embeddings, labels = batch()
    ours, theirs = pair()
    assert_equal(
        lambda e: ours(embeddings=e, labels=labels, indices_tuple=None),
        lambda e: theirs(embeddings=e, labels=labels, indices_tuple=None),
        embeddings,
    )


@pytest.mark.parametrize("mined", [False, True])
@each_distance
def test_cross_batch_memory(distance: Any, mined: bool) -> None:
    ours, theirs = (
        losses.CrossBatchMemory(loss, 7, memory_size=50, miner=miner(distance=distance()) if mined else None)
        for loss, miner in zip(pair(distance=distance), (BatchHardMiner, miners.BatchHardMiner), strict=True)
    )
    for step in range(4):  # the memory is full after the third
        embeddings, labels = batch(seed=step)
        assert_equal(lambda e, y=labels: ours(e, y), lambda e, y=labels: theirs(e, y), embeddings)  # type: ignore[misc]


@pytest.mark.parametrize("symmetric", [False, True])
@each_distance
def test_self_supervised_loss(distance: Any, symmetric: bool) -> None:
    embeddings, _ = batch()
    other, _ = batch(seed=1)
    ours, theirs = (losses.SelfSupervisedLoss(loss, symmetric=symmetric) for loss in pair(distance=distance))
    assert_equal(lambda e: ours(e, e.flip(1) + other), lambda e: theirs(e, e.flip(1) + other), embeddings)


@pytest.mark.parametrize("mined", [False, True])
def test_multiple_losses(mined: bool) -> None:
    embeddings, labels = batch()
    ours, theirs = (
        losses.MultipleLosses([loss, losses.ContrastiveLoss()], [miner() if mined else None, None], weights=[0.7, 0.3])
        for loss, miner in zip(pair(), (BatchHardMiner, miners.BatchHardMiner), strict=True)
    )
    assert_equal(lambda e: ours(e, labels), lambda e: theirs(e, labels), embeddings)


def losses_on_ranks(rank: int) -> dict[str, dict[str, Tensor]]:
    """Run both losses, wrapped, on this rank's embeddings."""
    embeddings, labels = batch(seed=rank)
    found = {}
    for efficient in (False, True):
        for name, loss, miner in zip(("ours", "pml"), pair(), (BatchHardMiner, miners.BatchHardMiner), strict=True):
            wrapped, mined_by = DistributedLossWrapper(loss, efficient), DistributedMinerWrapper(miner(), efficient)
            mined = mined_by(embeddings, labels)
            for given, indices in (("mined by the loss", None), ("given", mined)):
                run = value_and_gradient(lambda e, i=indices: wrapped(e, labels, i), embeddings)  # type: ignore[misc] # noqa: B023
                found[f"{name}, {given}, efficient={efficient}"] = run
    return found


def test_distributed_wrappers_of_two_ranks(tmp_path: Path) -> None:
    if not dist.is_gloo_available():
        pytest.skip("needs gloo")
    for found in in_ranks(2, tmp_path, losses_on_ranks):
        assert len(found) == 8
        for name, wanted in found.items():
            got = found[name.replace("pml", "ours")]
            assert wanted["gradient"].any()
            for what in wanted:
                assert relative_error(got[what], wanted[what]) <= TIGHT, (name, what)


@pytest.mark.parametrize("kind", LABEL_KINDS.values(), ids=LABEL_KINDS)
def test_labels_are_of_any_real_dtype(kind: Callable[[Tensor], Tensor]) -> None:
    embeddings, labels = batch()
    labels = kind(labels)
    ours, theirs = pair()
    found = assert_equal(lambda e: ours(e, labels), lambda e: theirs(e, labels), embeddings)
    assert found["gradient"].any()
    assert all(map(torch.equal, BatchHardMiner()(embeddings, labels), miners.BatchHardMiner()(embeddings, labels)))


@each_distance
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_pmls_in_other_dtypes(dtype: torch.dtype, distance: Any) -> None:
    draws = []
    for seed in range(9):
        embeddings, labels = batch(dim=64, seed=seed)
        low = (embeddings / 4).to(dtype)
        ours, theirs = pair(distance=distance, margin=0.3, reducer=reducers.MeanReducer())
        got = value_and_gradient(lambda e, y=labels, f=ours: f(e, y), low)  # type: ignore[misc]
        # cdist takes no bfloat16 on a CPU: pml's on the same values in float32, rounded.
        in_dtype = low.float() if dtype == torch.bfloat16 else low
        reference, oracle = (
            value_and_gradient(lambda e, y=labels, f=theirs: f(e, y), x)  # type: ignore[misc]
            for x in (in_dtype, low.double())
        )
        assert {value.dtype for value in got.values()} == {dtype}
        draws.append((got, {name: value.to(dtype) for name, value in reference.items()}, oracle))
    assert_parity(draws)


@each_distance
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_the_loss_is_float32(dtype: torch.dtype, distance: Any) -> None:
    embeddings, labels = batch()
    low = embeddings.to(dtype)
    ours, theirs = pair(distance=distance)
    with torch.autocast("cpu", torch.bfloat16):
        value = ours(leaf := low.clone().requires_grad_(), labels)
    assert value.dtype == torch.float32
    value.backward()
    wanted = value_and_gradient(lambda e: theirs(e, labels), low.float())
    assert relative_error(value, wanted["loss"]) <= 1e-5
    assert leaf.grad is not None and leaf.grad.dtype == dtype
    assert relative_error(leaf.grad, wanted["gradient"]) <= 1e-5 + torch.finfo(dtype).eps


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mined", [False, True])
def test_labels_and_weights_follow_the_embeddings_to_their_device(mined: bool, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    embeddings, labels = batch()
    embeddings = embeddings.to(device)
    ours, theirs = (loss.to(device) for loss in pair(reducer=REDUCERS["class weighted"]()))
    miner = BatchHardMiner().to(device)
    indices = miner(embeddings, labels) if mined else None
    assert_equal(lambda e: ours(e, labels, indices), lambda e: theirs(e, labels, indices), embeddings)


COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy}
for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    COPIES[f"protocol {protocol}"] = lambda value, protocol=protocol: pickle.loads(pickle.dumps(value, protocol))  # type: ignore[misc]


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_and_pickles_compute_the_same(copied: Callable[[Any], Any]) -> None:
    embeddings, labels = batch()
    distance = distances.CosineSimilarity()
    loss = BatchHardTripletLoss(0.2, smooth_loss=True, distance=distance, reducer=reducers.SumReducer())
    miner = BatchHardMiner(distance=distance)
    again, miner_again = copied(loss), copied(miner)
    assert type(again) is BatchHardTripletLoss and type(miner_again) is BatchHardMiner
    assert torch.equal(again(embeddings, labels), loss(embeddings, labels))
    assert all(map(torch.equal, miner_again(embeddings, labels), miner(embeddings, labels)))


class Own(BatchHardTripletLoss):
    """A user's subclass."""


def test_repr_is_pmls_with_the_name_of_the_class() -> None:
    for loss in (BatchHardTripletLoss(), Own()):
        name = type(loss).__qualname__
        assert repr(loss) == repr(losses.TripletMarginLoss()).replace("TripletMarginLoss", name)
    assert repr(BatchHardMiner()) == repr(miners.BatchHardMiner())


def test_the_classes_are_pmls() -> None:
    assert isinstance(BatchHardTripletLoss(), losses.BaseMetricLossFunction)
    assert isinstance(BatchHardMiner(), miners.BatchHardMiner)
    assert BatchHardTripletLoss()._record_these == losses.TripletMarginLoss()._record_these != []


def test_the_loss_allocates_no_matrix_of_distances() -> None:
    embeddings, labels = torch.randn(8192, 16, requires_grad=True), torch.arange(8192) // 4
    labels[0] = -1  # and an anchor without a positive
    loss, matrix = BatchHardTripletLoss(), 8192**2 * 4
    assert peak_bytes(lambda: loss(embeddings, labels).backward(), embeddings.device) < matrix / 10
    assert peak_bytes(lambda: BatchHardMiner()(embeddings, labels), embeddings.device) < matrix / 10


class Taxicab(distances.LpDistance):  # type: ignore[misc]
    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return torch.cdist(query_emb, ref_emb, p=1)


OTHER_DISTANCES: dict[str, Callable[[], Any]] = {
    "LpDistance with p=1, power=1": lambda: distances.LpDistance(p=1),
    "LpDistance with p=2, power=2": lambda: distances.LpDistance(power=2),
    "CosineSimilarity with p=2, power=2": lambda: distances.CosineSimilarity(power=2),
    "DotProductSimilarity with p=2, power=1": distances.DotProductSimilarity,
    "SNRDistance with p=2, power=1": distances.SNRDistance,
    "Taxicab with p=2, power=1": Taxicab,
    "str with p=None, power=None": lambda: "euclidean",
}


@pytest.mark.parametrize(("got", "distance"), OTHER_DISTANCES.items(), ids=OTHER_DISTANCES)
@pytest.mark.parametrize("cls", [BatchHardTripletLoss, BatchHardMiner])
def test_a_distance_that_the_operator_lacks_is_refused(cls: Any, got: str, distance: Callable[[], Any]) -> None:
    message = f"^distance: got {got}, wanted LpDistance or CosineSimilarity with p=2, power=1$"
    with pytest.raises(ValueError, match=message):
        cls(distance=distance())


@pytest.mark.parametrize("cls", [BatchHardTripletLoss, BatchHardMiner])
def test_a_distance_is_checked_at_every_call(cls: Any) -> None:
    module = cls()
    module.distance.p = 1
    with pytest.raises(ValueError, match=r"^distance: got LpDistance with p=1, power=1, wanted"):
        module(*batch())


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda loss, e, y: loss(e), "labels and indices_tuple cannot both be None"),
        (lambda loss, e, y: loss(e, y[:-1]), "Number of embeddings must equal number of labels"),
        (lambda loss, e, y: loss(e.expand(len(e), *e.shape), y), "embeddings must be a 2D tensor"),
    ],
    ids=["no labels", "few labels", "three dimensions"],
)
def test_errors_of_pmls_checks(call: Callable[[Any, Tensor, Tensor], object], error: str) -> None:
    embeddings, labels = batch()
    for loss in (BatchHardTripletLoss(), losses.TripletMarginLoss()):
        with pytest.raises(ValueError, match=error):
            call(loss, embeddings, labels)
