"""compute-sanitizer on one small forward and backward of each operator.

python3 -m benchmarks.gpu.sanitizer     # the calls alone
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import rru_fast
from rru_fast import backends

TOOLS = ("memcheck", "racecheck")
# Exclude PyTorch's own kernels, if the tool can.
EXCLUDE = ["--kernel-name-exclude", "kns=at6native"]
# The caching allocator would hide accesses out of bounds.
ENVIRONMENT = {"RRU_FAST_AUTOTUNE": "0", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error")


def small_calls(device: torch.device) -> None:
    """Run the unit and the loss on a few elements, forward and backward."""
    unit = rru_fast.RRU(40, (3, 2), hidden=20, backend="triton").to(device)
    x = torch.randn(3, 3, 40, 3, 2, device=device, requires_grad=True)
    torch.autograd.grad(unit(x).features.square().sum(), [x, *unit.parameters()])
    if "cuda" in backends.serving(device):
        unit = rru_fast.RRU(300, (3, 2), hidden=20, backend="cuda").to(device)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 3, 300, 3, 2, device=device, dtype=dtype)
            with torch.no_grad():
                unit.eval()(x)
            unit.train()(x.requires_grad_()).features.float().square().sum().backward()
    for n in (12, 70):  # anchors that the backward scans, and that it sorts
        for metric in ("euclidean", "cosine"):
            features, gallery = (torch.randn(2, rows, 40, device=device, requires_grad=True) for rows in (n, 20))
            labels, gallery_labels = (torch.arange(rows, device=device) // 4 for rows in (n, 20))
            options: dict[str, Any] = {"margin": 0.4, "metric": metric, "backend": "triton"}
            losses: list[Any] = [rru_fast.batch_hard_triplet(features, labels, **options)]
            options |= {"gallery": gallery, "gallery_labels": gallery_labels}
            losses.append(rru_fast.batch_hard_triplet(features, labels, **options))
            torch.autograd.backward(losses)


def find_tool() -> str | None:
    """Return the path of compute-sanitizer, None if it is not installed."""
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def sanitize(root: Path, tool: str) -> Iterator[dict[str, Any]]:
    """Yield the last lines of each check, and "failed" if it reports errors or ends without a summary."""
    known = subprocess.run([tool, "--help"], capture_output=True, text=True, check=False).stdout
    options = EXCLUDE if EXCLUDE[0] in known else []
    for check in TOOLS:
        process = subprocess.Popen(
            [tool, "--tool", check, *options, sys.executable, "-m", __name__],
            cwd=root,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:  # logged at once: the part may be killed at its time limit
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        status = process.wait()
        yield {check: lines[-6:]}
        errors = count_errors("\n".join(lines))
        if errors is None or status:
            yield {"failed": f"{check}: status {status}, {'no summary' if errors is None else 'with one'}"}
        elif errors:
            yield {"failed": f"{check}: {errors} errors"}


def count_errors(output: str) -> int | None:
    """Return the number of errors in a tool's summary, None without a summary."""
    found = [int(first or second) for first, second in SUMMARY.findall(output)]
    return sum(found) if found else None


if __name__ == "__main__":
    small_calls(torch.device("cuda"))
    torch.cuda.synchronize()
