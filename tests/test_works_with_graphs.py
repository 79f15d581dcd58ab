"""The operators, and other people's modules swapped for them, under torch.compile and torch.export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rru_fast
from tests import parity, their_code
from tests.units import every_unit, first_two, maps


@every_unit
@pytest.mark.parametrize(
    ("training", "marked"), [(True, False), (False, True)], ids=["training, noticed", "eval, marked"]
)
def test_compiled_in_one_graph_it_takes_any_number_of_clips_without_recompiling(
    plain: Callable[[], nn.Module], training: bool, marked: bool
) -> None:
    torch._dynamo.reset()
    eager = rru_fast.accelerate(plain()).train(training)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    started = maps(3)
    if marked:
        torch._dynamo.mark_dynamic(started, 0)
    # Without the mark it is the second size that tells the compiler.
    for x in (started,) if marked else (started, maps(4)):
        eager(x), compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for clips in (2, 5, 8):
            x = maps(clips)
            for got, wanted in zip(first_two(compiled(x)), first_two(eager(x)), strict=True):
                assert parity.error(got, wanted) <= 1e-6


def test_losses_and_pooling_compiled_take_any_batch_without_recompiling() -> None:
    torch._dynamo.reset()
    theirs = rru_fast.accelerate(their_code.TripletLoss())
    ours = rru_fast.BatchHardTripletLoss()

    def everything(features: Tensor, people: Tensor, s: Tensor) -> Tensor:
        strips = rru_fast.strip_pool(s)
        return theirs(features, people) + ours(features, people) + ours(strips.permute(2, 0, 1), people)

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
            assert parity.error(got, wanted) <= 1e-6


def test_an_exported_unit_takes_ragged_batches_and_chunks_of_any_length() -> None:
    unit, clips, frames = (
        rru_fast.RRU(6, (4, 4), hidden=8).eval(),
        torch.export.Dim("clips"),
        torch.export.Dim("frames"),
    )
    x, sizes = maps(5, 7), {0: clips, 1: frames}
    with torch.no_grad():  # with gradients a program keeps what their backward needs, and wants 3 frames or more
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
