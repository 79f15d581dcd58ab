from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rru_fast.reference import RRU
from rru_fast.types import Attention, Inputs
from training.show.gate import gate


class Sigmoids(TorchFunctionMode):
    """Records the result of every sigmoid inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[Tensor] = []

    def __torch_function__(
        self, called: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = called(*args, **(kwargs or {}))
        if called is torch.sigmoid:
            self.opened.append(result)
        return result


@pytest.mark.parametrize("attention", get_args(Attention))
@pytest.mark.parametrize("inputs", get_args(Inputs))
@torch.no_grad()
def test_the_gate_is_the_one_that_the_reference_opens(attention: Attention, inputs: Inputs) -> None:
    rru = RRU(6, (4, 2), hidden=5, spatial_hidden=3, attention=attention, inputs=inputs).double()
    for parameter in rru.parameters():
        parameter.normal_()
    rru.train()(torch.randn(2, 9, 6, 4, 2, dtype=torch.float64))  # running statistics that are not 0 and 1
    x = torch.randn(1, 7, 6, 4, 2, dtype=torch.float64)
    with Sigmoids() as sigmoids:
        s = rru.eval()(x).features[0]
    x = x[0]
    opened = gate(rru, x[1:], s[:-1], x[:-1])
    assert opened.shape == x[1:].shape
    assert opened.std() > 0.01
    torch.testing.assert_close(opened, torch.cat(sigmoids.opened[1:]).expand_as(opened), rtol=1e-12, atol=0)
