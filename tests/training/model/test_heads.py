from __future__ import annotations

import itertools

import pytest
import torch

from training.config.presets import Recipe
from training.model.heads import LSTM, STIM, Baseline, make_head
from training.runtime.fields import update

MAPS = torch.rand(2, 5, 6, 4, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["baseline", "lstm", "stim"])
@pytest.mark.parametrize("times", [1, 5])
def test_a_head_takes_clips_of_any_length(recipe: Recipe, name: str, times: int) -> None:
    head = make_head(update(recipe, head=name, head_width=10).model, channels=6)
    assert head(MAPS[:, :times]).shape == (2, head.features)
    assert head.features == (6 if name == "baseline" else 10)


def test_baseline_is_the_mean_over_time_and_space() -> None:
    torch.testing.assert_close(Baseline(6)(MAPS), MAPS.permute(0, 2, 1, 3, 4).flatten(2).mean(2))


def test_lstm_is_the_mean_of_its_outputs_over_time() -> None:
    head = LSTM(6, 10)
    outputs, state = [], None
    for t in range(5):
        out, state = head.lstm(MAPS[:, t : t + 1].mean((3, 4)), state)
        outputs.append(out[:, 0])
    torch.testing.assert_close(head(MAPS), torch.stack(outputs).mean(0))


def test_stim_sees_the_order_of_time() -> None:
    head = STIM(6, 10).eval()
    assert not torch.allclose(head(MAPS), head(MAPS.flip(1)), rtol=1e-3)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_the_gradient_of_a_16_bit_convolution_holds_no_memory_that_was_freed(times: int) -> None:
    rng = torch.Generator().manual_seed(2)
    maps, upstream = (torch.randn(8, 64, times, 4, 2, generator=rng).bfloat16() for _ in range(2))
    convolution = STIM(6, 64).net[3].bfloat16()
    inputs = maps.float(), convolution.weight.detach().float().requires_grad_()
    (wanted,) = torch.autograd.grad(torch.nn.functional.conv3d(*inputs, padding=1), inputs[1], upstream.float())
    for _ in range(8):
        freed = [torch.full((size,), torch.nan) for size in range(1000, 400_000, 7000)]
        del freed[::2]
        (grad,) = torch.autograd.grad(convolution(maps), convolution.weight, upstream)
        # Without AVX-512 the eight clips are summed in bfloat16.
        torch.testing.assert_close(grad.float(), wanted, rtol=0, atol=8 * 2**-9 * wanted.abs().max().item())


@pytest.mark.parametrize("name", ["baseline", "lstm", "stim"])
def test_what_lies_beyond_a_clips_length_does_not_count(recipe: Recipe, name: str) -> None:
    head = make_head(update(recipe, head=name, head_width=10).model, channels=6).eval()
    if isinstance(head, STIM):
        torch.nn.init.ones_(head.net[1].bias)  # so that a frame of zeros is not zero behind the first convolution
    padded = MAPS.clone()
    padded[1, 3:] = torch.nan
    total, _ = head.stream(padded, torch.tensor([5, 3]), True, None)
    alone = torch.cat([head(MAPS[:1]) * 5, head(MAPS[1:, :3]) * 3])
    torch.testing.assert_close(total, alone)


@pytest.mark.parametrize("name", ["baseline", "lstm", "stim"])
@pytest.mark.parametrize("cuts", [(1,), (4,), (1, 2), (2, 3), (1, 2, 3, 4)])
def test_a_clip_in_chunks_is_the_clip_in_one_go(recipe: Recipe, name: str, cuts: tuple[int, ...]) -> None:
    head = make_head(update(recipe, head=name, head_width=10).model, channels=6).eval()
    total, carried = torch.zeros(2, head.features), None
    for first, end in itertools.pairwise((0, *cuts, 5)):
        part, carried = head.stream(MAPS[:, first:end], torch.full((2,), end - first), end == 5, carried)
        total += part
    torch.testing.assert_close(total / 5, head(MAPS))
