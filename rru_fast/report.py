"""What `show_config` prints: versions, devices, backends and decisions."""

from __future__ import annotations

import os
import platform
from datetime import date

import torch

from rru_fast import backends, cuda, native
from rru_fast.auto import cards, choice, decisions
from rru_fast.auto.decisions import HOUR, Decision

SHOWN = 40
"""Decisions of a device that are listed."""


def report() -> str:
    """Return versions, devices, backends and decisions as `show_config` prints them."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    lines = [
        f"rru_fast {backends.__version__}, {versions}",
        f"threads: {torch.get_num_threads()}, CPU: {torch.backends.cpu.get_cpu_capability()}, GPU: {gpu}",
        *native.describe(),
        f"auto runs: {_auto()}",
        f"fp32 products on a GPU: {_fp32_precision()}",
    ]
    lines += [
        f"  {name:<10} {_available(name) if why is None else 'not available: ' + why}"
        for name, why in backends.BACKENDS.items()
    ]
    return "\n".join([*lines, *_decisions()])


def _available(backend: str) -> str:
    if backend != "cuda":
        return "available"
    on, device = (" on the CPU, emulated", "cpu") if cuda.emulated() else ("", "cuda")
    return f"available{on}: {cuda.CARRIES}; the rest runs in {cuda.fallback(torch.device(device))}"


def _auto() -> str:
    on_cpu = backends.choose("auto", torch.device("cpu"))
    narrow = "" if on_cpu != "cpu" else " (composite for refine on narrow maps)"
    on_gpu = f"{backends.choose('auto', torch.device('cuda'))} on a GPU until another is measured to be faster"
    off = "" if choice.calibration_enabled() else "; RRU_FAST_CALIBRATE=0: nothing is measured unless asked"
    return f"{on_cpu} on a CPU{narrow}, {on_gpu}; decisions are kept in {decisions.folder()}{off}"


def _decisions() -> list[str]:
    """Describe the decisions for this machine's devices, a line each."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    lines: list[str] = []
    seen: list[decisions.Card] = []
    for device in [torch.device("cpu"), *gpus]:
        card = cards.card_of(device)
        if card in seen:
            continue
        seen.append(card)
        entries = sorted(choice.entries(device), key=lambda entry: str(entry.kind))
        if entries:
            lines.append(f"decisions for {cards.describe(card)}")
        lines += [f"  {entry.kind}: {describe(entry.decision)}" for entry in entries[:SHOWN]]
        if len(entries) > SHOWN:
            lines.append(f"  and {len(entries) - SHOWN} more")
    if others := sum(entry.card not in seen for entry in decisions.read_folder()):
        lines.append(f"decisions for other devices, versions or kernels, not used here: {others}")
    return lines


def describe(decision: Decision) -> str:
    """Return a decision in words: what runs, why, its error, and when it was measured."""
    words = [str(decision)]
    if decision.spread is not None:
        words.append(f"spread {100 * decision.spread:.0f} %")
    if decision.error is not None and decision.allowed is not None:
        words.append(f"error {decision.error:.1e} of {decision.allowed:.1e}")
    words.append(f"{decision.seconds:.1f} s, {decision.peak_mib:.0f} MiB")
    words.append(date.fromtimestamp(decision.measured).isoformat())
    if decision.lasts is not None:
        words.append(f"valid for {decision.lasts / HOUR:.0f} h")
    return ", ".join(word for word in words if word)


def _fp32_precision() -> str:
    """Precision of the operators' fp32 products on a GPU, and the settings that decide it."""
    conv, matmul = (
        "TF32" if setting.fp32_precision == "tf32" else "fp32"
        for setting in (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    )
    asked = os.environ.get("RRU_FAST_FLOAT32")
    return f"{conv} in refine (torch.backends.cudnn.conv), {matmul} in batch_hard (torch.backends.cuda.matmul)" + (
        f", {asked} in both by triton and cuda (RRU_FAST_FLOAT32)" if asked else ""
    )


def show_config() -> None:
    """Print versions, devices, available backends, why others are not available, and the decisions of `auto`.

    >>> import rru_fast
    >>> rru_fast.show_config()  # doctest: +ELLIPSIS
    rru_fast ...
    """
    print(report())
