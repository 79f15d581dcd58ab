"""Fork: a child inherits none of its parent's threads, yet OpenMP's record of them, and waits for them for ever.

So they are let go before a fork, and parent and child make new ones at their next parallel loop. That holds for all of
PyTorch's operators, which share OpenMP's threads with ours.
"""

from __future__ import annotations

import ctypes
import os

_PAUSE_HARD = 2  # omp_pause_hard of OpenMP 5.0, 3.2.44


def let_threads_go_before_fork() -> None:
    """Do so from here on, where there is fork and an OpenMP that can."""
    if not hasattr(os, "register_at_fork"):
        return
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)  # torch's, which is loaded for all to see
    if pause is not None:
        os.register_at_fork(before=lambda: pause(_PAUSE_HARD))
