"""Test the C++ kernels against the oracle at the SIMD capability that the environment allows.

`python -m tests.parity_here` prints the capability and True if bf16 is multiplied in bf16; it raises on a mismatch.
"""

from __future__ import annotations

import torch
from torch import Tensor

import rru_fast
from rru_fast import native
from rru_fast.testing import assert_parity, gradients
from tests import parity
from tests.parity import Case, Results

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CASES = [
    Case(),
    Case(mode="eval", attention="spatial"),
    Case(mode="ragged", inputs="appearance"),
    Case(mode="continued", attention="channel"),
    Case((6, 3, 5, 2, 2), inputs="raw", bn_groups=3),
    Case((2, 3, 7, 1, 1), hidden=3),  # one position
    Case((3, 3, 70, 9, 8), hidden=70),  # more positions, channels and gate channels than a tile
    Case((5, 2, 600, 4, 4), hidden=66, inputs="raw"),  # the product's inner dimension takes several blocks
]


def weights(f: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, f.numel(), dtype=torch.float64).view(f.shape).to(f)


def strip_pool(s: Tensor, backend: str) -> Results:
    leaf = s.clone().requires_grad_()
    strips = rru_fast.strip_pool(leaf, backend=backend)
    return {"strips": strips.detach(), **gradients([strips], [weights(strips)], {"s": leaf})}


def batch_hard(features: Tensor, backend: str) -> Results:
    leaf, labels = features.clone().requires_grad_(), torch.arange(features.shape[1]) % 7
    loss = rru_fast.batch_hard_triplet(leaf, labels, reduction="none", backend=backend)
    return {"loss": loss.detach(), **gradients([loss], [weights(loss)], {"features": leaf})}


def main() -> None:
    assert native.missing() is None, native.missing()
    torch.manual_seed(0)
    for dtype in DTYPES:
        for case in CASES:
            parity.assert_refine_parity(case, dtype, "cpu", {torch.float64: 1, torch.float32: 15}.get(dtype, 5))
        for op, shape in ((strip_pool, (2, 3, 70, 9, 7)), (batch_hard, (2, 40, 33))):
            drawn = []
            for _ in range(5):
                x = torch.randn(shape).to(dtype)
                drawn.append((op(x, "cpu"), op(x, "reference"), op(x.double(), "reference")))
            assert_parity(drawn)
    print(torch.backends.cpu.get_cpu_capability(), native.multiplies_bfloat16())  # noqa: T201


if __name__ == "__main__":
    main()
