"""Fast modules against their reference twins, and with PyTorch's own tools: pruning, autocast, copies, ranks."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import update_bn
from torch.utils._python_dispatch import TorchDispatchMode

import rru_fast
from rru_fast import reference
from rru_fast.testing import EXACT, relative_error
from tests import parity


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.3)


def with_pruned_norm(unit: nn.Module) -> nn.Module:
    for name in ("weight", "bias"):
        prune.random_unstructured(unit.transition_norm, name, 0.5)  # type: ignore[arg-type]
    return unit


def twins(**settings: Any) -> tuple[rru_fast.RRU, reference.RRU]:
    fast = rru_fast.RRU(6, (3, 2), hidden=5, spatial_hidden=4, **settings).double()
    plain = reference.RRU(6, (3, 2), hidden=5, spatial_hidden=4, **settings).double()
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def train(module: nn.Module, x: Tensor) -> None:
    """Take three steps of SGD; assert that every parameter has a gradient in each."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        module(x).features.square().mean().backward()
        assert all(p.grad is not None and p.grad.norm() > 0 for p in module.parameters())
        optimizer.step()


@pytest.mark.parametrize("inputs", ["appearance+motion", "appearance", "raw"])
@pytest.mark.parametrize("attention", ["both", "spatial", "channel"])
@pytest.mark.parametrize("bn_groups", [1, 2])
def test_three_training_steps_leave_twins_equal(inputs: str, attention: str, bn_groups: int) -> None:
    fast, plain = twins(inputs=inputs, attention=attention, bn_groups=bn_groups)
    for step in range(3):
        x = torch.randn(4, 5, 6, 3, 2, dtype=torch.float64)
        for module in (fast, plain):
            module.zero_grad()
            out = module(x)
            (out.features[:, -1].square().sum() + out.strips.sum()).backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= 0.01 * parameter.grad  # type: ignore[operator]
        assert fast.transition_norm.num_batches_tracked == 5 * (step + 1)
    for name, wanted in plain.state_dict().items():
        assert relative_error(fast.state_dict()[name], wanted) <= EXACT, name


def test_running_statistics_take_every_step() -> None:
    fast, _ = twins()
    fast.transition_norm.running_mean.fill_(1.0)  # type: ignore[union-attr]
    x = torch.randn(4, 1, 6, 3, 2, dtype=torch.float64)
    fast(x)  # one frame: the gate sees zeros, mean 0 and variance 0
    assert torch.allclose(fast.transition_norm.running_mean, torch.full((5,), 0.9, dtype=torch.float64))
    assert torch.allclose(fast.transition_norm.running_var, torch.full((5,), 0.9, dtype=torch.float64))


@pytest.mark.parametrize("backend", parity.BACKENDS)
def test_without_a_momentum_statistics_are_the_mean_over_all_frames(backend: str) -> None:
    fast, plain = twins()
    fast.backend = backend
    fast.transition_norm.momentum = plain.transition_norm.momentum = None
    batches = [torch.randn(4, frames, 6, 3, 2, dtype=torch.float64) for frames in (3, 5)]
    for module in (fast, plain):
        update_bn(batches, module)
    assert fast.transition_norm.num_batches_tracked == plain.transition_norm.num_batches_tracked == 8
    arguments = reference.modules.batch_norm_arguments(fast.eval().transition_norm, 3)
    assert arguments["momentum"] == 0  # a number, not a list: CUDA graphs can replay the call
    # With a momentum of 1 the statistics are the last frame's.
    steps = []
    plain.transition_norm.momentum = 1.0
    for x in batches:
        for frames in range(1, x.shape[1] + 1):
            plain.train()(x[:, :frames])
            steps.append(plain.transition_norm.running_var.clone())
    assert relative_error(fast.transition_norm.running_var, torch.stack(steps).mean(0)) <= EXACT


@pytest.mark.parametrize("old_style", [nn.utils.weight_norm, nn.utils.spectral_norm, pruned], ids=lambda f: f.__name__)
def test_reparametrized_weights_are_recomputed_before_each_call_and_trained(old_style: Any) -> None:
    fast, plain = twins()
    for module in (fast, plain):
        torch.manual_seed(0)
        for layer in (module.transition, module.channel_attention):
            old_style(layer)
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(4, 5, 6, 3, 2, dtype=torch.float64)
    for module in (fast, plain):
        train(module, x)
    for (name, got), wanted in zip(fast.state_dict().items(), plain.state_dict().values(), strict=True):
        assert relative_error(got.double(), wanted.double()) <= EXACT, name
    # The weight follows a change of the parameters that it is computed from.
    made = fast.channel_attention.weight.detach().clone()
    with torch.no_grad():
        next(p for n, p in fast.channel_attention.named_parameters() if "weight" in n).mul_(2)
    fast.eval()(x)
    assert old_style is nn.utils.spectral_norm or not torch.equal(fast.channel_attention.weight, made)


