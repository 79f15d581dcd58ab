"""Published batch-hard losses, as the benchmark has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks import losses
from benchmarks.implementations.losses import FORMS, check, pairs

N = 12
FEATURES, LABELS = torch.randn(N, 6, generator=torch.Generator().manual_seed(0)), torch.arange(N) // 4


class _Indexings(TorchFunctionMode):
    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is Tensor.__getitem__
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(6, 8), (4, 8), (0, 8), (-4, 8), (8, 0)], ids=str)
def test_a_shape_that_does_not_fit_is_an_error(shape: tuple[int, int]) -> None:
    n, d = shape
    with pytest.raises(SystemExit, match=rf"^shapes: got N {n}, D {d}, wanted N a multiple of 4 from 8, and D from 1$"):
        losses.main(losses.Options(shapes=((16, 8), shape)))


@pytest.mark.parametrize("name", FORMS)
def test_a_form_loops_over_anchors_where_it_says_so(name: str) -> None:
    form = FORMS[name]
    with _Indexings() as indexings:
        form.call(form.make(), FEATURES, LABELS)
    assert form.loops == (indexings.count >= 2 * N)


def test_a_form_is_of_named_repositories_and_has_a_line_that_distinguishes_its_class() -> None:
    for name, form in FORMS.items():
        assert all(repository.count("/") == 1 for repository in form.repositories.split(", ")), name
    lines = {type(form.make()): type(form.make()).__doc__ for form in FORMS.values()}
    assert None not in lines.values()
    assert len(set(lines.values())) == len(lines)


def test_a_swapped_loss_that_runs_its_own_forward_is_not_measured() -> None:
    pair = pairs("composite")["torchreid"]
    check("torchreid", pair, FEATURES, LABELS)
    pair.swapped.args[0].margin = 0.5  # type: ignore[attr-defined]
    with pytest.raises(SystemExit, match=r"torchreid is not swapped: .* runs its own forward, since its margin"):
        check("torchreid", pair, FEATURES, LABELS)


def test_an_error_of_1e_5_is_found_in_every_form_and_none_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    for name, pair in pairs("composite").items():
        check(name, pair, torch.randn(16, 8), torch.arange(16) // 4)
        wrong = pair._replace(swapped=lambda f, y, own=pair.swapped: own(f, y) * (1 + 1e-5))
        with pytest.raises(SystemExit, match=r"is off by \S+ in loss"):
            check(name, wrong, torch.randn(16, 8), torch.arange(16) // 4)
    assert capsys.readouterr().out.count("is within") == len(FORMS)
