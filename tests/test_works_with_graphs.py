"""Operators and accelerated third-party modules under torch.compile, torch.export and torch.jit.trace."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rru_fast
from rru_fast.testing import relative_error
from tests import test_errors
from tests.helpers import third_party
from tests.helpers.modules import every_unit, first_two, maps


@every_unit
@pytest.mark.parametrize(
    ("training", "marked"), [(True, False), (False, True)], ids=["training, noticed", "eval, marked"]
)
def test_a_compiled_unit_takes_any_number_of_clips_without_recompiling(
    plain: Callable[[], nn.Module], training: bool, marked: bool
) -> None:
    torch._dynamo.reset()
    eager = rru_fast.accelerate(plain()).train(training)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    started = maps(3)
    if marked:
        torch._dynamo.mark_dynamic(started, 0)
    # Without the mark, the second size makes the dimension dynamic.
    for x in (started,) if marked else (started, maps(4)):
        eager(x), compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for clips in (2, 5, 8):
            x = maps(clips)
            for got, wanted in zip(first_two(compiled(x)), first_two(eager(x)), strict=True):
                assert relative_error(got, wanted) <= 1e-6


def test_losses_and_pooling_compiled_take_any_batch_without_recompiling() -> None:
    torch._dynamo.reset()
    accelerated = rru_fast.accelerate(third_party.TripletLoss())
    fast = rru_fast.BatchHardTripletLoss()

    def everything(features: Tensor, labels: Tensor, s: Tensor) -> Tensor:
        strips = rru_fast.strip_pool(s)
        return accelerated(features, labels) + fast(features, labels) + fast(strips.permute(2, 0, 1), labels)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")

    def batch(n: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(n, 5), torch.arange(n) // 2, maps(n)

    compiled(*batch(4)), compiled(*batch(6))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (8, 10):
            arguments = batch(n)
            assert torch.allclose(compiled(*arguments), everything(*arguments), rtol=1e-6)


@every_unit
def test_an_exported_model_takes_any_number_of_clips(plain: Callable[[], nn.Module], tmp_path: Path) -> None:
    module = rru_fast.accelerate(plain()).eval()
    clips = torch.export.Dim("clips")
    program = torch.export.export(module, (maps(2),), dynamic_shapes={"x": {0: clips}})
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for number in (2, 5):
        x = maps(number)
        for got, wanted in zip(first_two(loaded(x)), first_two(module(x)), strict=True):
            assert relative_error(got, wanted) <= 1e-6


def test_an_exported_unit_takes_ragged_batches_and_chunks_of_any_length() -> None:
    unit, clips, frames = (
        rru_fast.RRU(6, (4, 4), hidden=8).eval(),
        torch.export.Dim("clips"),
        torch.export.Dim("frames"),
    )
    x, sizes = maps(5, 7), {0: clips, 1: frames}
    with torch.no_grad():  # with gradients the program also saves tensors for the backward, and needs at least 3 frames
        ragged = torch.export.export(
            unit, (maps(2), torch.tensor([1, 4])), dynamic_shapes={"x": sizes, "lengths": {0: clips}}
        )
        lengths = torch.tensor([1, 2, 3, 4, 7])
        assert torch.equal(ragged.module()(x, lengths).strips, unit(x, lengths).strips)
        state = unit(maps(2)).state
        assert state is not None
        of_state = rru_fast.State({0: clips}, {0: clips})  # type: ignore[arg-type]
        chunk = torch.export.export(unit, (maps(2),), {"state": state}, dynamic_shapes={"x": sizes, "state": of_state})
        rest = chunk.module()(x[:, 3:], state=unit(x[:, :3]).state)
        assert torch.allclose(rest.features, unit(x).features[:, 3:], atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("differentiated", [True, False])
def test_a_traced_model_takes_any_batch_with_and_without_gradients(differentiated: bool) -> None:
    module, labels = EveryOperator().eval(), torch.tensor([0, 0, 1, 1])
    with torch.set_grad_enabled(differentiated):
        traced = torch.jit.trace(module, (maps(4), labels))
    x = maps(6, 5)
    arguments = (x, torch.arange(6) // 2)
    with torch.no_grad():
        for got, wanted in zip(traced(*arguments), module(*arguments), strict=True):
            assert relative_error(got, wanted) <= 1e-6
    if differentiated:
        leaf = x.clone().requires_grad_()
        got, wanted = (
            torch.autograd.grad(sum(v.square().sum() for v in run(leaf, arguments[1])), leaf)[0]
            for run in (traced, module)
        )
        assert relative_error(got, wanted) <= 1e-6


class EveryOperator(nn.Module):
    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unit = rru_fast.RRU(6, (4, 4), hidden=8, backend=backend)
        self.loss = rru_fast.BatchHardTripletLoss(0.5, backend=backend)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        refined = self.unit(x)
        strips = rru_fast.strip_pool(x, backend=self.unit.backend)
        return refined.features, strips, self.loss(strips.permute(2, 0, 1), labels)


def test_a_backward_by_compiled_autograd_equals_eager() -> None:
    gradients = []
    for compiled in (False, True):
        module, x = EveryOperator(), maps(4).requires_grad_()
        loss = sum(v.square().sum() for v in module(x, torch.tensor([0, 0, 1, 1])))
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")) if compiled else nullcontext():
            loss.backward()
        gradients.append((x.grad, module.unit.transition.weight.grad))
    for eager, graph in zip(*gradients, strict=True):
        assert torch.equal(eager, graph)


def run_without_kernels(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script with a copy of the library that has no compiled kernels."""
    library, tests_ = Path(rru_fast.__file__).parent, Path(__file__).parent
    for package in (library, tests_):
        shutil.copytree(
            package, folder / package.name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "training")
        )
    shutil.copytree(tests_.parent / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("results"))
    shutil.copytree(tests_.parent / "build_tools", folder / "build_tools")
    code = f"import torch; from tests.test_works_with_graphs import *\n{script}"
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def operators_run(work: Callable[[], object]) -> set[str]:
    with torch.profiler.profile() as profile:
        work()
    return {event.key for event in profile.key_averages() if event.key.startswith("rru_fast::")}


