"""accelerate and restore."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rru_fast
from rru_fast import reference


class Video(nn.Module):
    """A model of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.refine = nn.Sequential(nn.Identity(), reference.RRU(6, (3, 2), hidden=5))
        self.again = self.refine[1]  # shared
        self.loss = reference.BatchHardTripletLoss(margin=0.4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        out = self.again(self.refine(x).features)
        return self.loss(out.strips.permute(2, 0, 1), labels) + self.loss(out.features.mean((1, 3, 4)), labels)


def test_a_swapped_model_gives_the_same_losses_and_gradients_and_comes_back() -> None:
    model, labels = Video().double(), torch.tensor([0, 0, 1, 1])
    x = torch.randn(4, 3, 6, 3, 2, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    before = model(x, labels)
    wanted = torch.autograd.grad(before, list(parameters.values()))
    keys = list(model.state_dict())

    assert rru_fast.accelerate(model) is model
    assert type(model.again) is rru_fast.RRU
    assert type(model.loss) is rru_fast.BatchHardTripletLoss
    after = model(x, labels)
    for got, want in zip(torch.autograd.grad(after, list(parameters.values())), wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    assert torch.allclose(after, before, rtol=1e-12)
    assert list(model.state_dict()) == keys

    assert rru_fast.restore(model) is model
    assert type(model.again) is reference.RRU
    assert type(model.loss) is reference.BatchHardTripletLoss
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    assert vars(model.loss).keys() == vars(reference.BatchHardTripletLoss()).keys()


def test_hooks_and_optimizers_survive() -> None:
    model = reference.RRU(6, (3, 2), hidden=5)
    seen: list[int] = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.features.shape[1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rru_fast.accelerate(model)
    weight = model.transition.weight.clone()
    model(torch.randn(2, 3, 6, 3, 2)).strips.square().sum().backward()
    optimizer.step()
    assert seen == [3]
    assert not torch.equal(model.transition.weight, weight)


def test_the_chosen_backend_is_what_runs() -> None:
    model = rru_fast.accelerate(reference.RRU(6, (3, 2), hidden=5), backend="composite")
    assert model.backend == "composite"
    with pytest.raises(ValueError, match="backend: got 'warp', wanted 'auto' or one of"):
        rru_fast.accelerate(reference.RRU(6, (3, 2)), backend="warp")


def test_accelerating_again_changes_the_backend() -> None:
    model = rru_fast.accelerate(reference.RRU(6, (3, 2)), backend="reference")
    assert rru_fast.accelerate(model, backend="composite").backend == "composite"
    assert type(rru_fast.restore(model)) is reference.RRU


def test_modules_built_fast_stay_fast_through_restore() -> None:
    model = nn.ModuleList([rru_fast.RRU(6, (3, 2)), reference.RRU(6, (3, 2))])
    rru_fast.restore(rru_fast.accelerate(model))
    assert [type(module) for module in model] == [rru_fast.RRU, reference.RRU]


def test_a_subclass_with_a_forward_of_its_own_is_left_alone() -> None:
    class Doubled(reference.RRU):
        def forward(self, x, lengths=None, state=None):  # type: ignore[no-untyped-def]
            return super().forward(2 * x, lengths, state)

    with pytest.warns(UserWarning, match="accelerate: Doubled holds no module to swap"):
        assert type(rru_fast.accelerate(Doubled(6, (3, 2)))) is Doubled


def test_nothing_to_restore_warns() -> None:
    with pytest.warns(UserWarning, match="restore: Linear holds no accelerated module"):
        rru_fast.restore(nn.Linear(2, 2))


def test_copies_of_an_accelerated_model_can_be_restored() -> None:
    model = copy.deepcopy(rru_fast.accelerate(reference.RRU(6, (3, 2))))
    assert type(rru_fast.restore(model)) is reference.RRU


def test_a_model_compiled_before_the_swap_runs_the_fast_forward_after_it() -> None:
    model = reference.RRU(6, (3, 2), hidden=5).eval()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 3, 6, 3, 2)
    before = compiled(x).features
    rru_fast.accelerate(model)
    model.backend = "nonsense"  # only the fast forward looks at it
    with pytest.raises(Exception, match="nonsense"):
        compiled(x)
    model.backend = "auto"
    assert torch.allclose(compiled(x).features, before, atol=1e-6)
    # The error left the compiler in the middle of our registration; a plain backward must not feel it.
    model.train()(x).strips.square().sum().backward()
    assert model.transition.weight.grad.abs().max() > 0
