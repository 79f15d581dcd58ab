"""Benchmarks at toy shapes: each checks parity first, measures every implementation, and writes the rows it prints."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import refine, scaling
from benchmarks.harness.results import ROOT
from benchmarks.implementations import refine as unit
from benchmarks.implementations.losses import FORMS
from rru_fast import backends
from rru_fast.composite import batch_hard as batch_hard_kernel
from rru_fast.composite import refine as refine_kernel
from rru_fast.composite import strip_pool as strip_pool_kernel
from tests.parity import BACKENDS

SHAPE = (2, 3, 16, 4, 4)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: on a busy machine, several threads wait for each other far longer than a toy takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_refine_measures_both_dtypes_and_the_tracklet_in_one_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    rows = refine.main(refine.Options(shape=SHAPE, tracklet=5, repeats=2, compile=False, device="cpu", json=path))
    names = ["eager, authors", "eager, reference", *BACKENDS]
    assert [(row["mode"], row["dtype"], row["implementation"]) for row in rows] == [
        (mode, dtype, name)
        for mode, dtype in (("training", "float32"), ("training", "bfloat16"), ("eval", "float32"))
        for name in names
    ]
    assert rows[-1]["shape"] == [1, 5, *SHAPE[2:]]
    assert all(row["threads"] == torch.get_num_threads() for row in rows)
    authors, reference, composite = rows[:3]
    assert composite["saved MiB"] < reference["saved MiB"] < authors["saved MiB"]
    in_bfloat16 = rows[len(names)]
    assert authors["x float32, fwd+bwd"] == 1 != in_bfloat16["x float32, fwd+bwd"]
    written = json.loads(path.read_text())
    assert written["rows"] == rows
    assert "GFLOP/s in bfloat16" in written["environment"]["roofline"]
    printed = capsys.readouterr().out
    # Parity of the eager authors and of each backend before every table.
    assert all(printed.count(f"parity: {name}, ") == 3 for name in ("eager, authors", *BACKENDS))


@pytest.mark.exhaustive  # the compiler takes half a minute
def test_a_shape_and_a_dtype_measure_that_training_alone_with_the_compiler() -> None:
    rows = refine.main(refine.Options(shape=SHAPE, dtype="float32", repeats=1, device="cpu"))
    assert [row["implementation"] for row in rows] == [
        "eager, authors",
        "eager, reference",
        *BACKENDS,
        "torch.compile, reference",
    ]
    assert {(row["mode"], row["dtype"]) for row in rows} == {("training", "float32")}
    assert rows[-1]["x compile, fwd+bwd"] == 1
    assert rows[-1]["saved MiB"] is None


def test_scaling_changes_one_size_at_a_time() -> None:
    base = scaling.Point((8, 3, 16, 4, 4), threads=2)
    options = scaling.Options(base.shape, clips=(1, 8), frames=(3, 5), channels=(16,), threads=(1, 10**6))
    points = scaling.points(base, options)
    assert len(points) == len(set(points))
    assert scaling.Point((1, 3, 16, 4, 4), 2) in points
    assert scaling.Point((8, 5, 16, 4, 4), 2) in points
    assert scaling.Point(base.shape, 1) in points
    assert max(point.threads for point in points) == 2  # nobody has a million cores
    assert scaling.Point(base.shape, 2, "float64") in points
    assert scaling.Point(base.shape, 2, layout="channels last") in points


def test_scaling_rows_hold_paired_ratios_of_the_backend_that_auto_takes() -> None:
    ours = backends.choose("auto", torch.device("cpu"))
    options = scaling.Options(SHAPE, clips=(2,), frames=(3,), channels=(16,), threads=(1, 2), repeats=1, device="cpu")
    rows = scaling.main(options)
    assert torch.get_num_threads() == 1
    assert {row["threads"] for row in rows} == {1, min(2, os.cpu_count() or 1)}
    # The authors' eager and the backends are left out where they are wrong; the reference never is.
    assert all(row["eager, reference ms"] > 0 for row in rows)
    for row in rows:
        mine, theirs = row[f"{ours} ms"], row["eager, reference ms"]
        assert row["x reference"] == (None if mine is None else pytest.approx(theirs / mine))


def test_an_implementation_that_is_wrong_at_a_point_is_not_measured_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = refine_kernel.forward
    monkeypatch.setattr(refine_kernel, "forward", lambda *a: off(exact(*a)))
    found, refused = unit.filter_valid(unit.implementations(SHAPE, "float32", torch.device("cpu")))
    assert "composite" not in found
    assert "eager, authors" in found
    assert list(refused) == ["composite"]
    assert "composite is left out: parity: composite, float32 is off by" in capsys.readouterr().out


def test_an_implementation_that_does_not_run_is_named_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(refine_kernel, "forward", broken)
    found, refused = unit.filter_valid(unit.implementations(SHAPE, "float32", torch.device("cpu")))
    assert refused == {"composite": "does not run: RuntimeError: no kernel image is available"}
    assert "eager, authors" in found


def test_every_implementation_has_the_same_maps_and_a_copy_of_the_weights() -> None:
    impls = unit.implementations(SHAPE, "float32", torch.device("cpu"), channels_last=True)
    x = impls["eager, reference"].x
    assert x.shape == SHAPE and x.stride(2) == 1
    weights = [impl.module.transition.weight for impl in impls.values()]
    assert all(impl.x is x for impl in impls.values())
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    assert len({weight.data_ptr() for weight in weights}) == len(impls)


def test_nothing_is_left_out_at_the_hardest_point_of_scaling() -> None:
    """At one position the statistics are over few values, and a product may add its terms in sequence."""
    unit.check(unit.implementations((8, 4, 2048, 1, 1), "float32", torch.device("cpu")))


# Options for toy shapes, by command.
COMMANDS = {
    "refine": "--shape 2 3 16 4 4 --tracklet 5 --dtype float32 --repeats 1 --no-compile",
    "scaling": "--base 2 3 16 4 4 --clips 2 --frames 3 --channels 16 --threads 1 --repeats 1",
    "strip_pool": "--shape 2 3 16 4 4 --repeats 1",
    "batch_hard": "--n 64 --d 8 --repeats 1",
    "losses": "--shapes 16 8 32 8 --repeats 1 --largest-loop 16 --backend composite",
    "memory": "--maps 2 3 16 4 4 --frames 2 3 --features 16 64 --d 8",
}
every_command = pytest.mark.parametrize(
    "command", [pytest.param(c, marks=() if c in ("refine", "scaling") else pytest.mark.exhaustive) for c in COMMANDS]
)


def _run(command: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command as `python -m` does: imported anew, as __main__."""
    monkeypatch.setattr("sys.argv", [command, *COMMANDS[command].split(), "--device", "cpu", "--json", str(path)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that it has been imported before
        runpy.run_module(f"benchmarks.{command}", run_name="__main__", alter_sys=True)


@every_command
def test_a_command_reports_parity_before_its_figures_and_where_it_wrote_them(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(command, tmp_path / "rows.json", monkeypatch)
    printed = capsys.readouterr().out
    parity, figures = printed.index("parity: composite"), printed.index("┏")
    assert parity < figures
    assert "is within" in printed[parity:figures]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert printed.endswith(f"wrote {len(rows)} rows to {tmp_path / 'rows.json'}\n")
    environment = json.loads((tmp_path / "rows.json").read_text())["environment"]
    assert environment["op"] == command and environment["commit"]
    names = {row.get("implementation") for row in rows} | {
        key.removesuffix(" MiB").removesuffix(" ms") for row in rows for key in row
    }
    assert names.issuperset(FORMS if command == "losses" else BACKENDS)
    assert ("pytorch-metric-learning" in names) == (command in ("batch_hard", "memory"))


def off(outputs: Any) -> Any:
    """Return the outputs with the first one multiplied by 1.001."""
    first = fields(outputs)[0].name
    return replace(outputs, **{first: getattr(outputs, first) * 1.001})


@every_command
def test_a_command_whose_kernel_is_wrong_prints_no_figure_of_it_and_ends_with_an_error(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernel in (refine_kernel, batch_hard_kernel):
        exact = kernel.forward
        monkeypatch.setattr(kernel, "forward", lambda *a, f=exact: off(f(*a)))
    exact_strips = strip_pool_kernel.forward
    monkeypatch.setattr(strip_pool_kernel, "forward", lambda s: exact_strips(s) * 1.001)
    path = tmp_path / "rows.json"
    with pytest.raises(SystemExit, match=r"parity: composite(, float\d\d|, torchreid, N 16, D 8)? is off") as ended:
        _run(command, path, monkeypatch)
    assert isinstance(ended.value.code, str)  # the interpreter prints it and exits with 1
    if command == "scaling":  # the others are measured at each point
        rows = json.loads(path.read_text())["rows"]
        assert all(row["composite ms"] is None and row["x composite"] is None for row in rows)
    else:
        assert not path.exists()
        assert "┏" not in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_that_is_no_positive_number_is_an_error(command: str) -> None:
    options = importlib.import_module(f"benchmarks.{command}").Options
    numbers = [f.name for f in fields(options) if "int" in str(f.type) or f.type == "Shape"]
    assert numbers
    for name in numbers:
        given = getattr(options(), name)
        if isinstance(given, tuple) and isinstance(given[0], tuple):
            continue  # of losses, which checks more
        wrong = (*given[:-1], 0) if isinstance(given, tuple) else -3
        with pytest.raises(SystemExit, match=rf"^{name}: got {re.escape(str(wrong))}, wanted at least 1$"):
            options(**{name: wrong})


def test_a_command_ends_with_a_line_where_a_number_is_not_positive() -> None:
    command = [sys.executable, "-m", "benchmarks.strip_pool", "--repeats", "0"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "repeats: got 0, wanted at least 1\n")
