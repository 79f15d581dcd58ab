"""The emulated kernel of refine in eval mode, against float64 and under hostile schedules."""

from __future__ import annotations

import pytest

from tests.cuda.emulated import Program, build

OPERANDS = ("bf16", "f16", "tf32", "tf32x3", "fp32")
# Schedules and arrivals that a GPU may have too.
ORDERS = {
    "in order": (),
    "late": ("--late",),
    "last first": ("--last-first",),
    "late, last first": ("--late", "--last-first"),
    "approximate": ("--noise", "1"),
}
# Cases in which every warp and every CTA is held behind every wait at every frame.
HELD = ("bf16 two warps", "tf32 ragged state split", "fp32 four CTAs", "f16 split after one")


@pytest.fixture(scope="module")
def program() -> Program:
    return build("refine_eval")


def cases(program: Program, operands: str) -> list[str]:
    found = [line for line in program.run("--list").text.splitlines() if line.startswith(f"{operands} ")]
    assert len(found) > 20
    return found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("operands", OPERANDS)
def test_every_case_is_right_twice(program: Program, operands: str, order: str) -> None:
    twice = () if order == "approximate" else ("--twice",)  # whose errors differ from run to run
    done = program.run(*cases(program, operands), *twice, *ORDERS[order])
    assert done.status == 0, done.text


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", HELD)
def test_results_are_bitwise_equal_whichever_warp_or_cta_is_held(program: Program, case: str) -> None:
    done = program.run(case, "--hold-all")
    assert done.status == 0, done.text
    assert int(done.text.split(", ")[-1].split()[0]) > 80, done.text  # holds


@pytest.mark.exhaustive
def test_a_program_under_address_sanitizer_reads_and_writes_in_bounds() -> None:
    program = build("refine_eval", "address")
    for arguments in ((), ("bf16 tail", "--hold-all")):
        done = program.run(*arguments)
        assert done.status == 0, done.text
