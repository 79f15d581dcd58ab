"""`rru_fast.contrib.sentence_transformers` against sentence-transformers' own losses."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses, modules
from torch import Tensor, nn

import rru_fast
from benchmarks.harness.measure import peak_bytes
from rru_fast.contrib.sentence_transformers import BatchHardSoftMarginTripletLoss, BatchHardTripletLoss
from rru_fast.testing import assert_parity, relative_error
from tests.helpers.modules import LABEL_KINDS
from tests.parity import BACKENDS

TIGHT = 1e-12
MODULE = "rru_fast.contrib.sentence_transformers"
DISTANCES = losses.BatchHardTripletLossDistanceFunction
each_distance = pytest.mark.parametrize("distance", [DISTANCES.euclidean_distance, DISTANCES.cosine_distance])
PAIRS = [
    (BatchHardTripletLoss, losses.BatchHardTripletLoss),
    (BatchHardSoftMarginTripletLoss, losses.BatchHardSoftMarginTripletLoss),
]
each_loss = pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda cls: cls.__name__)


def small_model(dtype: torch.dtype = torch.float64) -> SentenceTransformer:
    """Make a model with a vocabulary of its own: the mean of word vectors, and a layer."""
    generator = torch.Generator().manual_seed(0)
    words = [f"w{i}" for i in range(30)]
    tokenizer = modules.tokenizer.WhitespaceTokenizer(words, stop_words=[])
    vectors = modules.WordEmbeddings(tokenizer, torch.randn(30, 8, generator=generator), update_embeddings=True)
    layer = modules.Dense(8, 5)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return SentenceTransformer(modules=[vectors, modules.Pooling(8), layer], device="cpu").to(dtype)


def sentences(count: int = 24, seed: int = 0) -> tuple[list[str], Tensor]:
    """Draw sentences of 1 to 5 words, and labels; the last label occurs once."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 30, (count, 5), generator=generator).tolist()
    lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
    labels = torch.randint(0, 5, (count,), generator=generator)
    labels[-1] = 5
    return [" ".join(f"w{w}" for w in row[:n]) for row, n in zip(words, lengths, strict=True)], labels


def batch(n: int = 20, dim: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw embeddings and labels; the last label occurs once."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 6, (n,), generator=generator)
    labels[-1] = 6
    return embeddings, labels


def of_embeddings(cls: Any, *args: Any, **options: Any) -> Any:
    """Make a loss whose model passes embeddings on."""
    return cls(nn.Identity(), *args, **options)


def value_and_gradient(loss: Any, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
    leaf = embeddings.detach().requires_grad_()
    value = loss([{"sentence_embedding": leaf}], labels)
    value.backward()
    assert leaf.grad is not None
    return {"loss": value.detach(), "gradient": leaf.grad}


def assert_equal(ours: Any, theirs: Any, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Compare values and gradients of two losses; return those of the second."""
    got, wanted = (value_and_gradient(loss, embeddings, labels) for loss in (ours, theirs))
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype
        assert torch.allclose(got[name], wanted[name], rtol=TIGHT, atol=TIGHT), name
    return wanted


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the package imported anew."""
    for name in [*sys.modules]:
        if name.partition(".")[0] == "sentence_transformers" or name == MODULE:
            monkeypatch.delitem(sys.modules, name)


def test_the_library_does_not_import_sentence_transformers() -> None:
    code = "import sys, rru_fast; sys.exit('sentence_transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_import_without_sentence_transformers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    message = f"^{MODULE}: got no sentence-transformers, wanted it installed: pip install sentence-transformers$"
    with pytest.raises(ImportError, match=message):
        importlib.import_module(MODULE)


def test_an_import_without_what_sentence_transformers_needs_names_that(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="transformers") as caught:
        importlib.import_module(MODULE)
    assert caught.value.name == "transformers"


def test_the_losses_are_found_in_their_place_before_5_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, MODULE)
    monkeypatch.setitem(sys.modules, "sentence_transformers.sentence_transformer", None)
    monkeypatch.setattr(sys.modules["sentence_transformers"], "losses", losses, raising=False)
    module = importlib.import_module(MODULE)
    assert module.BatchHardTripletLoss is not BatchHardTripletLoss
    assert issubclass(module.BatchHardTripletLoss, losses.BatchHardTripletLoss)


@pytest.mark.parametrize("backend", BACKENDS)
@each_distance
@each_loss
def test_loss_and_gradients_of_a_models_weights_are_theirs(ours: Any, theirs: Any, distance: Any, backend: str) -> None:
    model = small_model()
    texts, labels = sentences()
    found = []
    for loss in (ours(model, distance, backend=backend), theirs(model, distance)):
        model.zero_grad()
        value = loss([model.preprocess(texts)], labels)
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters())])
    assert len(found[0]) == 4
    for got, wanted in zip(*found, strict=True):
        assert wanted.any()
        assert got.dtype == wanted.dtype and relative_error(got, wanted) <= TIGHT


