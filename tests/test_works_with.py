"""The operators, and other people's modules swapped for them, with what else of PyTorch a model meets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import rru_fast
from rru_fast import reference
from tests import parity, their_code
from tests.ranks import in_ranks

SIZES = {"size": 4, "hidden": 8, "spatial_hidden": 5}
# Plain modules from maps (B, T, 6, 4, 4); what accelerate makes of them is under test.
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: reference.RRU(6, (4, 4), hidden=8, spatial_hidden=5),
    "theirs": lambda: their_code.FuseNet(6, 7, **SIZES),
}
every_unit = pytest.mark.parametrize("plain", PLAIN.values(), ids=PLAIN.keys())


def maps(clips: int, frames: int = 4, **options: Any) -> Tensor:
    return torch.randn(clips, frames, 6, 4, 4, **options)


def first_two(out: Any) -> tuple[Tensor, Tensor]:
    """Features and strips."""
    return out[0], out[1]


def loss_of(out: Any) -> Tensor:
    features, strips = first_two(out)
    return features.float().square().mean() + strips.float().square().mean()


class Video(nn.Module):
    """A model of a user's own: a backbone, their unit, and torchreid's loss on clips and strips."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, channels, 1)
        self.fuse_net = their_code.FuseNet(channels, 7, **SIZES)
        self.loss = their_code.TripletLoss(margin=2.0)

    def forward(self, frames: Tensor, people: Tensor) -> Tensor:
        maps = self.backbone(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        clips, strips = self.fuse_net(maps)
        parts = [self.loss(strips[:, :, row].float(), people) for row in range(strips.shape[2])]
        return self.loss(clips.float(), people) + torch.stack(parts).mean()


def train(model: nn.Module, steps: int = 3, dtype: torch.dtype | None = None) -> tuple[list[float], Tensor]:
    """Losses and all weights after steps of SGD, under autocast to `dtype` and in float16 with a GradScaler."""
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
            errors[name].append(parity.error(weights - before, oracle - before))
    assert sorted(errors["fast"])[1] <= 2 * sorted(errors["plain"])[1] + torch.finfo(dtype).eps


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


@every_unit
def test_checkpointed_gradients_are_the_same_and_statistics_take_both_forwards_as_batch_norms_do(
    plain: Callable[[], nn.Module],
) -> None:
    # PyTorch's checkpointing runs the forward again, and nn.BatchNorm counts both, silently. So does the unit.
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
        assert parity.error(fast.state_dict()[name].double(), wanted.double()) <= parity.EXACT, name
        if name.endswith("num_batches_tracked"):
            assert wanted == 2 * once.state_dict()[name]
    for wanted_, got, without in zip(*results, strict=True):
        assert parity.error(got, wanted_) <= parity.EXACT
        assert torch.equal(got, without)


def test_a_unit_that_ends_the_checkpointed_part_counts_once() -> None:
    # Nothing after it is saved for the backward, so the second forward stops inside of it.
    module = rru_fast.accelerate(PLAIN["ours"]())
    x = maps(3).requires_grad_()
    checkpoint(lambda v: module(v).strips, x, use_reentrant=False).square().sum().backward()
    assert module.state_dict()["transition_norm.num_batches_tracked"] == 4


def operators() -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]]:
    """A function of one tensor by each operator, by the reference, and three inputs for it."""
    unit = PLAIN["ours"]().double().eval()
    fast, people = rru_fast.accelerate(copy.deepcopy(unit)), torch.arange(6) // 2

    def triplet(v: Tensor, backend: str) -> Tensor:
        loss = rru_fast.batch_hard_triplet(v, people, margin=3.0, backend=backend)
        assert isinstance(loss, Tensor)
        return loss

    three = maps(6, dtype=torch.float64).unflatten(0, (3, 2))
    return {
        "refine": (lambda v: fast(v).strips, lambda v: unit(v).strips, three),
        "strip_pool": (rru_fast.strip_pool, partial(rru_fast.strip_pool, backend="reference"), three),
        "batch_hard_triplet": (
            partial(triplet, backend="auto"),
            partial(triplet, backend="reference"),
            torch.randn(3, 6, 5, dtype=torch.float64),
        ),
    }


@pytest.mark.parametrize("name", ["refine", "strip_pool", "batch_hard_triplet"])
def test_vmap_is_a_loop_with_gradients(name: str) -> None:
    ours, plain, three = operators()[name]
    leaf, plain_leaf = three.clone().requires_grad_(), three.clone().requires_grad_()
    got, wanted = vmap(ours)(leaf), torch.stack([plain(v) for v in plain_leaf])
    assert parity.error(got, wanted) <= parity.EXACT
    got.square().sum().backward()
    wanted.square().sum().backward()
    assert parity.error(leaf.grad, plain_leaf.grad) <= parity.EXACT


