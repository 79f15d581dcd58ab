"""From the JSON of runs to drawings and to the README's tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import drawing, report, table

PNG = b"\x89PNG\r\n\x1a\n"
HERE = {"hardware": "a machine", "threads": 2, "torch": "2.11.0", "python": "3.11", "commit": "abc", "date": "today"}
BASE = {"shape": [2, 3, 16, 4, 4], "threads": 2, "dtype": "float32", "layout": "contiguous"}
PAGE = "before\n<!-- refine -->\nold\n<!-- /refine -->\nbetween\n<!-- scaling -->\n<!-- /scaling -->\nafter\n"


def _refine() -> dict[str, Any]:
    def row(mode: str, dtype: str, name: str, ms: float) -> dict[str, Any]:
        shape = [2, 3, 16, 4, 4] if mode == "training" else [1, 9, 16, 4, 4]
        column = "fwd+bwd ms" if mode == "training" else "forward ms"
        described = {"implementation": name, "dtype": dtype, "mode": mode, "shape": shape, "threads": 2}
        return {**described, column: ms, "x reference": 300 / ms, "x compile": None, "roofline ms": 40.0}

    field = {"eager, authors": 600.0, "eager, reference": 300.0, "cpu": 123.4}
    rows = [row("training", dtype, *own) for dtype in ("float32", "bfloat16") for own in field.items()]
    rows += [row("eval", "float32", *own) for own in field.items()]
    return {"environment": {**HERE, "op": "refine", "roofline": "421 GFLOP/s"}, "rows": rows}


def _scaling() -> dict[str, Any]:
    def row(ms: float | None, **changed: Any) -> dict[str, Any]:
        ratio = None if ms is None else 300 / ms
        times = {"eager, authors ms": 600.0, "eager, reference ms": 300.0, "composite ms": 200.0, "cpu ms": ms}
        return {**BASE, **changed, **times, "x authors": ratio, "x reference": ratio, "x composite": ratio}

    rows = [row(100.0), row(50.0, shape=[1, 3, 16, 4, 4]), row(400.0, shape=[2, 2, 16, 4, 4]), row(120.0, threads=1)]
    return {
        "environment": {**HERE, "op": "scaling", "ours": "cpu", "base": BASE},
        "rows": [*rows, row(None, shape=[2, 3, 16, 1, 1])],
    }


@pytest.fixture
def options(tmp_path: Path) -> report.Options:
    (tmp_path / "refine-here.json").write_text(json.dumps(_refine()))
    (tmp_path / "scaling-here.json").write_text(json.dumps(_scaling()))
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    return report.Options(results=tmp_path, readme=page)


def test_runs_become_tables_between_their_markers_and_drawings_beside_them(options: report.Options) -> None:
    report.main(options)
    page = options.readme.read_text()
    assert "old" not in page
    assert page.startswith("before\n<!-- refine -->\n") and page.endswith("<!-- /scaling -->\nafter\n")
    assert "| implementation | dtype | fwd+bwd ms | x reference |" in page
    assert "| cpu | float32 | 123 | 2.43 |" in page
    assert "`refine`, 1 x 9 x 16 x 4 x 4, eval" in page
    assert "a machine, threads 2, torch 2.11.0, commit abc, date today, roofline 421 GFLOP/s" in page
    assert "(refine-here.png)" in page
    for name in ("refine-here.png", "scaling-here.png"):
        assert (options.results / name).read_bytes().startswith(PNG)


def test_a_run_on_a_gpu_becomes_a_table_for_each_operator_and_mode(options: report.Options) -> None:
    def row(op: str, mode: str, name: str, ms: float | None) -> dict[str, Any]:
        described = {"implementation": name, "op": op, "mode": mode, "shape": [2, 3, 16, 4, 4]}
        return {**described, "ms": ms, "x eager": None if ms is None else 9 / ms}

    rows = [row("refine", "training, float32", "eager", 9.0), row("refine", "training, float32", "triton", 0.5)]
    rows += [
        row("strip_pool", "forward + backward", "eager", 9.0),
        row("strip_pool", "forward + backward", "slow", None),
    ]
    run = {"environment": {**HERE, "op": "gpu", "roofline": "3000 GB/s", "left out": {}}, "rows": rows}
    (options.results / "a-gpu.json").write_text(json.dumps(run))
    options.readme.write_text(PAGE + "<!-- gpu -->\nnothing yet\n<!-- /gpu -->\n")
    report.main(options)
    page = options.readme.read_text()
    assert "nothing yet" not in page and "roofline 3000 GB/s" in page
    assert "`refine`, 2 x 3 x 16 x 4 x 4, training, float32" in page and "| triton | 0.5 | 18.00 |" in page
    assert "`strip_pool`, 2 x 3 x 16 x 4 x 4, forward + backward" in page and "| slow | - | - |" in page


def test_the_readme_has_a_place_for_a_gpus_figures() -> None:
    page = (report.ROOT / "README.md").read_text()
    assert page.count("<!-- gpu -->") == page.count("<!-- /gpu -->") == 1


def test_a_row_where_we_lose_and_one_that_was_not_measured_are_in_the_table(options: report.Options) -> None:
    report.main(options)
    lines = [line for line in options.readme.read_text().splitlines() if line.startswith("| 2 x ")]
    assert any("2 x 2 x 16 x 4 x 4" in line and "0.75" in line for line in lines)
    assert any("2 x 3 x 16 x 1 x 1" in line and "| - | - | - | - |" in line for line in lines)


def test_the_same_runs_give_the_same_files(options: report.Options) -> None:
    report.main(options)
    paths = [options.readme, *options.results.glob("*.png")]
    first = [path.read_bytes() for path in paths]
    report.main(options)
    assert [path.read_bytes() for path in paths] == first


def test_check_tells_a_page_that_says_something_else(options: report.Options) -> None:
    options.check = True
    with pytest.raises(SystemExit, match=r"stale: .*refine-here.png.*README.md; run: python -m benchmarks.report"):
        report.main(options)
    assert options.readme.read_text() == PAGE
    options.check = False
    report.main(options)
    options.check = True
    report.main(options)
    options.readme.write_text(options.readme.read_text().replace("2.43", "9.99"))
    with pytest.raises(SystemExit, match=r"stale: \S+README.md;"):
        report.main(options)


def test_a_run_without_a_place_in_the_page_is_an_error(options: report.Options) -> None:
    options.readme.write_text("nothing\n")
    with pytest.raises(SystemExit, match="got no place for the runs of refine, wanted <!-- refine -->"):
        report.main(options)


def test_an_axis_holds_the_base_and_what_differs_from_it_there_alone() -> None:
    rows = _scaling()["rows"]
    assert [drawing.size(row, "B") for row in drawing.along(rows, BASE, "B")] == [1, 2]
    assert [drawing.size(row, "T") for row in drawing.along(rows, BASE, "T")] == [2, 3]
    assert [drawing.size(row, "threads") for row in drawing.along(rows, BASE, "threads")] == [1, 2]


def test_a_column_without_a_value_is_no_column() -> None:
    assert table.markdown([{"a": 1, "b": None}]) == "| a |\n| --- |\n| 1 |"


def test_the_readme_says_what_the_measured_runs_say() -> None:
    report.main(report.Options(check=True))
