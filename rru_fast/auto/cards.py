"""Devices on which decisions hold: hardware, versions and kernels."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from functools import cache
from pathlib import Path

import torch

from rru_fast import backends, cuda, native

_PACKAGE = Path(__file__).resolve().parents[1]

# Device types on which `auto` calibrates by itself; on others when asked.
AUTOMATIC = frozenset({"cuda"})


def card_of(device: torch.device) -> dict[str, str]:
    """Return all that a decision depends on apart from the call. Decisions of another card are not used."""
    on_cpu = device.type == "cpu"
    setting = str(torch.get_num_threads()) if on_cpu else os.environ.get("RRU_FAST_AUTOTUNE") or "1"
    return dict(_card(device.type, _index(device), setting))


@cache
def _card(kind: str, index: int, setting: str) -> dict[str, str]:
    card = {"torch": torch.__version__, "kernels": _sources(kind)}
    if kind == "cuda":
        of_device = torch.device(kind, index)
        major, minor = torch.cuda.get_device_capability(of_device)
        return card | {
            "device": torch.cuda.get_device_name(of_device),
            "capability": f"{major}.{minor}",
            "cuda": str(torch.version.cuda),
            "triton": _version("triton"),
            "autotune": setting,
        }
    return card | {"device": processor(), "threads": setting}


def uuid_of(device: torch.device) -> str:
    """Return what tells a GPU from others of its name; "" for a CPU."""
    if device.type != "cuda":
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


def describe(card: dict[str, str]) -> str:
    """Return a card in words."""
    versions = [f"{name} {card[name]}" for name in ("torch", "triton", "cuda") if name in card]
    return ", ".join([card["device"], *([f"{card['threads']} threads"] if "threads" in card else []), *versions])


def candidates(device: torch.device, default: str) -> list[str]:
    """List the backends that may replace `default` on a device."""
    return [name for name in backends.serving(device) if name not in ("reference", default)]


def calibrates(device: torch.device) -> bool:
    """Return True if `auto` calibrates on this device without being asked."""
    return device.type in AUTOMATIC and len(backends.serving(device)) > len(("reference", "composite"))


def _index(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _sources(kind: str) -> str:
    """Hash the kernels: a decision compares their speed."""
    files = [*(_PACKAGE / "composite").rglob("*.py"), *(_PACKAGE / "triton").rglob("*.py")]
    if kind == "cpu" and native.missing() is None:
        files.append(native.binary())
    digest = hashlib.sha256()
    if kind == "cuda" and cuda.missing() is None:  # not of the binary, which each build makes anew
        files += (_PACKAGE / "cuda").rglob("*.py")
        digest.update(native.cuda_sources().encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@cache
def processor() -> str:
    """Return the processor's name, its number of cores, and the SIMD capability that PyTorch uses on it."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = f"{names[0]}, {len(names)} cores" if names else model
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":  # the name may not say which instructions are used
        model += f", {torch.backends.cpu.get_cpu_capability()}"
    return model
