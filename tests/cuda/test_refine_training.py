"""The emulated kernels of refine in training mode, against float64 and under hostile schedules."""

from __future__ import annotations

import pytest

from tests.cuda.emulated import Program, build
from tests.cuda.test_refine_eval import ORDERS, cases

OPERANDS = ("bf16", "f16", "tf32", "fp32")
# Cases in which every warp and every CTA is held behind every wait at every frame.
HELD = ("bf16 tail", "tf32 two warps, twice the channels", "fp32 groups")


@pytest.fixture(scope="module")
def program() -> Program:
    return build("refine_training")


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
    done = build("refine_training", "address").run()
    assert done.status == 0, done.text
