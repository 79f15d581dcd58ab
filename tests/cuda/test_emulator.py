"""What the emulation of CUDA reports: each defect of a small kernel, and nothing of one without."""

from __future__ import annotations

import pytest

from tests.cuda.emulated import Program, build


@pytest.fixture(scope="module")
def emulator() -> Program:
    return build("emulator")


@pytest.fixture(scope="module")
def under_tsan() -> Program:
    return build("emulator", "thread")


@pytest.mark.parametrize("held", [(), ("begin",), ("inboxes are initialized",), ("a number is expected",)], ids=str)
def test_a_correct_kernel_runs_under_any_schedule(emulator: Program, held: tuple[str, ...]) -> None:
    done = emulator.run("correct", *held)
    assert (done.status, done.text) == (0, "|2 1\n")


@pytest.mark.parametrize(
    ("kernel", "reported"),
    {
        "sync_of_some": "deadlock: 64 threads wait at 'for some'",
        "deadlock": "deadlock: 128 threads wait at 'nothing comes'",
        "too_many_bytes": "an inbox has received more bytes than it expects",
        "armed_twice": "inbox_arm: the phase before is not complete",
        "push_to_uninitialized": "push to an inbox that is not initialized",
        "push_to_returned": "push to a CTA that has returned",
        "push_out_of_bounds": "push: got an offset outside of shared memory, or not aligned: 1024",
        "push_misaligned": "push: got an offset outside of shared memory, or not aligned: 4",
        "push_to_no_rank": "push: got rank 2 in a cluster of 2",
        "lanes_diverge": "lanes of a warp run mma_tf32 and shfl_xor at once",
        "some_lanes": "deadlock: 64 threads wait at 'shfl_xor'",
        "ldmatrix_misaligned": "ldmatrix: got an address that is not a multiple of 16",
        "wait_without_arrive": "cluster_wait without cluster_arrive",
        "const_load_of_written": "store to memory that the launch reads by load_const",
        "const_load_after_a_store": "load_const of memory that the launch writes",
        "misaligned_load": "an address is not a multiple of the 8 bytes that are accessed at once",
        "misaligned_shared": "shared memory: got an offset outside of it, or not aligned: 8",
        "shared_out_of_bounds": "shared memory: got an offset outside of it, or not aligned: 1024",
    }.items(),
)
def test_a_defect_is_reported(emulator: Program, kernel: str, reported: str) -> None:
    done = emulator.run(kernel)
    assert (done.status, done.text.partition("|")[0]) == (2, reported)


def test_shared_memory_begins_as_nan(emulator: Program) -> None:
    assert "nan" in emulator.run("poisoned").text


def test_only_what_orders_memory_on_a_gpu_orders_it_for_thread_sanitizer(under_tsan: Program) -> None:
    racing = under_tsan.run("race")
    assert racing.status == 66 and "WARNING: ThreadSanitizer: data race" in racing.text
    assert "|3 3\n" in racing.text  # although the number is right
    for kernel in ("no_race", "correct"):
        assert under_tsan.run(kernel).status == 0
