"""Launches of kernels: one, or many that differ in a few addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *positional: Any, **arguments: Any) -> Any:
    """Run `kernel` on `grid` programs and return the compiled kernel, None in the interpreter.

    Put the largest dimension on grid axis 0; axes 1 and 2 are limited to 65535.

    Raises:
        RuntimeError: Triton could not compile or launch it; names the backend that needs no Triton.
    """
    try:
        return kernel[grid](*positional, **arguments)
    except Exception as error:  # compiler passes, ptxas, gcc and the driver raise various types
        raise _failure(kernel, error) from error


def _failure(kernel: Any, error: Exception) -> RuntimeError:
    reason = str(error).strip().partition("\n")[0]
    return RuntimeError(
        f"backend: got 'triton', whose {kernel.__name__} failed: {type(error).__name__}: {reason}; "
        "wanted backend='composite', which needs no Triton"
    )


def launch_again(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """`launch` for a kernel of many calls: one that has been launched alike is not bound again."""
    Launches(kernel, grid, (), None, **arguments)()


class Slices:
    """A tensor of which each launch takes one slice along `dim`.

    `slices[n]` is that slice for `Launches`, which needs its address alone: a view costs over a microsecond.
    """

    def __init__(self, tensor: Tensor, dim: int = 0) -> None:
        self._tensor, self._dim = tensor, dim
        self._address, self._bytes = tensor.data_ptr(), tensor.stride(dim) * tensor.element_size()

    def __getitem__(self, n: int) -> Slice:
        return self._address + n * self._bytes, self, n

    def view(self, n: int) -> Tensor:
        """Slice n as a tensor."""
        return self._tensor.select(self._dim, n)

    @property
    def equally_aligned(self) -> bool:
        """Return True if Triton specializes on all slices alike: it asks if an address is a multiple of 16."""
        return self._bytes % 16 == 0


Slice = tuple[int, Slices, int]
"""Address, tensor and index of a slice."""


class Launches:
    """Launches of one kernel that differ in slices and in one integer on which Triton does not specialize.

    Triton binds, specializes and hashes all arguments at each launch. Here the first launch of a kind goes through
    Triton, and later ones run the kernel that it compiled, on other addresses.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], slices: tuple[str, ...], integer: str | None, **fixed: Any
    ) -> None:
        """slices, integer: names of the arguments that change; fixed: all others."""
        self._kernel, self._grid, self._names, self._integer, self._fixed = kernel, grid, slices, integer, fixed
        self._run: Any = None
        self._values: list[Any] = []
        self._places: list[tuple[int, Slices | None]] = []

    def __call__(self, *slices: Slice | None, integer: int = 0) -> None:
        """Run on slices, in the order of their names; None for an argument that is None."""
        if self._run is None:
            self._first(slices, integer)
            return
        values = self._values
        for (place, source), one in zip(self._places, slices, strict=True):
            if one is None:
                continue
            if one[1] is not source:
                self._first(slices, integer)
                return
            values[place] = one[0]
        if self._integer is not None:
            values[self._integer_place] = integer
        try:
            self._run(*values)
        except Exception as error:
            raise _failure(self._kernel, error) from error

    def _first(self, slices: tuple[Slice | None, ...], integer: int) -> None:
        """Launch on tensors, and prepare the launches after it."""
        arguments = self._fixed | {
            name: None if one is None else one[1].view(one[2]) for name, one in zip(self._names, slices, strict=True)
        }
        own = {} if self._integer is None else {self._integer: integer}
        sources = [None if one is None else one[1] for one in slices]
        if any(source is not None and not source.equally_aligned for source in sources):
            # Slices of various alignments need various kernels: each launch goes through Triton.
            launch(self._kernel, self._grid, **arguments, **own)
            return
        key = (
            id(self._kernel),
            self._grid,
            torch.cuda.current_device() if torch.cuda.is_initialized() else -1,  # type: ignore[no-untyped-call]
            *map(_specialization, arguments.values()),
        )
        known = key in _compiled
        if not known:
            compiled = launch(self._kernel, self._grid, **arguments, **own)
            if compiled is None:  # the interpreter compiles nothing
                return
            if len(_compiled) >= MOST_COMPILED:
                _compiled.clear()
            _compiled[key] = compiled[(*self._grid, 1, 1)[:3]]
        names = self._kernel.arg_names
        arguments |= own
        self._run = _compiled[key]
        self._values = [v.data_ptr() if isinstance(v := arguments[name], Tensor) else v for name in names]
        self._places = list(zip(map(names.index, self._names), sources, strict=True))
        self._integer_place = 0 if self._integer is None else names.index(self._integer)
        if known:
            self(*slices, integer=integer)


# By all that Triton specializes on, and more: a launch that Triton has bound once is not bound again.
MOST_COMPILED = 4096
_compiled: dict[tuple[Any, ...], Any] = {}


def _specialization(value: Any) -> Any:
    """A part of a key: the dtype and the alignment of a tensor, any other argument as it is."""
    return (value.dtype, value.data_ptr() % 16 == 0) if isinstance(value, Tensor) else value
