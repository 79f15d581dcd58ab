"""`refine` over several ranks: batch statistics, outputs and gradients equal those of one process with all clips.

Starting ranks is slow: each spawn runs everything once and returns the results that the tests check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rru_fast
from rru_fast import reference, triton
from rru_fast.testing import EXACT, assert_parity, relative_error
from tests import parity
from tests.parity import Case, Results
from tests.ranks import in_ranks

# Backends that run a small call in less than a second; Triton's interpreter has its own spawn below.
BACKENDS = ["reference", *parity.COMPILED]


@dataclass(frozen=True)
class Job:
    """A case whose clips are split over the ranks."""

    case: Case
    clips: tuple[int, ...]  # per rank
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def call(self) -> parity.Call:
        return parity.make_call(self.case, self.dtype, self.seed)

    def run_share(self, rank: int, backend: str, process_group: dist.ProcessGroup) -> Results:
        ends = [0, *accumulate(self.clips)]
        mine = parity.share(self.call().map(lambda v: v.to(self.dtype)), ends[rank], ends[rank + 1])
        return parity.run(self.case, mine, backend, process_group=process_group)

    def __str__(self) -> str:
        split = "+".join(map(str, self.clips))
        return f"{self.case}-{split}-{str(self.dtype).removeprefix('torch.')}-{self.seed}"


def merge_ranks(results: list[Results]) -> Results:
    """Merge the ranks' results into those of one process: concatenate clips, add weight gradients."""
    of_clips = ("features", "strips", "d_x")
    whole = {name: torch.cat([result[name] for result in results]) for name in of_clips}
    weights = [name for name in results[0] if name.startswith("d_") and name != "d_x"]
    whole |= {name: cast(torch.Tensor, sum(result[name] for result in results)) for name in weights}
    for name in ("running_mean", "running_var"):
        for result in results[1:]:
            assert torch.equal(result[name], results[0][name]), f"{name} has other bits on another rank"
        whole[name] = results[0][name]
    return whole


VARIANTS = [
    Job(Case((5, 4, 6, 3, 2), attention=attention, inputs=inputs), (3, 2))
    for inputs in ("appearance+motion", "appearance", "raw")
    for attention in ("both", "spatial", "channel")
]
SHAPES = [
    Job(Case((2, 3, 7, 1, 1), hidden=3), (1, 1)),  # one position per rank
    Job(Case((3, 1, 5, 2, 3), hidden=4), (1, 2)),  # one frame
    Job(Case((3, 1, 5, 2, 3), hidden=4, inputs="raw"), (1, 2)),
    Job(Case((3, 3, 70, 9, 8), hidden=70), (2, 1)),  # more positions, channels and gate channels than a tile
    Job(Case((9, 2, 600, 4, 4), hidden=66), (1, 8)),  # few clips on one rank and many on the other
]
DRAWS = [
    Job(Case((5, 4, 6, 3, 2), inputs=inputs), (3, 2), dtype, seed)
    for inputs in ("appearance+motion", "raw")
    for dtype, draws in ((torch.float32, 15), (torch.bfloat16, 5))
    for seed in range(draws)
]
OF_FOUR = [
    Job(Case((7, 4, 6, 3, 2), inputs=inputs), clips)
    for inputs in ("appearance+motion", "raw")
    for clips in ((1, 3, 1, 2), (4, 1, 1, 1))
]
IN_PAIRS = [Job(Case((3, 3, 6, 3, 2)), (1, 2)), Job(Case((5, 3, 6, 3, 2)), (4, 1), seed=1)]  # ranks 0 and 2, 1 and 3
STEPS = Job(Case((6, 5, 6, 3, 2)), (4, 2))  # of training: see _train
COMPILED = {"fast": rru_fast.RRU, "reference": reference.RRU}


def group_of(ranks: list[int] | None = None) -> dist.ProcessGroup:
    """Process group of the given ranks, or of all."""
    return cast(dist.ProcessGroup, dist.group.WORLD if ranks is None else dist.new_group(ranks))


def count_collectives(function: Callable[[], object]) -> int:
    """Count the collectives that a call takes part in."""
    before = group_of()._get_sequence_number_for_group()
    function()
    return group_of()._get_sequence_number_for_group() - before