needs_kernels = pytest.mark.skipif(rru_fast.backends.BACKENDS["cpu"] is not None, reason="no compiled kernels")
OPERATORS = {"rru_fast::refine", "rru_fast::strip_pool", "rru_fast::batch_hard"}


@needs_kernels
def test_a_program_exported_with_kernels_runs_without_them(tmp_path: Path) -> None:
    module, x, labels = EveryOperator().eval(), maps(4), torch.tensor([0, 0, 1, 1])
    with torch.no_grad():
        torch.export.save(torch.export.export(module, (x, labels)), tmp_path / "model.pt2")
        wanted = module(x, labels)
    torch.save((x, labels), tmp_path / "inputs.pt")
    run = "torch.set_grad_enabled(False); program = torch.export.load('model.pt2').module(); "
    run += "results = program(*torch.load('inputs.pt')); "
    done = run_without_kernels(tmp_path, f"{run} torch.save(results, 'results.pt')")
    assert done.returncode == 0, done.stderr
    for got, right in zip(torch.load(tmp_path / "results.pt"), wanted, strict=True):
        assert relative_error(got, right) <= 1e-6


@needs_kernels
def test_autograd_without_kernels_raises_the_errors_of_the_kernels(tmp_path: Path) -> None:
    raised = []
    for call in (test_errors.second_order, test_errors.backward_without_save):
        with pytest.raises(RuntimeError) as caught:
            call()
        raised.append(str(caught.value))
    calls = "(test_errors.second_order, test_errors.backward_without_save)"
    done = run_without_kernels(tmp_path, f"for call in {calls}: print(pytest.raises(RuntimeError, call).value)")
    assert done.stdout.splitlines() == raised, done.stderr


@needs_kernels
def test_autograd_without_kernels_passes_the_tests_of_the_kernels(tmp_path: Path) -> None:
    run = "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/ops/test_autograd.py']))"
    done = run_without_kernels(tmp_path, f"import sys; {run}")
    assert done.returncode == 0, done.stdout


@needs_kernels
def test_a_program_exported_without_kernels_uses_them_where_available(tmp_path: Path) -> None:
    write = "x = maps(4), torch.tensor([0, 0, 1, 1]); program = torch.export.export(EveryOperator().eval(), x); "
    done = run_without_kernels(tmp_path, f"{write} torch.export.save(program, 'model.pt2')")
    assert done.returncode == 0, done.stderr
    program = torch.export.load(tmp_path / "model.pt2").module()
    x, labels = maps(4).requires_grad_(), torch.tensor([0, 0, 1, 1])
    # Kernels called from Python would be operators named ..._python.
    assert operators_run(lambda: program(x, labels)) == OPERATORS
    wanted = EveryOperator().eval()(x, labels)
    for got, right in zip(program(x, labels), wanted, strict=True):
        assert relative_error(got, right) <= 1e-6
    gradients = [torch.autograd.grad(sum(v.square().sum() for v in out), x)[0] for out in (program(x, labels), wanted)]
    assert relative_error(*gradients) <= 1e-6


@needs_kernels
def test_a_program_exported_for_an_unavailable_backend_names_it(tmp_path: Path) -> None:
    with torch.no_grad():
        program = torch.export.export(EveryOperator("cpu").eval(), (maps(4), torch.tensor([0, 0, 1, 1])))
    torch.export.save(program, tmp_path / "model.pt2")
    run = "torch.set_grad_enabled(False); torch.export.load('model.pt2').module()(maps(4), torch.tensor([0, 0, 1, 1]))"
    done = run_without_kernels(tmp_path, run)
    assert done.stderr.splitlines()[-1].startswith(
        "ValueError: backend: got 'cpu', wanted 'auto' or one of 'reference'"
    )
