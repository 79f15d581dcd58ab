"""A function run in several processes at once, the ranks of a gloo group, and what each of them returned."""

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
    """function(rank) of every rank; an error in one ends all and is raised here."""
    mp.spawn(_rank, (size, folder, function), nprocs=size)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(rank: int, size: int, folder: Path, function: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    # Ranks that wait for one that never comes give up, so that a test fails where it would hang.
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size, timeout=limit)
    torch.save(function(rank), folder / f"{rank}.pt")
    dist.barrier()  # none leaves while another still listens to it
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the interpreter's own end aborts where a thread of gloo's is still inside PyTorch