def error_of(function: Callable[[], object]) -> str:
    """Return the error that a call raises as text, or "none"."""
    try:
        function()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def _train(module: nn.Module, run: nn.Module, x: torch.Tensor, ranks: int = 1) -> dict[str, torch.Tensor]:
    """Take three steps on the sum of the ranks' losses, accelerated before the second and restored before the third."""
    for step, swap in enumerate((None, rru_fast.accelerate, rru_fast.restore)):
        if swap is not None:
            swap(module)
        module.zero_grad()
        out = run(x * (step + 1))
        # DistributedDataParallel takes the mean of the gradients.
        (ranks * (out.features[:, -1].square().sum() + out.strips.sum())).backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 0.01 * cast(torch.Tensor, parameter.grad)
    return {name: value.clone() for name, value in module.state_dict().items()}


def _unit(cls: type[reference.RRU] = reference.RRU, **settings: Any) -> reference.RRU:
    torch.manual_seed(0)
    return cls(6, (3, 2), hidden=5, spatial_hidden=4, **settings).double()


def _to_sync_batch_norm(module: nn.Module) -> Any:
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def run_two_ranks(rank: int) -> dict[str, Any]:
    """Run everything that needs two ranks."""
    world, alone = group_of(), [group_of([0]), group_of([1])][rank]
    found: dict[str, Any] = {
        f"{job} {backend}": job.run_share(rank, backend, world)
        for job in (*VARIANTS, *SHAPES, *DRAWS)
        for backend in BACKENDS
    }
    call = parity.share(VARIANTS[0].call(), 0, 2)
    good: dict[str, Any] = {"running_mean": call.buffers[0], "running_var": call.buffers[1], **call.weights}

    def refine(x: torch.Tensor = call.x, **changes: Any) -> rru_fast.Refined:
        return rru_fast.refine(x, **{"training": True, "process_group": world} | good | changes)

    for backend in BACKENDS:
        settings: dict[str, Any] = {"backend": backend}
        if rank == 0:  # a call that needs rank 1 would hang
            found[f"eval {backend}"] = count_collectives(lambda s=settings: refine(training=False, **s))
            found[f"alone {backend}"] = count_collectives(lambda s=settings: refine(process_group=alone, **s))
            module = _to_sync_batch_norm(_unit(rru_fast.RRU, **settings)).eval()
            found[f"module in eval {backend}"] = count_collectives(lambda m=module: m(call.x))
            wrong = {**settings, "w_c": call.weights["w_c"].t()}
            found[f"wrong {backend}"] = error_of(lambda s=wrong: refine(**s))
        found[f"frames {backend}"] = error_of(lambda s=settings: refine(call.x[:, : 4 - rank], **s))
        low = call.map(torch.Tensor.float) if rank else call
        of_low = {"running_mean": low.buffers[0], "running_var": low.buffers[1], **low.weights, **settings}
        found[f"dtype {backend}"] = error_of(lambda x=low.x, s=of_low: refine(x, **s))
        fewer = {"w": 0, "gamma": 0, "beta": 0, "running_mean": 0, "running_var": 0, "w_c": 1}
        of_fewer = {name: good[name].narrow(axis, 0, 5 - rank) for name, axis in fewer.items()} | settings
        found[f"hidden {backend}"] = error_of(lambda s=of_fewer: refine(**s))
        found[f"train {backend}"] = count_collectives(lambda s=settings: refine(**s))
        out = refine(call.x.clone().requires_grad_(), **settings)
        found[f"backward {backend}"] = count_collectives(out.strips.sum().backward)
        found[f"one frame {backend}"] = count_collectives(lambda s=settings: refine(call.x[:, :1], **s))

    found["groups"] = error_of(lambda: refine(bn_groups=2))
    found["graph"] = error_of(lambda: _to_sync_batch_norm(_unit(rru_fast.RRU, cuda_graph=True))(call.x))

    ends = [0, *accumulate(STEPS.clips)]
    unit = _unit()
    # In this order: on a CPU DistributedDataParallel refuses SyncBatchNorm, which torch implements only for GPUs.
    parallel = _to_sync_batch_norm(DistributedDataParallel(unit))
    found["steps"] = _train(unit, parallel, STEPS.call().x[ends[rank] : ends[rank + 1]], ranks=2)

    for of, cls in COMPILED.items():
        eager, traced = (_to_sync_batch_norm(_unit(cls)) for _ in range(2))
        found[f"fullgraph {of}"] = error_of(lambda m=traced: torch.compile(m, fullgraph=True)(call.x))
        torch.compiler.reset()
        results = []
        for module in (eager, torch.compile(traced, backend="aot_eager")):
            leaf = call.x.clone().requires_grad_()
            out = module(leaf)
            (out.features.square().sum() + out.strips.sum()).backward()
            results.append([out.features, out.strips, leaf.grad, *(p.grad for p in module.parameters())])
        found[f"compiled {of}"] = [[v.detach() for v in result] for result in results]
    return found


