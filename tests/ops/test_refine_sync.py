"""`refine` over several ranks: their batch statistics, outputs and gradients are those of one process with all clips.

Each spawn of ranks runs everything once and returns it; the tests look at what came back.
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

# Those that take no seconds for a small call; Triton's interpreter has a spawn of its own below.
BACKENDS = ["reference", *parity.COMPILED]


@dataclass(frozen=True)
class Job:
    """A case whose clips are dealt out to the ranks."""

    case: Case
    clips: tuple[int, ...]  # of each rank
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def call(self) -> parity.Call:
        return parity.make_call(self.case, self.dtype, self.seed)

    def run_share(self, rank: int, backend: str, process_group: dist.ProcessGroup) -> Results:
        ends = [0, *accumulate(self.clips)]
        mine = parity.share(self.call().map(lambda v: v.to(self.dtype)), ends[rank], ends[rank + 1])
        return parity.run(self.case, mine, backend, process_group=process_group)

    def __str__(self) -> str:
        dealt = "+".join(map(str, self.clips))
        return f"{self.case}-{dealt}-{str(self.dtype).removeprefix('torch.')}-{self.seed}"


def together(results: list[Results]) -> Results:
    """What the ranks yield, as one process yields it: clips in a row, gradients of weights added up."""
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
    Job(Case((2, 3, 7, 1, 1), hidden=3), (1, 1)),  # a position a rank
    Job(Case((3, 1, 5, 2, 3), hidden=4), (1, 2)),  # one frame
    Job(Case((3, 1, 5, 2, 3), hidden=4, inputs="raw"), (1, 2)),
    Job(Case((3, 3, 70, 9, 8), hidden=70), (2, 1)),  # more positions, channels and gate channels than a kernel takes
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
    """A group of some of the ranks, or of all."""
    return cast(dist.ProcessGroup, dist.group.WORLD if ranks is None else dist.new_group(ranks))


def collectives(function: Callable[[], object]) -> int:
    """How many of them a call takes part in."""
    before = group_of()._get_sequence_number_for_group()
    function()
    return group_of()._get_sequence_number_for_group() - before


def refusal(function: Callable[[], object]) -> str:
    try:
        function()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def _train(module: nn.Module, run: nn.Module, x: torch.Tensor, ranks: int = 1) -> dict[str, torch.Tensor]:
    """The state after three steps on the sum of the ranks' losses; the module is swapped and back on the way."""
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


def _synchronised(module: nn.Module) -> Any:
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def of_two(rank: int) -> dict[str, Any]:
    """Everything two ranks are asked."""
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
        if rank == 0:  # what needs the other rank would wait for it, for ever
            found[f"eval {backend}"] = collectives(lambda s=settings: refine(training=False, **s))
            found[f"alone {backend}"] = collectives(lambda s=settings: refine(process_group=alone, **s))
            module = _synchronised(_unit(rru_fast.RRU, **settings)).eval()
            found[f"module in eval {backend}"] = collectives(lambda m=module: m(call.x))
            wrong = {**settings, "w_c": call.weights["w_c"].t()}
            found[f"wrong {backend}"] = refusal(lambda s=wrong: refine(**s))
        found[f"frames {backend}"] = refusal(lambda s=settings: refine(call.x[:, : 4 - rank], **s))
        low = call.map(torch.Tensor.float) if rank else call
        of_low = {"running_mean": low.buffers[0], "running_var": low.buffers[1], **low.weights, **settings}
        found[f"dtype {backend}"] = refusal(lambda x=low.x, s=of_low: refine(x, **s))
        fewer = {"w": 0, "gamma": 0, "beta": 0, "running_mean": 0, "running_var": 0, "w_c": 1}
        of_fewer = {name: good[name].narrow(axis, 0, 5 - rank) for name, axis in fewer.items()} | settings
        found[f"hidden {backend}"] = refusal(lambda s=of_fewer: refine(**s))
        found[f"train {backend}"] = collectives(lambda s=settings: refine(**s))
        out = refine(call.x.clone().requires_grad_(), **settings)
        found[f"backward {backend}"] = collectives(out.strips.sum().backward)
        found[f"one frame {backend}"] = collectives(lambda s=settings: refine(call.x[:, :1], **s))

    found["groups"] = refusal(lambda: refine(bn_groups=2))
    found["graph"] = refusal(lambda: _synchronised(_unit(rru_fast.RRU, cuda_graph=True))(call.x))

    ends = [0, *accumulate(STEPS.clips)]
    unit = _unit()
    # In this order: DistributedDataParallel takes no SyncBatchNorm on a CPU, where torch's own forward has none.
    parallel = _synchronised(DistributedDataParallel(unit))
    found["steps"] = _train(unit, parallel, STEPS.call().x[ends[rank] : ends[rank + 1]], ranks=2)

    for of, cls in COMPILED.items():
        eager, traced = (_synchronised(_unit(cls)) for _ in range(2))
        found[f"fullgraph {of}"] = refusal(lambda m=traced: torch.compile(m, fullgraph=True)(call.x))
        torch.compiler.reset()
        results = []
        for module in (eager, torch.compile(traced, backend="aot_eager")):
            leaf = call.x.clone().requires_grad_()
            out = module(leaf)
            (out.features.square().sum() + out.strips.sum()).backward()
            results.append([out.features, out.strips, leaf.grad, *(p.grad for p in module.parameters())])
        found[f"compiled {of}"] = [[v.detach() for v in result] for result in results]
    return found


