"""Published batch-hard losses, as their users make and call them: all of them are swapped."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch

import rru_fast
from benchmarks.implementations.losses import FORMS
from rru_fast.compat import binding, loss_examples

LABELS = torch.arange(12) // 4


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_swapped_and_gives_its_own_loss_and_gradient(name: str) -> None:
    form = FORMS[name]
    own, swapped = form.make(), form.make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the swapped one does not fall back to its own forward
        rru_fast.accelerate(swapped)
        assert binding.is_bound(swapped)
        for scale in (0.1, 1.0, 5.0):
            torch.manual_seed(0)
            features = (scale * torch.randn(12, 6, dtype=torch.float64)).requires_grad_()
            losses = [
                form.call(partial(loss_examples.run, own), features, LABELS),
                form.call(swapped, features, LABELS),
            ]
            assert losses[1].shape == ()
            gradients = [torch.autograd.grad(loss, features)[0] for loss in losses]
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-14)


def test_a_form_is_of_named_repositories_and_has_a_line_that_distinguishes_its_class() -> None:
    for name, form in FORMS.items():
        assert all(repository.count("/") == 1 for repository in form.repositories.split(", ")), name
        assert type(form.make()).__doc__, name
    lines = {type(form.make()): str(type(form.make()).__doc__) for form in FORMS.values()}
    assert len(set(lines.values())) == len(lines)
