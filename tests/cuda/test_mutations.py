"""Defects put into the kernels of refine: each has to be found, by wrong results or ThreadSanitizer.

Every synchronization in a kernel is left out in turn. One that nobody misses would be needless, or lack a test.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tests.cuda.emulated import Program, build

WRONG, FAILED, RACE = 1, 2, 66  # exit statuses of a program, and of ThreadSanitizer
# Without what the others do not show: a held CTA begins, and initializes its inboxes, last.
SCHEDULES: tuple[tuple[str, ...], ...] = ((), ("--hold", "begin", "1", "-1", "0"))
SYNCHRONIZATIONS = ("sync", "cluster", "inbox", "set", "flag")


@dataclass(frozen=True)
class Kernel:
    """A kernel, the cases that find its defects, and how many sites of a kind it has."""

    program: str
    cases: tuple[str, ...]
    synchronizations: int
    only: tuple[str, ...] = ()
    """Options that leave the program's other kernel alone."""
    mutants: dict[str, str] = field(default_factory=dict)
    """Named mutants, and a case that finds each."""
    raced: tuple[str, ...] = ()
    """More cases that have no race."""


# One warp and two, one CTA to eight, positions past the last, products of both kinds, a first warp that is last.
EVAL_CASES = ("tf32x3 two warps", "bf16 tail", "bf16 sixteen CTAs", "bf16 two warps, eight CTAs", "fp32 four CTAs")
TRAINING_CASES = ("bf16 tail", "fp32 two warps", "fp32 four times, four CTAs", "bf16 two warps, twice the channels")
TRAINING_MUTANTS = {
    "positions past the last are pooled": "fp32 tail",
    "fragment transposed": "tf32 plain",
    "a place is used again": "fp32 two warps",
    "another group is waited for": "fp32 groups",
}
KERNELS = {
    "eval": Kernel(
        "refine_eval",
        EVAL_CASES,
        9,
        mutants={
            "fragment transposed": "tf32 plain",
            "positions past the last are pooled": "tf32 plain",
            "sums begin at the own rank": "fp32 twins",
            "S is kept in 16 bits": "bf16 weak gate",
        },
        raced=("f16 ragged state split", "tf32 split"),
    ),
    "forward": Kernel(
        "refine_training",
        TRAINING_CASES,
        14,
        only=("--only", "forward"),
        mutants={
            **TRAINING_MUTANTS,
            "S is kept in 16 bits": "bf16 weak gate",
            "sums begin at the own rank": "fp32 twins",
        },
        raced=("f16 groups", "tf32 sixteen CTAs"),
    ),
    "backward": Kernel(
        "refine_training",
        TRAINING_CASES,
        13,
        only=("--only", "backward"),
        mutants=TRAINING_MUTANTS,
    ),
}
kernels = pytest.mark.parametrize("name", KERNELS)


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    for kernel in KERNELS.values():
        build(kernel.program, "thread")


def program_of(kernel: Kernel) -> Program:
    return build(kernel.program, "thread")


def sites(kernel: Kernel, *kinds: str) -> list[str]:
    """Labels of a kernel's synchronizations of some kinds."""
    text = program_of(kernel).run(kernel.cases[1], *kernel.only, "--sites").text
    lines = [line for line in text.splitlines() if line.startswith("site ")]
    by_label = dict(line.removeprefix("site ").split(": ", 1)[::-1] for line in lines)
    return [label for label, kind in by_label.items() if kind in kinds]


def is_found(kernel: Kernel, *mutation: str) -> bool:
    """Return True if a case that is right without a mutation is not with it."""
    program = program_of(kernel)
    for schedule in SCHEDULES:
        for case in kernel.cases:
            if (status := program.run(case, *kernel.only, *schedule, *mutation).status) != 0:
                assert status in (WRONG, FAILED, RACE)
                assert program.run(case, *kernel.only, *schedule).status == 0
                return True
    return False


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in ("eval", "forward") for case in (*KERNELS[name].cases, *KERNELS[name].raced)],
)
def test_there_is_no_race(name: str, case: str) -> None:
    """In the forward's cases the program runs the backward too."""
    done = program_of(KERNELS[name]).run(case, "--twice")
    assert done.status == 0, done.text


@pytest.mark.exhaustive
def test_there_is_no_race_in_any_case_of_eval_mode() -> None:
    done = program_of(KERNELS["eval"]).run()
    assert done.status == 0, done.text


@pytest.mark.exhaustive
def test_there_is_no_race_in_any_case_of_training() -> None:
    """Operands do not change how threads wait for each other: bf16, whose products are the least."""
    program = program_of(KERNELS["forward"])
    found = [line for line in program.run("--list").text.splitlines() if line.startswith("bf16 ")]
    done = program.run(*found)
    assert done.status == 0, done.text


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "case"), [("eval", "bf16 tail"), ("forward", "bf16 two frames")])
def test_there_is_no_race_whichever_cta_is_held(name: str, case: str) -> None:
    done = program_of(KERNELS[name]).run(case, "--hold-all")
    assert done.status == 0, done.text


@pytest.mark.exhaustive
@kernels
def test_no_synchronization_is_needless(name: str) -> None:
    kernel = KERNELS[name]
    labels = sites(kernel, *SYNCHRONIZATIONS)
    assert len(labels) == kernel.synchronizations, labels
    assert [label for label in labels if not is_found(kernel, "--omit", label)] == []


@pytest.mark.exhaustive
@kernels
def test_an_inbox_is_more_than_a_barrier_of_its_cta(name: str) -> None:
    kernel = KERNELS[name]
    labels = sites(kernel, "inbox")
    assert len(labels) == 2, labels
    assert [label for label in labels if not is_found(kernel, "--replace", label)] == []


@pytest.mark.exhaustive
@kernels
def test_an_inbox_that_expects_too_few_bytes_is_found(name: str) -> None:
    kernel = KERNELS[name]
    labels = sites(kernel, "arm")
    assert len(labels) == 2, labels
    assert [label for label in labels if not is_found(kernel, "--shorten", label)] == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_flag_that_orders_no_memory_is_found(name: str) -> None:
    """By ThreadSanitizer alone: the results are right."""
    kernel = KERNELS[name]
    (label,) = sites(kernel, "set")
    done = program_of(kernel).run(kernel.cases[0], *kernel.only, "--relax", label)
    assert done.status == RACE and ": right" in done.text, done.text


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "mutant"), [(name, mutant) for name, kernel in KERNELS.items() for mutant in kernel.mutants]
)
def test_a_mutant_is_found(name: str, mutant: str) -> None:
    kernel, program = KERNELS[name], program_of(KERNELS[name])
    case = kernel.mutants[mutant]
    assert program.run(case, *kernel.only).status == 0
    done = program.run(case, *kernel.only, "--mutant", mutant)
    assert done.status in (WRONG, RACE), done.text
