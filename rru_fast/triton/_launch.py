"""Launches of kernels: one, or one per frame on that frame's slices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up; triton.cdiv takes 9 us on the host, half of a launch."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of 2 that is at least n >= 1; triton.next_power_of_2 takes 7 us on the host."""
    return 1 << (n - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> Any:
    """Run `kernel` on a grid of programs and return the compiled kernel, or None in the interpreter.

    Put the largest dimension on grid axis 0; axes 1 and 2 are limited to 65535.

    Raises:
        RuntimeError: Triton could not compile or launch it; names the backend that needs no Triton.
    """
    try:
        return kernel[grid](**arguments)
    except Exception as error:  # compiler passes, ptxas, gcc and the driver raise various types
        raise _failure(kernel, error) from error


def _failure(kernel: Any, error: Exception) -> RuntimeError:
    reason = str(error).strip().partition("\n")[0]
    return RuntimeError(
        f"backend: got 'triton', whose {kernel.__name__} failed: {type(error).__name__}: {reason}; "
        "wanted backend='composite', which needs no Triton"
    )


def launch_cached(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Run `kernel` as `launch` does, without binding it again if an earlier launch was of the same kind."""
    Launches(kernel, grid, **arguments)(0)


class Slices:
    """Argument that is another slice of a tensor at each launch: at launch n, slice `first + n` along `dim`.

    A launch needs its address alone: a view of the tensor would cost over a microsecond. `first + n` is not negative.
    """

    __slots__ = ("_dim", "_first", "_tensor", "base", "dtype", "stride")

    def __init__(self, tensor: Tensor, dim: int = 0, first: int = 0) -> None:
        self._tensor, self._dim, self._first = tensor, dim, first
        self.dtype = tensor.dtype
        self.stride = tensor.stride(dim) * tensor.element_size()  # bytes
        self.base = tensor.data_ptr() + first * self.stride

    def view(self, n: int) -> Tensor:
        """Return the slice at launch n as a tensor."""
        return self._tensor.select(self._dim, self._first + n)


class Counter:
    """Integer argument that is `first + n` at launch n. Triton must not specialize on it."""

    __slots__ = ("first",)

    def __init__(self, first: int) -> None:
        self.first = first


class Launches:
    """Launches of one kernel, numbered by n, that differ in their `Slices` and `Counter` arguments alone.

    Triton binds, specializes and hashes all arguments at each launch. Here the first launch of a kind goes through
    Triton, and later ones run the kernel that it compiled, on other addresses.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        """Take the kernel's arguments, of which NamedTuples may hold `Slices` too."""
        self._kernel, self._grid, self._arguments = kernel, grid, arguments
        self._run: Any = None
        self._values: list[Any] = []
        self._changing: list[tuple[int, Any]] = []

    def __call__(self, n: int) -> None:
        """Run launch n."""
        if self._run is None and not self._find(n):
            return
        values = self._values
        for place, value in self._changing:
            values[place] = _passed(value, n)
        try:
            self._run(*values)
        except Exception as error:
            raise _failure(self._kernel, error) from error

    def _find(self, n: int) -> bool:
        """Find the compiled kernel of launch n and prepare to run it; return False if Triton has run it instead."""
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1  # type: ignore[no-untyped-call]
        key: list[Any] = [id(self._kernel), self._grid, device, tuple(self._arguments)]
        prepared = {name: _prepare(value, key) for name, value in self._arguments.items()}
        kind = tuple(key)
        run = None if UNEQUALLY_ALIGNED in kind else _compiled.get(kind)
        if run is None:
            compiled = launch(self._kernel, self._grid, **{k: _plain(value, n) for k, value in self._arguments.items()})
            # Slices of various alignments need various kernels; the interpreter compiles none.
            if compiled is not None and UNEQUALLY_ALIGNED not in kind:
                if len(_compiled) >= MAX_COMPILED:
                    _compiled.clear()
                _compiled[kind] = compiled[(*self._grid, 1, 1)[:3]]
            return False
        self._values = [prepared[name] for name in self._kernel.arg_names]
        self._changing = [(i, v) for i, v in enumerate(self._values) if type(v) in CHANGING]
        self._run = run
        return True


CHANGING = frozenset((Slices, Counter, list))  # types that change per launch; a list is a tuple that holds some
UNEQUALLY_ALIGNED = "slices of various alignments"
# Compiled kernels; the key holds all that Triton specializes on, and more, so that a known kind is not bound again.
MAX_COMPILED = 4096
_compiled: dict[tuple[Any, ...], Any] = {}


def _plain(value: Any, n: int) -> Any:
    """Return an argument as Triton binds it at launch n."""
    if isinstance(value, Slices):
        return value.view(n)
    if isinstance(value, Counter):
        return value.first + n
    return type(value)(*[_plain(item, n) for item in value]) if isinstance(value, tuple) else value


def _prepare(value: Any, key: list[Any]) -> Any:
    """Convert an argument for the driver, tensors to addresses; `Slices` and `Counter` are left for `_passed`.

    key: receives a superset of what Triton specializes on: a tensor's dtype and alignment, the value of any other.
    """
    kind = type(value)
    if kind is int or value is None:
        key.append(value)
    elif kind is Slices:
        key.append(value.dtype)
        # Triton specializes on whether an address is a multiple of 16.
        key.append(value.base % 16 == 0 if value.stride % 16 == 0 else UNEQUALLY_ALIGNED)
    elif isinstance(value, tuple):
        key.append(kind)
        items = [_prepare(item, key) for item in value]
        return items if not CHANGING.isdisjoint(map(type, items)) else tuple(items)
    elif isinstance(value, Tensor):
        address = value.data_ptr()
        key.append(value.dtype)
        key.append(address % 16 == 0)
        return address
    elif kind is not Counter:
        key.append(value)
    return value


def _passed(value: Any, n: int) -> Any:
    """Convert a changing argument for the driver at launch n."""
    kind = type(value)
    if kind is Slices:
        return value.base + n * value.stride
    if kind is Counter:
        return value.first + n
    return tuple([_passed(item, n) if type(item) in CHANGING else item for item in value])