def test_a_pruned_norm_is_recomputed_before_each_call() -> None:
    fast, plain = twins()
    torch.manual_seed(0)
    with_pruned_norm(fast)
    with_pruned_norm(plain).load_state_dict(fast.state_dict())
    x = torch.randn(4, 5, 6, 3, 2, dtype=torch.float64)
    for module in (fast, plain):
        train(module, x)
        with torch.no_grad():
            module.transition_norm.weight_orig.add_(1)
        before = module.eval()(x).features
        for name in ("weight", "bias"):
            prune.remove(module.transition_norm, name)
        assert torch.equal(module(x).features, before)
    for (name, got), wanted in zip(fast.state_dict().items(), plain.state_dict().values(), strict=True):
        assert relative_error(got.double(), wanted.double()) <= EXACT, name
    assert (fast.transition_norm.weight == 0).sum() == (fast.transition_norm.bias == 0).sum() == 2


@pytest.mark.parametrize("module", [rru_fast, reference])
def test_a_unit_is_made_on_a_device_and_in_a_dtype(module: Any) -> None:
    unit = module.RRU(6, (3, 2), device="meta", dtype=torch.bfloat16)
    floating = [v for v in unit.state_dict().values() if v.is_floating_point()]
    assert {(v.device.type, v.dtype) for v in floating} == {("meta", torch.bfloat16)}
    with torch.device("meta"):
        assert next(module.RRU(6, (3, 2)).parameters()).is_meta
    torch.manual_seed(0)
    wide = module.RRU(6, (3, 2), dtype=torch.float64)
    assert wide(torch.randn(2, 3, 6, 3, 2, dtype=torch.float64)).features.dtype == torch.float64


@pytest.mark.parametrize("module", [rru_fast, reference])
def test_a_loss_is_reduced_as_asked_and_returns_its_distances(module: Any) -> None:
    features, labels = torch.randn(3, 12, 5, dtype=torch.float64), torch.arange(12) // 3
    each = module.BatchHardTripletLoss(reduction="none")(features, labels)
    assert each.shape == (3, 12)
    assert torch.allclose(module.BatchHardTripletLoss(reduction="sum")(features, labels), each.sum(), rtol=1e-12)
    loss, d_pos, d_neg = module.BatchHardTripletLoss(return_distances=True)(features, labels)
    assert torch.allclose(loss, each.mean(), rtol=1e-12)
    assert torch.allclose((0.3 + d_pos - d_neg).relu(), each, rtol=1e-12)
    shown = repr(module.BatchHardTripletLoss(reduction="sum", return_distances=True))
    assert "reduction='sum', return_distances=True" in shown


@pytest.mark.parametrize("name", ["RRU", "BatchHardTripletLoss"])
def test_twins_have_the_same_constructor(name: str) -> None:
    fast, plain = getattr(rru_fast, name), getattr(reference, name)
    assert inspect.signature(fast.__init__) == inspect.signature(plain.__init__)


def test_parameters_have_the_documented_names_and_shapes() -> None:
    shapes = {
        name: tuple(v.shape) for name, v in rru_fast.RRU(16, (4, 2), hidden=8, spatial_hidden=3).state_dict().items()
    }
    assert shapes == {
        "transition.weight": (8, 32, 1, 1),
        "transition_norm.weight": (8,),
        "transition_norm.bias": (8,),
        "transition_norm.running_mean": (8,),
        "transition_norm.running_var": (8,),
        "transition_norm.num_batches_tracked": (),
        "spatial_attention.0.weight": (3, 8),
        "spatial_attention.2.weight": (8, 3),
        "channel_attention.weight": (16, 8),
    }


def test_a_frozen_norm_in_a_training_model_uses_its_running_statistics_unchanged() -> None:
    fast, plain = twins()
    for module in (fast, plain):
        module.transition_norm.eval()
    before = fast.transition_norm.running_mean.clone()  # type: ignore[union-attr]
    x = torch.randn(2, 3, 6, 3, 2, dtype=torch.float64)
    assert relative_error(fast(x).features, plain(x).features) <= EXACT
    assert torch.equal(fast.transition_norm.running_mean, before)
    assert fast.transition_norm.num_batches_tracked == 0


