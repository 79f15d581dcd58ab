"""Run a function on several ranks of a gloo group, each a process, and collect the results."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_ranks(size: int, folder: Path, function: Callable[[int], Any]) -> list[Any]:
    """Return function(rank) of every rank, in order; an error on one rank ends all and is raised here."""
    mp.spawn(_rank, (size, folder, function), nprocs=size)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(rank: int, size: int, folder: Path, function: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    # A rank that waits for one that died gives up, so that the test fails instead of hanging.
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size, timeout=limit)
    torch.save(function(rank), folder / f"{rank}.pt")
    dist.barrier()  # no rank exits while another may still receive from it
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # normal interpreter shutdown aborts if a gloo thread is still inside PyTorch
