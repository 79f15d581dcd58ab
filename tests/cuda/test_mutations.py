"""Defects put into the kernel of refine in eval mode: each has to be found, by wrong results or ThreadSanitizer.

Every synchronization in the kernel is left out in turn. One that nobody misses would be needless, or lack a test.
"""

from __future__ import annotations

import pytest

from tests.cuda.emulated import Program, build

# One warp and two, one CTA to eight, positions past the last, products of both kinds, a first warp that is last.
CASES = ("tf32x3 two warps", "bf16 tail", "bf16 sixteen CTAs", "bf16 two warps, eight CTAs", "fp32 four CTAs")
WRONG, FAILED, RACE = 1, 2, 66  # exit statuses of the program, and of ThreadSanitizer
# Without what the others do not show: a held CTA begins, and initializes its inboxes, last.
SCHEDULES: tuple[tuple[str, ...], ...] = ((), ("--hold", "begin", "1", "-1", "0"))
SYNCHRONIZATIONS = {"sync", "cluster", "inbox"}
MUTANTS = {
    "fragment transposed": "tf32 plain",
    "positions past the last are pooled": "tf32 plain",
    "sums begin at the own rank": "fp32 twins",
    "S is kept in 16 bits": "bf16 weak gate",
}


@pytest.fixture(scope="module")
def program() -> Program:
    return build("refine_eval", "thread")


def sites(program: Program, *kinds: str) -> list[str]:
    """Labels of the kernel's synchronizations of some kinds."""
    lines = [line for line in program.run("bf16 two warps", "--sites").text.splitlines() if line.startswith("site ")]
    by_label = dict(line.removeprefix("site ").split(": ", 1)[::-1] for line in lines)
    return [label for label, kind in by_label.items() if kind in kinds]


def is_found(program: Program, *mutation: str) -> bool:
    """Return True if a case that is right without a mutation is not with it."""
    for schedule in SCHEDULES:
        for case in CASES:
            if (status := program.run(case, *schedule, *mutation).status) != 0:
                assert status in (WRONG, FAILED, RACE)
                assert program.run(case, *schedule).status == 0
                return True
    return False


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [*CASES, "f16 ragged state split", "tf32 split"])
def test_there_is_no_race(program: Program, case: str) -> None:
    done = program.run(case, "--twice")
    assert done.status == 0, done.text


@pytest.mark.exhaustive
def test_there_is_no_race_in_any_case(program: Program) -> None:
    done = program.run()
    assert done.status == 0, done.text


@pytest.mark.exhaustive
def test_there_is_no_race_whichever_cta_is_held(program: Program) -> None:
    done = program.run("bf16 tail", "--hold-all")
    assert done.status == 0, done.text


@pytest.mark.exhaustive
def test_no_synchronization_is_needless(program: Program) -> None:
    labels = sites(program, *SYNCHRONIZATIONS)
    assert len(labels) == 9, labels
    assert [label for label in labels if not is_found(program, "--omit", label)] == []


@pytest.mark.exhaustive
def test_an_inbox_is_more_than_a_barrier_of_its_cta(program: Program) -> None:
    labels = sites(program, "inbox")
    assert len(labels) == 2, labels
    assert [label for label in labels if not is_found(program, "--replace", label)] == []


@pytest.mark.exhaustive
def test_an_inbox_that_expects_too_few_bytes_is_found(program: Program) -> None:
    labels = sites(program, "arm")
    assert len(labels) == 2, labels
    assert [label for label in labels if not is_found(program, "--shorten", label)] == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_wrong(program: Program, mutant: str) -> None:
    assert program.run(MUTANTS[mutant]).status == 0
    done = program.run(MUTANTS[mutant], "--mutant", mutant)
    assert done.status == WRONG, done.text