def of_four(rank: int) -> dict[str, Any]:
    """Everything four ranks are asked."""
    world, pairs, others = group_of(), [group_of([0, 2]), group_of([1, 3])], group_of([0, 1])
    found: dict[str, Any] = {}
    for backend in BACKENDS:
        found |= {f"{job} {backend}": job.run_share(rank, backend, world) for job in OF_FOUR}
        pair = rank % 2
        found[f"pair {backend}"] = IN_PAIRS[pair].run_share(rank // 2, backend, pairs[pair])
    if rank == 3:
        call = parity.share(OF_FOUR[0].call(), 0, 1)
        arguments: dict[str, Any] = {**call.weights, "training": True, "process_group": others}
        found["not mine"] = refusal(lambda: rru_fast.refine(call.x, **arguments))
        unit = _unit()
        unit.transition_norm = nn.SyncBatchNorm(5, process_group=others).double()  # type: ignore[assignment]
        found["not the module's"] = refusal(lambda: unit(call.x))
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_ranks(2, tmp_path_factory.mktemp("two"), of_two)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_ranks(4, tmp_path_factory.mktemp("four"), of_four)


def assert_as_one_process(job: Job, results: list[Results]) -> None:
    oracle = parity.run(job.case, job.call(), "reference")
    for name, value in together(results).items():
        assert relative_error(value, oracle[name]) <= EXACT, name


every_backend = pytest.mark.parametrize("backend", BACKENDS)
four_ranks = pytest.mark.exhaustive  # twice as many processes to start, for what two ranks show


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
def test_ranks_of_a_subgroup_share_among_themselves(pair: int, backend: str, four: list[dict[str, Any]]) -> None:
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
        got = together([found[f"{job} {backend}"] for found in two])
        low = parity.run(job.case, job.call().map(lambda v: v.to(dtype)), "reference")
        draws.append((got, low, parity.run(job.case, job.call(), "reference")))
    assert_parity(draws)


@every_backend
def test_ranks_talk_once_a_call_and_each_way_a_frame_past_the_first(backend: str, two: list[dict[str, Any]]) -> None:
    for found in two:
        # The reference, written to be read, norms the first frame too and adds up mean and variance one by one.
        assert found[f"train {backend}"] == (1 + 2 * 4 if backend == "reference" else 1 + 3)
        assert found[f"backward {backend}"] == (2 * 4 if backend == "reference" else 3)
        assert found[f"one frame {backend}"] == (1 + 2 * 1 if backend == "reference" else 1)


@every_backend
def test_eval_mode_and_a_group_of_one_talk_to_nobody(backend: str, two: list[dict[str, Any]]) -> None:
    for what in ("eval", "alone", "module in eval"):
        assert two[0][f"{what} {backend}"] == 0, what


@every_backend
def test_a_bad_argument_on_one_rank_raises_there_and_waits_for_nobody(backend: str, two: list[dict[str, Any]]) -> None:
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
def test_maps_that_do_not_fit_together_raise_on_every_rank(
    what: str, wanted: str, backend: str, two: list[dict[str, Any]]
) -> None:
    assert [found[f"{what} {backend}"] for found in two] == [f"ValueError: {wanted}"] * 2


def test_groups_of_clips_and_ranks_exclude_each_other(two: list[dict[str, Any]]) -> None:
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


def test_training_under_ddp_swapped_on_the_way_is_that_of_one_process(two: list[dict[str, Any]]) -> None:
    unit = _unit()
    wanted = _train(unit, unit, STEPS.call().x)
    for found in two:
        assert list(found["steps"]) == list(wanted)
        for name, value in wanted.items():
            assert relative_error(found["steps"][name], value) <= EXACT, name


@pytest.mark.parametrize("of", COMPILED)
def test_compiled_it_runs_outside_of_graphs_or_says_so(of: str, two: list[dict[str, Any]]) -> None:
    for found in two:
        assert "process_group: got one inside torch.compile, wanted fullgraph=False" in found[f"fullgraph {of}"]
        for eager, compiled in zip(*found[f"compiled {of}"], strict=True):
            assert relative_error(compiled, eager) <= EXACT


def of_triton(rank: int) -> list[Results]:
    return [job.run_share(rank, "triton", group_of()) for job in OF_TRITON]


OF_TRITON = [
    Job(Case((3, 3, 6, 2, 2), inputs=inputs, attention=attention), (2, 1))
    for inputs, attention in (("appearance+motion", "both"), ("raw", "channel"), ("appearance", "spatial"))
] + [replace(SHAPES[0], case=Case((2, 2, 5, 1, 1), hidden=3))]


@pytest.mark.skipif(not triton.interpreted(), reason="needs TRITON_INTERPRET=1")
def test_triton_on_two_ranks_gives_what_one_process_gives(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = in_ranks(2, tmp_path_factory.mktemp("triton"), of_triton)
    for job, results in zip(OF_TRITON, zip(*found, strict=True), strict=True):
        assert_as_one_process(job, list(results))
