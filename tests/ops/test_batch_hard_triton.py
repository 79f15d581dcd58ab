"""Launches of `batch_hard` by the Triton backend, and its two ways of finding the anchors that selected a row."""

from __future__ import annotations

import pytest
import torch

from rru_fast import triton
from rru_fast.arguments import BatchHardArguments, BatchHardNeed, BatchHardUpstream, flatten
from rru_fast.testing import EXACT, relative_error
from tests.ops.test_batch_hard_launches import Launches

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not triton.interpreted(), reason="needs TRITON_INTERPRET=1")

SORT = ["cat", "sort"]
GATHER = "batch_hard_bwd_kernel"
NORMS = "inverse_norms_kernel"


def launches(metric: str, n: int, m: int, need: BatchHardNeed, groups: int = 8) -> tuple[list[str], list[str]]:
    """Kernels and operators of a forward and of a backward, against a gallery of m if m > 0."""
    from benchmarks.launches.recording import recording
    from rru_fast.triton import batch_hard

    forward, backward = Launches("meta"), Launches("meta")
    with torch.device("meta"):
        gallery, gallery_labels = (torch.empty(groups, m, 64), torch.empty(m, dtype=torch.int64)) if m else (None, None)
        labels = torch.empty(n, dtype=torch.int64)
        args = BatchHardArguments(torch.empty(groups, n, 64), labels, gallery, gallery_labels, 0.3, False, metric)
        upstream = BatchHardUpstream(torch.empty(()).expand(groups, n), None, None)
    with recording(lambda launch: forward.names.append(launch.kernel.__name__)), forward:
        saved = batch_hard.forward(args).saved
    with recording(lambda launch: backward.names.append(launch.kernel.__name__)), backward:
        batch_hard.backward(upstream, saved, args, need)
    return forward.names, backward.names


@pytest.mark.parametrize("m", [0, 50])
@pytest.mark.parametrize(
    ("metric", "first"), [("euclidean", "subtract_common_kernel"), ("cosine", "inverse_norms_kernel")]
)
def test_a_forward_takes_two_launches_and_a_small_backward_one_per_gradient(metric: str, first: str, m: int) -> None:
    forward, backward = launches(metric, 20, m, BatchHardNeed(True, m > 0))
    assert forward == [first, "batch_hard_fwd_kernel"]
    gathers = [GATHER, GATHER] if m else [GATHER]
    assert backward == (["inverse_norms_kernel", *gathers] if metric == "cosine" else gathers)


def test_only_the_gradient_of_many_anchors_partners_takes_a_sort() -> None:
    assert launches("euclidean", 65, 0, BatchHardNeed(True, False))[1] == [*SORT, GATHER]
    assert launches("euclidean", 65, 9, BatchHardNeed(False, True))[1] == [*SORT, GATHER]
    assert launches("euclidean", 65, 9, BatchHardNeed(True, True))[1] == [GATHER, *SORT, GATHER]
    assert launches("euclidean", 65, 9, BatchHardNeed(True, False))[1] == [GATHER]


@interpreted
@pytest.mark.parametrize("m", [0, 7, 40])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_scanning_the_anchors_and_sorting_them_give_the_same_gradient(
    metric: str, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rru_fast.triton import batch_hard

    n = 40
    generator = torch.Generator().manual_seed(0)
    features, gallery = (torch.randn(2, rows, 5, generator=generator, dtype=torch.float64) for rows in (n, m))
    # Some identities are missing among few candidates: -1 is an index, too.
    labels, gallery_labels = torch.arange(n) // 4, torch.arange(m) // 4
    options = (gallery, gallery_labels) if m else (None, None)
    args = BatchHardArguments(features, labels, *options, 0.3, True, metric)
    saved = batch_hard.forward(args).saved
    upstream = BatchHardUpstream(*(torch.randn(2, n, generator=generator, dtype=torch.float64) for _ in range(3)))
    gradients = []
    for few in (0, n):
        monkeypatch.setattr(batch_hard, "FEW_ANCHORS", few)
        gradients.append(flatten(batch_hard.backward(upstream, saved, args, BatchHardNeed(True, m > 0))))
    for sorted_, scanned in zip(*gradients, strict=True):
        assert (sorted_ is None) == (scanned is None)
        if sorted_ is not None:
            assert relative_error(sorted_, scanned) <= EXACT
