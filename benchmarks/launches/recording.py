"""Launches of the Triton operators: recorded instead of run, then specialized and compiled without a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from rru_fast.arguments import RefineArguments
from rru_fast.reference import RRU
from rru_fast.triton import _device, _launch, batch_hard, refine
from rru_fast.triton._autotune import Candidates, LaunchConfig

NUM_SMS = 132  # an H100's


def refine_arguments(
    unit: RRU, x: Tensor, lengths: Tensor | None = None, state: tuple[Tensor | None, Tensor | None] = (None, None)
) -> RefineArguments:
    """Return the arguments of `refine` that `unit` would pass to a backend's kernels."""
    weights = {name: weight.detach() for name, weight in unit.named_parameters()}
    norm = unit.transition_norm
    state_x, state_s = state
    return RefineArguments(
        x=x,
        w=weights["transition.weight"].flatten(1),
        gamma=weights["transition_norm.weight"],
        beta=weights["transition_norm.bias"],
        w_s1=weights.get("spatial_attention.0.weight"),
        w_s2=weights.get("spatial_attention.2.weight"),
        w_c=weights.get("channel_attention.weight"),
        running_mean=norm.running_mean,
        running_var=norm.running_var,
        lengths=lengths,
        state_x=state_x,
        state_s=state_s,
        inputs=unit.inputs,
        training=unit.training,
        eps=norm.eps,
        bn_groups=unit.bn_groups if unit.training else 1,
    )


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments of its launch."""

    op: str
    tuning: bool  # only autotuning launches it
    kernel: Any
    arguments: dict[str, Any]


class Recorder:
    """Receiver of all launches in place of the GPU."""

    def __init__(self, note: Callable[[Launch], object]) -> None:
        self.note = note
        self.op = ""
        """Label of the launches that follow."""
        self.candidates = False
        """Record the candidates of autotuning, too."""
        self._tuning = False

    def launch(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        """Record a launch; stands in for `_launch.launch`."""
        self.note(Launch(self.op, self._tuning, kernel, arguments))

    def autotune(
        self,
        op: str,
        sizes: Any,
        tensor: Any,
        candidates: Callable[[], Candidates],
        run: Callable[[LaunchConfig], object],
    ) -> LaunchConfig:
        """Return the default after recording each candidate; stands in for `_autotune.autotune`."""
        default, others = candidates()
        if self.candidates:
            self._tuning = True
            for kernel, configs in others.items():
                for config in configs:
                    run(default | {kernel: config})
            self._tuning = False
        return default


@contextmanager
def recording(note: Callable[[Launch], object], num_sms: int = NUM_SMS) -> Iterator[Recorder]:
    """Pass every launch to `note` in place of running it, on a GPU of `num_sms` multiprocessors."""
    recorder = Recorder(note)
    with (
        patch.object(_launch, "launch", recorder.launch),
        patch.object(_device, "num_sms", lambda tensor: num_sms),
        patch.object(refine, "autotune", recorder.autotune),
        patch.object(batch_hard, "autotune", recorder.autotune),
    ):
        yield recorder


@dataclass(frozen=True)
class Specialization:
    """Arguments of one compilation; picklable, for compilers in other processes."""

    module: str
    name: str
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    def compile(self, target: GPUTarget) -> Any:
        """Compile into Triton's cache, where the launch will find it."""
        kernel = getattr(importlib.import_module(self.module), self.name)
        source = ASTSource(kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=target, options=self.options)


class Specializer:
    """Specialization of launches for a target as in `JITFunction.run`, each kind once."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self._backend = make_backend(target)
        self._bind = cache(self._binder)
        self._seen: set[str] = set()

    def new(self, launch: Launch) -> Specialization | None:
        """Return the launch's specialization, None if an earlier launch had the same."""
        kernel, arguments = launch.kernel, {**launch.arguments, "debug": False}
        bound, specialized, options = self._bind(kernel)(**arguments)
        key = f"{kernel.__name__} {specialized} {options}"
        if key in self._seen:
            return None
        self._seen.add(key)
        packed, signature, constants, attributes = kernel._pack_args(
            self._backend, arguments, bound, specialized, options
        )
        function = kernel.fn
        return Specialization(
            function.__module__, function.__name__, signature, constants, attributes, dict(packed.__dict__)
        )

    def _binder(self, kernel: Any) -> Any:
        return create_function_from_signature(kernel.signature, kernel.params, self._backend)