@each_distance
@each_loss
def test_training_steps_end_at_their_weights(ours: Any, theirs: Any, distance: Any) -> None:
    states = []
    for cls in (ours, theirs):
        model = small_model()
        loss = cls(model, distance)
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9)
        for step in range(5):
            texts, labels = sentences(seed=step)
            optimizer.zero_grad()
            loss([model.preprocess(texts)], labels).backward()
            optimizer.step()
        states.append(model.state_dict())
    start = small_model().state_dict()
    for name, wanted in states[1].items():
        assert relative_error(states[0][name], wanted) <= TIGHT
        assert not torch.equal(wanted, start[name])


LABELS: dict[str, Callable[[int], Tensor]] = {
    "fours": lambda n: torch.arange(n) // 4,
    "some alone": lambda n: (torch.arange(n) // 4).where(torch.arange(n) < n - 6, torch.arange(n) + 100),
    "all alone": lambda n: torch.arange(n),
    "one label": lambda n: torch.zeros(n, dtype=torch.int64),
    "one negative": lambda n: (torch.arange(n) == n - 1).long(),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1, 30], ids=["small gaps", "gaps beyond 20"])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@each_distance
@each_loss
def test_loss_and_gradient_are_theirs(
    ours: Any, theirs: Any, distance: Any, labels: Callable[[int], Tensor], scale: float, backend: str
) -> None:
    embeddings, _ = batch(40)
    fast, own = of_embeddings(ours, distance, backend=backend), of_embeddings(theirs, distance)
    assert_equal(fast, own, scale * embeddings, labels(40))


@pytest.mark.parametrize("margin", [0.0, 0.3, 2, -0.5])
@each_distance
def test_the_loss_is_theirs_with_every_margin(distance: Any, margin: float) -> None:
    embeddings, labels = batch()
    ours, theirs = (of_embeddings(cls, distance, margin) for cls in PAIRS[0])
    assert_equal(ours, theirs, embeddings, labels)
    ours.triplet_margin = theirs.triplet_margin = 1.0
    assert_equal(ours, theirs, embeddings, labels)


@pytest.mark.parametrize("backend", BACKENDS)
@each_distance
@each_loss
def test_coincident_embeddings_have_their_loss_and_gradient(
    ours: Any, theirs: Any, distance: Any, backend: str
) -> None:
    # Multiples of 1/16, whose squares and products are exact: the root makes 1e-8 of an error of 1e-16 in theirs.
    embeddings = batch()[0].mul(16).round() / 16
    labels = torch.arange(20) // 4
    embeddings[[1, 2, 3]] = embeddings[0].clone()  # all of a label
    embeddings[[8, 13]] = embeddings[4].clone()  # of three labels
    fast, own = of_embeddings(ours, distance, backend=backend), of_embeddings(theirs, distance)
    assert_equal(fast, own, embeddings, labels)


def test_an_anchor_at_the_margin_has_their_gradient() -> None:
    embeddings = torch.tensor([[0.0], [3.0], [-2.0], [-7.0]], dtype=torch.float64)
    ours, theirs = (of_embeddings(cls, margin=-1) for cls in PAIRS[0])
    wanted = assert_equal(ours, theirs, embeddings, torch.tensor([0, 0, 1, 2]))
    assert wanted["loss"] == 0 and wanted["gradient"].any()


@pytest.mark.parametrize("labels", [[0, 1, 1, 1], [0, 0, 0, 0]], ids=["no positive", "no negative"])
def test_a_cosine_distance_of_zeros_to_themselves_of_1_is_kept(labels: list[int]) -> None:
    embeddings = torch.eye(4, dtype=torch.float64)
    embeddings[0] = 0
    found = [
        of_embeddings(cls, DISTANCES.cosine_distance, 2)([{"sentence_embedding": embeddings}], torch.tensor(labels))
        for cls in PAIRS[0]
    ]
    assert found[0] - found[1] == 1 / 4