@pytest.mark.parametrize("name", ["refine", "strip_pool", "batch_hard_triplet"])
def test_torch_func_grad_is_refused_inside_and_outside_of_vmap(name: str) -> None:
    ours, plain, three = operators()[name]
    for transform in (
        lambda f: grad(lambda v: f(v).sum())(three[0]),
        lambda f: grad(lambda v: vmap(f)(v).sum())(three),
        lambda f: vmap(grad(lambda v: f(v).sum()))(three),
    ):
        wanted = rf"rru_fast\.{name}: forward-mode and torch\.func derivatives are not implemented, backend='reference'"
        with pytest.raises(RuntimeError, match=wanted):
            transform(ours)
        if name != "refine":  # BatchNorm's own rules differ with the transforms
            assert transform(plain).abs().max() > 0


def test_an_ensemble_runs_and_learns_under_vmap() -> None:
    members = [rru_fast.RRU(6, (4, 4), hidden=8).eval() for _ in range(3)]
    weights, buffers = stack_module_state(members)  # type: ignore[arg-type]
    skeleton, x = copy.deepcopy(members[0]).to("meta"), maps(2)
    strips = vmap(lambda w, b: functional_call(skeleton, (w, b), (x,)).strips)(weights, buffers)
    alone = torch.stack([member(x).strips for member in members])
    assert torch.equal(strips, alone)
    strips.square().sum().backward()
    alone.square().sum().backward()
    for n, member in enumerate(members):
        assert torch.allclose(weights["transition.weight"].grad[n], member.transition.weight.grad, atol=1e-7)


@pytest.mark.filterwarnings("ignore:There is a performance drop because")  # vmap's own loop is what is wanted
def test_vmap_does_not_mix_the_running_statistics_of_its_calls() -> None:
    unit = rru_fast.RRU(6, (4, 4), hidden=8)
    x = torch.stack([maps(2), maps(2)])
    with pytest.raises(RuntimeError, match="running_mean, running_var: got the same for every call of vmap, wanted"):
        vmap(lambda v: unit(v).strips)(x)
    assert torch.equal(unit.transition_norm.running_mean, torch.zeros(8))
    assert unit.transition_norm.num_batches_tracked == 0

    means, variances = torch.zeros(2, 8), torch.ones(2, 8)

    def call(v: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        norm, w = unit.transition_norm, unit.transition.weight.flatten(1)
        settings: dict[str, Any] = {"running_mean": mean, "running_var": var, "training": True}
        w_c = unit.channel_attention.weight
        return rru_fast.refine(v, w, norm.weight, norm.bias, w_c=w_c, **settings).strips

    vmap(call)(x, means, variances)
    for v, mean, var in zip(x, means, variances, strict=True):
        alone = torch.zeros(8), torch.ones(8)
        call(v, *alone)
        assert torch.equal(mean, alone[0])
        assert torch.equal(var, alone[1])


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
    "refine, by their module": (
        lambda: rru_fast.accelerate(their_code.RRU(6, **SIZES))(maps(0)),
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
            "their module": lambda *batch: rru_fast.accelerate(their_code.TripletLoss())(*batch),
        }.items()
    },
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_batch_is_refused_by_all(name: str) -> None:
    call, message = EMPTY[name]
    with pytest.raises(ValueError, match=message + "(, wanted|$)"):
        call()


def steps_on_ranks(rank: int) -> dict[str, Any]:
    """Three steps on this rank's clips, each way; and what FSDP2 and swapping say to each other."""
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
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_train_as_plain_modules_under_ddp(how: str, name: str, two: list[dict[str, Any]]) -> None:
    for found in two:
        assert list(found[f"{name} {how}"]) == list(found[f"{name} plain ddp"])
        for parameter, wanted in found[f"{name} plain ddp"].items():
            assert parity.error(found[f"{name} {how}"][parameter], wanted) <= parity.EXACT, parameter


@pytest.mark.parametrize("name", PLAIN)
def test_a_module_that_is_sharded_itself_is_not_restored_but_one_inside_is(
    name: str, two: list[dict[str, Any]]
) -> None:
    cls = "RRU" if name == "ours" else "FuseNet"
    for found in two:
        assert found[f"{name} restored"].startswith(f"restore: got a FSDP{cls}, wanted the {cls} that accelerate made")
        assert found[f"{name} inside"]
