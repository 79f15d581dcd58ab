"""Launches of Triton kernels past Triton's own binding, held to it argument by argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rru_fast
from rru_fast import triton
from tests import parity
from tests.parity import Case

if triton.interpreted():
    pytest.skip("the interpreter binds nothing", allow_module_level=True)
pytest.importorskip("triton")

from benchmarks.launch_stub import Stub, launched_by
from rru_fast.triton import _launch, refine
from rru_fast.triton._launch import Launches, Slices


def plain(arguments: tuple[Any, ...]) -> list[Any]:
    return [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]


def run(case: Case) -> None:
    """Forward and backward of a case by the Triton backend's host code."""
    call = parity.make_call(case, torch.float32).map(lambda v: v.float())
    w = call.weights
    names = ("w", "gamma", "beta", "w_s1", "w_s2", "w_c")
    state = (None, None) if call.state is None else (call.state.x, call.state.s)
    arguments = [call.x, *(w.get(name) for name in names), *call.buffers, call.lengths, *state]
    arguments += [case.inputs, case.mode == "train", 1e-3, case.bn_groups, "", []]
    arguments[1] = w["w"].flatten(1)
    features, _strips, *saved = refine.forward(*arguments, True)
    refine.backward(call.d_features, call.d_strips, True, True, features, *saved, *arguments)


EVEN = (3, 4, 8, 4, 4)  # frames, clips and gate channels are 16 bytes apart
CASES = [
    Case(EVEN, hidden=8, spatial_hidden=4),
    Case(EVEN, hidden=8, spatial_hidden=4, inputs="raw"),
    Case(EVEN, hidden=8, spatial_hidden=4, inputs="appearance", attention="spatial", mode="eval"),
    Case(EVEN, hidden=8, spatial_hidden=4, attention="channel", mode="ragged"),
    Case(EVEN, hidden=8, spatial_hidden=4, mode="continued"),
    Case((3, 5, 7, 3, 1), hidden=5),  # slices of all alignments
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_prebound_launch_passes_what_triton_would_and_runs_the_kernel_it_would(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[tuple[Stub, list[Any]]] = []
    prebound = 0
    call_it: Callable[..., None] = Launches.__call__

    def compare(launches: Any, *slices: Any, integer: int = 0) -> None:
        nonlocal prebound
        before = launches._run
        call_it(launches, *slices, integer=integer)
        stub, got = passed[-1]
        prebound += launches._run is not None and launches._run is before
        arguments = launches._fixed | {
            name: None if one is None else one[1].view(one[2])
            for name, one in zip(launches._names, slices, strict=True)
        }
        if launches._integer is not None:
            arguments[launches._integer] = integer
        assert _launch.launch(launches._kernel, launches._grid, **arguments) is stub
        _, wanted = passed.pop()
        assert got == wanted

    monkeypatch.setattr(Launches, "__call__", compare)
    with launched_by(lambda stub, grid, *arguments: passed.append((stub, plain(arguments)))):
        run(case)
    kernels = {stub.kernel.__name__ for stub, _ in passed}
    assert {"transition_kernel", "gate_kernel", "maps_kernel", "gate_backward_kernel"} <= kernels
    assert (prebound > 0) == (case.shape == EVEN)


def test_in_training_a_launch_goes_through_triton_once_a_kind_not_once_a_frame() -> None:
    counts = []
    for frames in (8, 20):
        bound = 0

        def count(stub: Stub, grid: Any, *arguments: Any) -> None:
            nonlocal bound
            bound += any(isinstance(value, Tensor) for value in arguments)

        with launched_by(count):
            run(Case((2, frames, 16, 4, 4), hidden=8, spatial_hidden=4))
        counts.append(bound)
    assert counts[0] == counts[1]


def test_slices_of_another_tensor_are_launched_at_their_own_addresses_and_bound_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    class Kernel:
        __name__ = "kernel"
        arg_names = ("v", "n")

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(**arguments: Any) -> Any:
                seen.append(arguments["v"].data_ptr())
                return {(5, 1, 1): lambda v, n: seen.append(-v)}

            return launch

    monkeypatch.setattr(_launch, "_compiled", {})
    launches = Launches(Kernel(), (5,), ("v",), "n")
    one, other = torch.zeros(3, 4), torch.zeros(3, 4)
    for tensor in (one, other):
        slices = Slices(tensor)
        for n in range(3):
            launches(slices[n], integer=n)
    rows = [(tensor[n].data_ptr(), n) for tensor in (one, other) for n in range(3)]
    assert seen == [rows[0][0], *(-address for address, _ in rows[1:])]


class Broken:
    """A kernel that the compiler refuses."""

    __name__ = "gate_kernel"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*_: Any, **__: Any) -> None:
            raise self.error

        return launch


def test_a_kernel_that_fails_names_itself_the_reason_and_the_backend_without_triton(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.runtime.errors import PTXASError

    from rru_fast.triton import _refine_forward_kernels as kernels

    error = PTXASError("Internal Triton PTX codegen error\nptxas stderr: ...")
    monkeypatch.setattr(kernels, "gate_kernel", Broken(error))
    wanted = (
        r"backend: got 'triton', whose gate_kernel failed: PTXASError: PTXAS error: Internal Triton PTX codegen error; "
        r"wanted backend='composite', which needs no Triton"
    )
    with launched_by(lambda *_: None), pytest.raises(RuntimeError, match=wanted) as caught:
        run(CASES[0])
    assert caught.value.__cause__ is error


def test_a_launch_that_fails_later_names_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = 0

    def fail(*_: Any) -> None:
        nonlocal launched
        launched += 1
        if launched == 10:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    wanted = r"backend: got 'triton', whose \w+_kernel failed: RuntimeError: Triton Error \[CUDA\]: an illegal"
    with launched_by(fail), pytest.raises(RuntimeError, match=wanted):
        run(CASES[0])


def test_the_library_can_be_used_after_the_stub() -> None:
    assert rru_fast.RRU(6, (3, 2))(torch.rand(2, 3, 6, 3, 2)).features.shape == (2, 3, 6, 3, 2)
