"""What the CUDA kernels take for granted of a GPU, to be checked before they run: fragments, pushes, clusters that fit.

python3 -m benchmarks.gpu --only cuda
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "TF32": torch.float32}
CTAS = (1, 2, 4, 8, 16)  # of a cluster


def fragments(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield, per dtype, the clusters in which one matrix instruction gives the product of small integers."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    generator = torch.Generator().manual_seed(0)
    for name, dtype in DTYPES.items():
        depth = 8 if dtype == torch.float32 else 16
        a, b = (torch.randint(-8, 9, shape, generator=generator).float() for shape in ((16, depth), (depth, 8)))
        right = []
        for ctas in CTAS:
            found = torch.ops.rru_fast.cuda_fragments(a.to(device), b.to(device), dtype, ctas, stream).cpu()
            by_rank = 1000.0 * torch.arange(ctas)[:, None, None]
            if torch.equal(found, a @ b + by_rank):
                right.append(ctas)
            else:
                yield {"failed": f"fragments, {name}, cluster of {ctas}: {wrong_elements(found, a @ b + by_rank)}"}
        yield {f"fragments, {name}": {"right in clusters of": right}}
    yield {"TF32 operands": tf32_operands(device, stream)}


def wrong_elements(found: torch.Tensor, wanted: torch.Tensor) -> str:
    """Return how many elements are wrong, and the first of them."""
    wrong = (found != wanted).nonzero()
    first = tuple(wrong[0].tolist())
    return f"{len(wrong)} of {wanted.numel()} wrong, at {first} {found[first]:g}, wanted {wanted[first]:g}"


def tf32_operands(device: torch.device, stream: int) -> str:
    """Return what happens to the low 13 bits of an operand: "dropped" or "rounded"."""
    a, b = torch.zeros(16, 8), torch.zeros(8, 8)
    a[0, 0], b[0, 0] = 1 + 2**-10 + 2**-11 + 2**-12, 1.0
    found = torch.ops.rru_fast.cuda_fragments(a.to(device), b.to(device), torch.float32, 1, stream)[0, 0, 0].item()
    return {1 + 2**-10: "dropped", 1 + 2**-9: "rounded"}.get(found, f"neither: {found!r}")