def run_four_ranks(rank: int) -> dict[str, Any]:
    """Run everything that needs four ranks."""
    world, pairs, others = group_of(), [group_of([0, 2]), group_of([1, 3])], group_of([0, 1])
    found: dict[str, Any] = {}
    for backend in BACKENDS:
        found |= {f"{job} {backend}": job.run_share(rank, backend, world) for job in OF_FOUR}
        pair = rank % 2
        found[f"pair {backend}"] = IN_PAIRS[pair].run_share(rank // 2, backend, pairs[pair])
    if rank == 3:
        call = parity.share(OF_FOUR[0].call(), 0, 1)
        arguments: dict[str, Any] = {**call.weights, "training": True, "process_group": others}
        found["not mine"] = error_of(lambda: rru_fast.refine(call.x, **arguments))
        unit = _unit()
        unit.transition_norm = nn.SyncBatchNorm(5, process_group=others).double()  # type: ignore[assignment]
        found["not the module's"] = error_of(lambda: unit(call.x))
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_ranks(2, tmp_path_factory.mktemp("two"), run_two_ranks)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_ranks(4, tmp_path_factory.mktemp("four"), run_four_ranks)


def assert_as_one_process(job: Job, results: list[Results]) -> None:
    oracle = parity.run(job.case, job.call(), "reference")
    for name, value in merge_ranks(results).items():
        assert relative_error(value, oracle[name]) <= EXACT, name


every_backend = pytest.mark.parametrize("backend", BACKENDS)
four_ranks = pytest.mark.exhaustive  # twice as many processes to start; two ranks show most


@every_backend
@pytest.mark.parametrize("job", [*VARIANTS, *SHAPES], ids=str)
def test_two_ranks_give_what_one_process_gives(job: Job, backend: str, two: list[dict[str, Any]]) -> None:
    assert_as_one_process(job, [found[f"{job} {backend}"] for found in two])


@four_ranks
@every_backend
@pytest.mark.parametrize("job", OF_FOUR, ids=str)
def test_four_ranks_give_what_one_process_gives(job: Job, backend: str, four: list[dict[str, Any]]) -> None:
    assert_as_one_process(job, [found[f"{job} {backend}"] for found in four])


@four_ranks
@every_backend
@pytest.mark.parametrize("pair", [0, 1])
def test_ranks_of_a_subgroup_share_statistics_with_each_other_only(
    pair: int, backend: str, four: list[dict[str, Any]]
) -> None:
    assert_as_one_process(IN_PAIRS[pair], [found[f"pair {backend}"] for found in four[pair::2]])


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inputs", ["appearance+motion", "raw"])
def test_error_is_at_most_twice_that_of_the_reference_in_one_process(
    inputs: str, dtype: torch.dtype, backend: str, two: list[dict[str, Any]]
) -> None:
    jobs = [job for job in DRAWS if job.dtype == dtype and job.case.inputs == inputs]
    draws = []
    for job in jobs:
        got = merge_ranks([found[f"{job} {backend}"] for found in two])
        low = parity.run(job.case, job.call().map(lambda v: v.to(dtype)), "reference")
        draws.append((got, low, parity.run(job.case, job.call(), "reference")))
    assert_parity(draws)


@every_backend
def test_a_call_takes_one_collective_and_one_more_each_way_per_frame_past_the_first(
    backend: str, two: list[dict[str, Any]]
) -> None:
    for found in two:
        # The reference also normalizes the first frame, and reduces mean and variance one after the other.
        assert found[f"train {backend}"] == (1 + 2 * 4 if backend == "reference" else 1 + 3)
        assert found[f"backward {backend}"] == (2 * 4 if backend == "reference" else 3)
        assert found[f"one frame {backend}"] == (1 + 2 * 1 if backend == "reference" else 1)


@every_backend
def test_eval_mode_and_a_group_of_one_take_no_collective(backend: str, two: list[dict[str, Any]]) -> None:
    for what in ("eval", "alone", "module in eval"):
        assert two[0][f"{what} {backend}"] == 0, what


@every_backend
def test_a_bad_argument_on_one_rank_raises_there_without_a_collective(backend: str, two: list[dict[str, Any]]) -> None:
    assert two[0][f"wrong {backend}"].startswith("ValueError: w_c: got shape")


@every_backend
@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("frames", "x: got [4, 3] frames on the ranks of process_group, wanted as many on every rank"),
        ("dtype", "x: got [float64, float32] dtypes on the ranks of process_group, wanted one on every rank"),
        ("hidden", "w: got [5, 4] gate channels on the ranks of process_group, wanted as many on every rank"),
    ],
)
def test_mismatched_ranks_raise_on_every_rank(what: str, wanted: str, backend: str, two: list[dict[str, Any]]) -> None:
    assert [found[f"{what} {backend}"] for found in two] == [f"ValueError: {wanted}"] * 2