def test_bn_groups_must_divide_the_clips_only_with_batch_statistics() -> None:
    x = torch.randn(3, 3, 6, 3, 2, dtype=torch.float64)
    for module in twins(bn_groups=2):
        module.transition_norm.eval()
        assert module(x).features.isfinite().all()
        module.transition_norm.train()
        with pytest.raises(ValueError, match="x: got 3 clips, wanted a multiple of bn_groups=2"):
            module.eval().train()(x)


def test_one_value_per_channel_raises_the_error_of_batch_norm() -> None:
    for module in (cls(4, (1, 1), hidden=3) for cls in (rru_fast.RRU, reference.RRU)):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            module(torch.randn(1, 3, 4, 1, 1))


# Over several ranks: tests/ops/test_refine_sync.py.
def test_sync_batch_norm_in_one_process_equals_batch_norm_through_copies_and_swaps() -> None:
    fast, plain = twins()
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    for change in (copy.deepcopy, rru_fast.accelerate, copy.deepcopy, rru_fast.restore):
        synchronized = change(synchronized)
        assert isinstance(synchronized.transition_norm, nn.SyncBatchNorm)
        x = torch.randn(4, 5, 6, 3, 2, dtype=torch.float64)
        assert relative_error(synchronized(x).features, plain(x).features) <= EXACT
    assert list(synchronized.state_dict()) == list(plain.state_dict())
    for name, wanted in plain.state_dict().items():
        assert relative_error(synchronized.state_dict()[name], wanted) <= EXACT, name
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(fast), rru_fast.RRU)


def test_sync_batch_norm_with_bn_groups_is_refused() -> None:
    for module in twins(bn_groups=2):
        synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        with pytest.raises(ValueError, match="transition_norm: got SyncBatchNorm, wanted BatchNorm2d with bn_groups=2"):
            synchronized(torch.randn(2, 3, 6, 3, 2, dtype=torch.float64))
        synchronized.eval()(torch.randn(2, 3, 6, 3, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_16_bit_maps_with_float32_weights(dtype: torch.dtype) -> None:
    module = rru_fast.RRU(6, (3, 2), hidden=5)
    conv = nn.Conv2d(3, 6, 1)
    with torch.autocast("cpu", dtype=dtype):
        out = module(conv(torch.randn(8, 3, 3, 2)).view(2, 4, 6, 3, 2))
        assert out.features.dtype == out.strips.dtype == dtype
        out.strips.float().sum().backward()
    assert conv.weight.grad is not None
    assert module.transition.weight.grad is not None
    assert module.transition.weight.grad.dtype == torch.float32
    assert module.transition.weight.grad.abs().max() > 0


def test_autocast_does_not_change_results() -> None:
    fast, _ = twins()
    fast.float()
    x = torch.randn(2, 4, 6, 3, 2)
    features, labels = torch.randn(8, 6), torch.arange(8) // 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fast(x).features, rru_fast.batch_hard_triplet(features, labels)
    outside = fast(x).features, rru_fast.batch_hard_triplet(features, labels)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda m: torch.load(save(m), weights_only=False)], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same(make: Any) -> None:
    fast, _ = twins()
    other = make(fast)
    x = torch.randn(2, 4, 6, 3, 2, dtype=torch.float64)
    assert torch.equal(fast(x).features, other(x).features)
    assert other.transition.weight.data_ptr() != fast.transition.weight.data_ptr()


def save(module: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return buffer


class Saves(TorchDispatchMode):
    """Record the `save` argument of every call of the refine operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.rru_fast.refine.default:
            *_, save, _backend = args
            self.seen.append(save)
        return func(*args, **(kwargs or {}))


def test_inference_and_no_grad_save_nothing_and_agree() -> None:
    fast, _ = twins()
    fast.eval()
    x = torch.randn(2, 4, 6, 3, 2, dtype=torch.float64)
    with torch.inference_mode():
        inferred = fast(x)
    with torch.no_grad(), Saves() as saves:
        plain = fast(x)
    assert saves.seen == [False]
    assert inferred.features.is_inference()
    assert torch.equal(inferred.features, plain.features)
    with Saves() as saves:
        assert torch.equal(plain.features, fast(x).features)
    assert saves.seen == [True]
