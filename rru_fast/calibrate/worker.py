"""The process that measures one kind, started by `rru_fast.auto.spawn`.

Arguments: the request as JSON, and the file descriptor to which stages and the decision are written, a line each.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from rru_fast.auto import cards, kinds, processes
from rru_fast.auto.decisions import HOUR, Decision
from rru_fast.auto.kinds import Kind
from rru_fast.calibrate import measure

CLOCK: measure.Clock | None = None
"""Replaces the wall clock."""


def main() -> None:
    """Measure what is requested and write the decision."""
    processes.end_with_parent()
    request, answers = json.loads(sys.argv[1]), int(sys.argv[2])

    def write(**values: Any) -> None:
        os.write(answers, (json.dumps(values) + "\n").encode())

    device, kind = torch.device(request["device"]), kinds.from_json(request["kind"])
    torch.set_num_threads(request["threads"])
    if (uuid := cards.uuid_of(device)) != request["uuid"]:
        reason = f"another GPU is {device} in a new process: {uuid}, wanted {request['uuid']}"
        write(decision=Decision(request["default"], reason, request["default"], lasts=HOUR).to_json())
        return
    set_precision(kind)
    found = measure.measure(
        kind,
        device,
        request["default"],
        request["candidates"],
        note=lambda stage, of: write(stage=stage, of=of),
        clock=CLOCK,
    )
    write(decision=found.to_json())


def set_precision(kind: Kind) -> None:
    """Set PyTorch's precision of fp32 products to the kind's."""
    setting = getattr(kind, "precision", "").partition("/")[0]
    if setting:
        torch.backends.cudnn.conv.fp32_precision = setting  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = setting