@each_distance
@each_loss
def test_embeddings_of_nan_make_the_loss_nan(ours: Any, theirs: Any, distance: Any) -> None:
    for labels in (torch.arange(20) // 4, torch.zeros(20)):
        embeddings, _ = batch()
        embeddings[2] = torch.nan
        for cls in (ours, theirs):
            assert value_and_gradient(of_embeddings(cls, distance), embeddings, labels)["loss"].isnan()


KINDS = {**LABEL_KINDS, "column": lambda y: y[:, None]}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@each_loss
def test_labels_are_of_any_real_dtype(ours: Any, theirs: Any, kind: Callable[[Tensor], Tensor]) -> None:
    embeddings, labels = batch()
    wanted = assert_equal(of_embeddings(ours), of_embeddings(theirs), embeddings, kind(labels))
    assert wanted["gradient"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@each_distance
@each_loss
def test_error_is_at_most_twice_theirs_in_other_dtypes(ours: Any, theirs: Any, distance: Any, dtype: Any) -> None:
    draws = []
    for seed in range(9):
        embeddings, labels = batch(dim=64, seed=seed)
        low = (embeddings / 4).to(dtype)
        fast, own = of_embeddings(ours, distance), of_embeddings(theirs, distance)
        got, reference, oracle = (
            value_and_gradient(loss, x, labels) for loss, x in ((fast, low), (own, low), (own, low.double()))
        )
        assert (got["loss"].dtype, got["gradient"].dtype) == (torch.float32, dtype)
        assert reference["loss"].dtype == torch.float32
        draws.append((got, reference, oracle))
    assert_parity(draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@each_distance
@each_loss
def test_under_autocast_the_loss_is_float32(ours: Any, theirs: Any, distance: Any, dtype: Any) -> None:
    embeddings, labels = batch()
    low = embeddings.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_gradient(of_embeddings(ours, distance), low, labels)
    wanted = value_and_gradient(of_embeddings(theirs, distance), low.double(), labels)
    assert (got["loss"].dtype, got["gradient"].dtype) == (torch.float32, dtype)
    assert relative_error(got["loss"], wanted["loss"]) <= 1e-5
    assert relative_error(got["gradient"], wanted["gradient"]) <= 1e-5 + torch.finfo(dtype).eps


COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy}
for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    COPIES[f"protocol {protocol}"] = lambda value, protocol=protocol: pickle.loads(pickle.dumps(value, protocol))  # type: ignore[misc]


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@each_loss
def test_copies_and_pickles_compute_the_same(ours: Any, theirs: Any, copied: Callable[[Any], Any]) -> None:
    texts, labels = sentences()
    loss = ours(small_model(), DISTANCES.cosine_distance, backend="composite")
    again = copied(loss)
    assert type(again) is ours and again.backend == "composite"
    features = loss.sentence_embedder.preprocess(texts)
    assert torch.equal(again([features], labels), loss([features], labels))


@each_distance
@each_loss
def test_the_classes_describe_themselves_as_theirs(ours: Any, theirs: Any, distance: Any) -> None:
    model = small_model()
    fast, own = ours(model, distance), theirs(model, distance)
    assert isinstance(fast, theirs)
    assert repr(fast) == repr(own)
    assert fast.get_config_dict() == own.get_config_dict()
    assert fast.citation == own.citation
    assert fast.state_dict().keys() == own.state_dict().keys()


@pytest.mark.parametrize("theirs", [*(pair[1] for pair in PAIRS), losses.BatchAllTripletLoss])
def test_accelerate_names_the_module_for_their_losses(theirs: Any) -> None:
    loss = of_embeddings(theirs)
    with pytest.warns(UserWarning, match=f"{MODULE} has sentence-transformers' batch-hard losses"):
        assert rru_fast.accelerate(loss) is loss
    assert "forward" not in vars(loss)


@pytest.mark.filterwarnings("error")
@each_loss
def test_accelerate_leaves_ours(ours: Any, theirs: Any) -> None:
    loss = of_embeddings(ours)
    rru_fast.accelerate([loss, rru_fast.reference.BatchHardTripletLoss()])
    assert type(loss) is ours and "forward" not in vars(loss)


@each_loss
def test_the_loss_allocates_no_matrix_of_distances(ours: Any, theirs: Any) -> None:
    embeddings, labels = torch.randn(8192, 16, requires_grad=True), torch.arange(8192) // 4
    loss, matrix = of_embeddings(ours), 8192**2 * 4
    step = lambda: loss([{"sentence_embedding": embeddings}], labels).backward()  # noqa: E731
    assert peak_bytes(step, embeddings.device) < matrix / 10


def taxicab(embeddings: Tensor) -> Tensor:
    return torch.cdist(embeddings, embeddings, p=1)


@pytest.mark.parametrize(("got", "distance"), [("taxicab", taxicab), ("'cosine'", "cosine"), (r"\[\]", [])])
@each_loss
def test_a_distance_that_the_operator_lacks_is_refused(ours: Any, theirs: Any, got: str, distance: Any) -> None:
    message = (
        f"^distance_metric: got {got}, wanted BatchHardTripletLossDistanceFunction's eucledian_distance or "
        "cosine_distance$"
    )
    with pytest.raises(ValueError, match=message):
        of_embeddings(ours, distance)
    loss = of_embeddings(ours)
    loss.distance_metric = distance
    with pytest.raises(ValueError, match=message):
        value_and_gradient(loss, *batch())
