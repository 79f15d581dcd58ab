"""Accelerated modules under DistributedDataParallel and FSDP2. One spawn of two ranks runs everything."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rru_fast
from rru_fast.testing import EXACT, relative_error
from tests.helpers.modules import PLAIN, first_two, maps
from tests.ranks import in_ranks


def steps_on_ranks(rank: int) -> dict[str, Any]:
    """Take three steps on this rank's clips under DDP and FSDP2, and restore modules that FSDP2 has sharded."""
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    for name, plain in PLAIN.items():
        torch.manual_seed(0)
        module = plain().double()
        sharded = rru_fast.accelerate(copy.deepcopy(module))
        fully_shard(sharded, mesh=mesh)
        ddp = DistributedDataParallel(copy.deepcopy(module))
        found[f"{name} ddp"] = _three_steps(ddp, rank, swap=True)
        found[f"{name} plain ddp"] = _three_steps(DistributedDataParallel(module), rank, swap=False)
        found[f"{name} fsdp"] = _three_steps(sharded, rank, swap=False)
        try:
            rru_fast.restore(sharded)
        except TypeError as error:
            found[f"{name} restored"] = str(error)
        inside = nn.Sequential(rru_fast.accelerate(plain()))
        fully_shard(inside, mesh=mesh)
        inside(maps(2))
        found[f"{name} inside"] = type(rru_fast.restore(inside)[0]).__qualname__ == type(plain()).__qualname__
    return found


def _three_steps(model: nn.Module, rank: int, swap: bool) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(rank)
    for step in range(3):
        if swap and step == 1:
            rru_fast.accelerate(model)
        if swap and step == 2:
            rru_fast.restore(model)
        optimizer.zero_grad()
        out = first_two(model(maps(2, dtype=torch.float64, generator=generator)))
        (out[0].square().mean() + out[1].square().mean()).backward()
        optimizer.step()
    gathered = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    return {name.removeprefix("module."): value.detach() for name, value in gathered.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not dist.is_gloo_available():
        pytest.skip("needs gloo")
    return in_ranks(2, tmp_path_factory.mktemp("works_with"), steps_on_ranks)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_ranks_train_as_plain_modules_under_ddp(wrapper: str, name: str, two: list[dict[str, Any]]) -> None:
    for found in two:
        assert list(found[f"{name} {wrapper}"]) == list(found[f"{name} plain ddp"])
        for parameter, wanted in found[f"{name} plain ddp"].items():
            assert relative_error(found[f"{name} {wrapper}"][parameter], wanted) <= EXACT, parameter


@pytest.mark.parametrize("name", PLAIN)
def test_restore_refuses_a_sharded_module_but_restores_one_inside_it(name: str, two: list[dict[str, Any]]) -> None:
    cls = "RRU" if name == "reference" else "FuseNet"
    for found in two:
        assert found[f"{name} restored"].startswith(f"restore: got a FSDP{cls}, wanted the {cls} that accelerate made")
        assert found[f"{name} inside"]