def test_bn_groups_and_process_group_exclude_each_other(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["groups"].startswith("ValueError: bn_groups: got 2 with a process_group, wanted 1")


def test_a_cuda_graph_of_several_ranks_is_refused(two: list[dict[str, Any]]) -> None:
    for found in two:
        wanted = "ValueError: cuda_graph: got True with batch statistics over several ranks, wanted False"
        assert found["graph"] == wanted


@four_ranks
def test_a_group_that_the_rank_is_not_in_is_refused(four: list[dict[str, Any]]) -> None:
    for what in ("not mine", "not the module's"):
        assert four[3][what].startswith("TypeError: process_group: got one that this rank is not in, wanted"), what


def test_training_under_ddp_with_swaps_between_steps_equals_one_process(two: list[dict[str, Any]]) -> None:
    unit = _unit()
    wanted = _train(unit, unit, STEPS.call().x)
    for found in two:
        assert list(found["steps"]) == list(wanted)
        for name, value in wanted.items():
            assert relative_error(found["steps"][name], value) <= EXACT, name


@pytest.mark.parametrize("of", COMPILED)
def test_under_torch_compile_a_process_group_breaks_the_graph_or_raises(of: str, two: list[dict[str, Any]]) -> None:
    for found in two:
        assert "process_group: got one inside torch.compile, wanted fullgraph=False" in found[f"fullgraph {of}"]
        for eager, compiled in zip(*found[f"compiled {of}"], strict=True):
            assert relative_error(compiled, eager) <= EXACT


def run_triton_ranks(rank: int) -> list[Results]:
    return [job.run_share(rank, "triton", group_of()) for job in OF_TRITON]


OF_TRITON = [
    Job(Case((3, 3, 6, 2, 2), inputs=inputs, attention=attention), (2, 1))
    for inputs, attention in (("appearance+motion", "both"), ("raw", "channel"), ("appearance", "spatial"))
] + [replace(SHAPES[0], case=Case((2, 2, 5, 1, 1), hidden=3))]


@pytest.mark.skipif(not triton.interpreted(), reason="needs TRITON_INTERPRET=1")
def test_triton_on_two_ranks_gives_what_one_process_gives(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = in_ranks(2, tmp_path_factory.mktemp("triton"), run_triton_ranks)
    for job, results in zip(OF_TRITON, zip(*found, strict=True), strict=True):
        assert_as_one_process(job, list(results))
