"""Operators and accelerated third-party modules under autocast, checkpointing, inference mode and the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rru_fast
from rru_fast import reference
from rru_fast.testing import EXACT, relative_error
from tests.helpers import third_party
from tests.helpers.modules import PLAIN, SIZES, every_unit, first_two, loss_of, maps


class Video(nn.Module):
    """A user's model: a backbone, a third-party unit, and torchreid's loss on clips and strips."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, channels, 1)
        self.fuse_net = third_party.FuseNet(channels, 7, **SIZES)
        self.loss = third_party.TripletLoss(margin=2.0)

    def forward(self, frames: Tensor, labels: Tensor) -> Tensor:
        maps = self.backbone(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        clips, strips = self.fuse_net(maps)
        parts = [self.loss(strips[:, :, row].float(), labels) for row in range(strips.shape[2])]
        return self.loss(clips.float(), labels) + torch.stack(parts).mean()


def train(model: nn.Module, steps: int = 3, dtype: torch.dtype | None = None) -> tuple[list[float], Tensor]:
    """Return losses and final weights of SGD under autocast to `dtype`, with a GradScaler in float16."""
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype == torch.float16)
    losses = []
    for _ in range(steps):
        frames = torch.randn(6, 4, 3, 4, 4).to(next(model.parameters()).dtype)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = model(frames, torch.arange(6) // 2)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert dtype != torch.float16 or scaler.get_scale() == 256.0  # no step was skipped
    return losses, torch.cat([p.detach().double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_trains_as_near_to_float64_as_the_plain_model(dtype: torch.dtype) -> None:
    errors: dict[str, list[float]] = {"plain": [], "fast": []}
    for seed in range(3):
        torch.manual_seed(seed)
        plain = Video()
        fast = rru_fast.accelerate(copy.deepcopy(plain))
        before = torch.cat([p.detach().double().flatten() for p in plain.parameters()])
        _, oracle = train(copy.deepcopy(plain).double())
        for name, model in (("plain", plain), ("fast", fast)):
            _, weights = train(model, dtype=dtype)
            errors[name].append(relative_error(weights - before, oracle - before))
    assert sorted(errors["fast"])[1] <= 2 * sorted(errors["plain"])[1] + torch.finfo(dtype).eps


@every_unit
def test_checkpointing_keeps_gradients_and_updates_statistics_twice_as_batch_norm_does(
    plain: Callable[[], nn.Module],
) -> None:
    # Checkpointing runs the forward twice, and nn.BatchNorm silently counts both. So does the unit.
    slow = plain().double()
    fast, once = rru_fast.accelerate(copy.deepcopy(slow)), rru_fast.accelerate(copy.deepcopy(slow))
    x = maps(3, dtype=torch.float64)
    results = []
    for module in (slow, fast, once):
        leaf = x.clone().requires_grad_()

        def part(v: Tensor, module: nn.Module = module) -> Tensor:
            return loss_of(module(v))

        (part(leaf) if module is once else checkpoint(part, leaf, use_reentrant=False)).backward()
        results.append((leaf.grad, *(p.grad for p in module.parameters())))
    for name, wanted in slow.state_dict().items():
        assert relative_error(fast.state_dict()[name].double(), wanted.double()) <= EXACT, name
        if name.endswith("num_batches_tracked"):
            assert wanted == 2 * once.state_dict()[name]
    for wanted_, got, without in zip(*results, strict=True):
        assert relative_error(got, wanted_) <= EXACT
        assert torch.equal(got, without)


def test_a_unit_that_ends_the_checkpointed_part_counts_once() -> None:
    # Nothing after the unit is saved for the backward, so the second forward stops inside the unit.
    module = rru_fast.accelerate(PLAIN["reference"]())
    x = maps(3).requires_grad_()
    checkpoint(lambda v: module(v).strips, x, use_reentrant=False).square().sum().backward()
    assert module.state_dict()["transition_norm.num_batches_tracked"] == 4


@every_unit
def test_inference_mode_and_deterministic_mode_change_nothing(plain: Callable[[], nn.Module]) -> None:
    module, x = rru_fast.accelerate(plain()).eval(), maps(3)
    wanted = first_two(module(x))
    with torch.inference_mode():
        inferred = first_two(module(x))
    torch.use_deterministic_algorithms(True)
    try:
        determined = first_two(module(x))
        loss_of(module.train()(x)).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, c in zip(wanted, inferred, determined, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@every_unit
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_on_the_meta_device_shapes_and_strides_are_those_of_the_real_ones(
    plain: Callable[[], nn.Module], training: bool
) -> None:
    real = rru_fast.accelerate(plain()).train(training)
    meta = copy.deepcopy(real).to("meta")
    results = []
    for module, x in ((real, maps(3)), (meta, maps(3, device="meta"))):
        out = first_two(module(x))
        strips = rru_fast.strip_pool(x)
        loss = rru_fast.batch_hard_triplet(strips.permute(2, 0, 1), torch.arange(3, device=x.device))
        assert isinstance(loss, Tensor)
        (loss_of(out) + loss).backward()
        results.append((*out, strips, loss, *(p.grad for p in module.parameters())))
    for actual, shown in zip(*results, strict=True):
        assert shown.is_meta
        assert (shown.shape, shown.stride(), shown.dtype) == (actual.shape, actual.stride(), actual.dtype)


EMPTY: dict[str, tuple[Callable[[], Any], str]] = {
    "refine, by module": (lambda: rru_fast.RRU(6, (4, 4))(maps(0)), r"x: got shape \(0, 4, 6, 4, 4\)"),
    "refine, by the plain module": (lambda: reference.RRU(6, (4, 4))(maps(0)), r"x: got shape \(0, 4, 6, 4, 4\)"),
    "refine, by the third-party module": (
        lambda: rru_fast.accelerate(third_party.RRU(6, **SIZES))(maps(0)),
        r"x: got shape \(0, 4, 6, 4, 4\)",
    ),
    "strip_pool": (lambda: rru_fast.strip_pool(maps(0)), r"s: got shape \(0, 4, 6, 4, 4\)"),
    **{
        f"batch_hard_triplet, by {name}": (
            lambda loss=loss: loss(torch.randn(0, 5), torch.zeros(0, dtype=torch.int64)),  # type: ignore[misc]
            r"features: got shape \(0, 5\), wanted \(N, D\) or \(G, N, D\), every size at least 1",
        )
        for name, loss in {
            "function": rru_fast.batch_hard_triplet,
            "module": rru_fast.BatchHardTripletLoss(),
            "the plain module": reference.BatchHardTripletLoss(),
            "the third-party module": lambda *batch: rru_fast.accelerate(third_party.TripletLoss())(*batch),
        }.items()
    },
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_batch_is_refused(name: str) -> None:
    call, message = EMPTY[name]
    with pytest.raises(ValueError, match=message + "(, wanted|$)"):
        call()
