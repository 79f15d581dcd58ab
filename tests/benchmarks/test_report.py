"""Drawings and tables of the README from the JSON of runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.reports import drawing, speed_up, style, table

PNG = b"\x89PNG\r\n\x1a\n"
HERE = {"hardware": "a machine", "threads": 2, "torch": "2.11.0", "python": "3.11", "commit": "abc", "date": "today"}
BASE = {"shape": [2, 3, 16, 4, 4], "threads": 2, "dtype": "float32", "layout": "contiguous"}
PAGE = (
    "before\n<!-- refine -->\nold\n<!-- /refine -->\nbetween\n<!-- scaling -->\n<!-- /scaling -->\n"
    "<!-- memory -->\n<!-- /memory -->\n<!-- speed_up -->\n<!-- /speed_up -->\nafter\n"
)
DRAWINGS = ("refine-here.png", "scaling-here.png", "memory-here.png", "speed_up-here.png")


def _refine() -> dict[str, Any]:
    def row(mode: str, dtype: str, name: str, ms: float) -> dict[str, Any]:
        shape = [2, 3, 16, 4, 4] if mode == "training" else [1, 9, 16, 4, 4]
        column, suffix = ("fwd+bwd ms", ", fwd+bwd") if mode == "training" else ("forward ms", "")
        described = {"implementation": name, "dtype": dtype, "mode": mode, "shape": shape, "threads": 2}
        ratios = {f"x reference{suffix}": 300 / ms, "x compile, fwd+bwd": None}
        return {**described, column: ms, **ratios, "roofline ms": 40.0}

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


def _memory() -> dict[str, Any]:
    rows = [{"op": "refine", "shape": [2, t, 16, 4, 4], "eager, reference MiB": 8.0 * t, "cpu MiB": t} for t in (2, 4)]
    rows += [{"op": "batch_hard", "shape": [n, 8], "eager MiB": n**2 / 9, "cpu MiB": n / 9} for n in (16, 32)]
    return {"environment": {**HERE, "op": "memory", "commit": "def"}, "rows": rows}


def _written(folder: Path) -> report.Options:
    (folder / "refine-here.json").write_text(json.dumps(_refine()))
    (folder / "scaling-here.json").write_text(json.dumps(_scaling()))
    (folder / "memory-here.json").write_text(json.dumps(_memory()))
    page = folder / "README.md"
    page.write_text(PAGE)
    return report.Options(results=folder, readme=page)


@pytest.fixture
def options(tmp_path: Path) -> report.Options:
    """Measured runs, and a page with a section for each."""
    return _written(tmp_path)


@pytest.fixture(scope="module")
def _drawn_once(tmp_path_factory: pytest.TempPathFactory) -> report.Options:
    options = _written(tmp_path_factory.mktemp("drawn"))
    report.main(options)
    return options


@pytest.fixture
def drawn(_drawn_once: report.Options, tmp_path: Path) -> report.Options:
    """The same after a report."""
    folder = shutil.copytree(_drawn_once.results, tmp_path / "copy")
    return report.Options(results=folder, readme=folder / "README.md")


def test_runs_become_tables_between_their_markers_and_drawings_in_their_folder(drawn: report.Options) -> None:
    page = drawn.readme.read_text()
    assert "old" not in page
    assert page.startswith("before\n<!-- refine -->\n") and page.endswith("<!-- /speed_up -->\nafter\n")
    assert "| implementation | dtype | fwd+bwd ms | x reference, fwd+bwd |" in page
    assert "| cpu | float32 | 123 | 2.43 |" in page
    assert "`refine`, 1 x 9 x 16 x 4 x 4, eval" in page
    assert "a machine, threads 2, torch 2.11.0, commit abc, date today, roofline 421 GFLOP/s" in page
    assert "`batch_hard`, peak of forward + backward\n\n| shape | eager MiB | cpu MiB |" in page
    assert "| 32 x 8 | 114 | 3.56 |" in page
    for name in DRAWINGS:
        assert f"({name})" in page
        assert (drawn.results / name).read_bytes().startswith(PNG)


def test_a_run_on_a_gpu_becomes_a_table_for_each_operator_and_mode(options: report.Options) -> None:
    def row(op: str, mode: str, name: str, ms: float | None) -> dict[str, Any]:
        described = {"implementation": name, "op": op, "mode": mode, "shape": [2, 3, 16, 4, 4]}
        return {**described, "ms": ms, "x eager": None if ms is None else 9 / ms}

    rows = [row("refine", "training, float32", "eager", 9.0), row("refine", "training, float32", "triton", 0.5)]
    rows += [
        row("strip_pool", "forward + backward", "eager", 9.0),
        row("strip_pool", "forward + backward", "slow", None),
    ]
    rows += [
        {**row("refine", "eval", "triton", 3.0), "precision": "high", "copies ms": 0.25},
        {"implementation": "wrong", "op": "refine", "mode": "eval", "shape": [2, 3, 16, 4, 4], "left out": "off"},
    ]
    run = {"environment": {**HERE, "op": "gpu", "roofline": "3000 GB/s"}, "rows": rows, "parts": {}}
    for path in options.results.glob("*.json"):
        path.unlink()
    (options.results / "a-gpu.json").write_text(json.dumps(run))
    (options.results / "a-gpu-autotune.json").write_text("[]")
    options.readme.write_text("<!-- gpu -->\nnothing yet\n<!-- /gpu -->\n")
    report.main(options)
    page = options.readme.read_text()
    assert "nothing yet" not in page and "roofline 3000 GB/s" in page
    assert "`refine`, 2 x 3 x 16 x 4 x 4, training, float32" in page and "| triton | 0.5 | 18.00 |" in page
    assert "`strip_pool`, 2 x 3 x 16 x 4 x 4, forward + backward" in page and "| slow | - | - |" in page
    assert "| implementation | ms | x eager | precision | copies ms | left out |" in page
    assert "| triton | 3 | 3.00 | high | 0.25 | - |" in page and "| wrong | - | - | - | - | off |" in page


def test_the_readme_has_a_section_for_a_gpus_figures() -> None:
    page = (report.ROOT / "README.md").read_text()
    assert page.count("<!-- gpu -->") == page.count("<!-- /gpu -->") == 1


def test_a_run_of_losses_becomes_a_page_of_its_own_with_a_table_for_each_size(drawn: report.Options) -> None:
    def row(name: str, n: int, ms: float | None) -> dict[str, Any]:
        ratio = None if ms is None else ms / 2
        return {"implementation": name, "n": n, "d": 8, "eager ms": ms, "swapped ms": ms and 2.0, "x eager": ratio}

    rows = [row("a loop", 64, 9.0), row("a sort", 64, 1.0), row("a loop", 4096, None), row("a sort", 4096, 800.0)]
    run = {"environment": {**HERE, "op": "losses", "backend": "cpu"}, "rows": rows}
    (drawn.results / "losses-here.json").write_text(json.dumps(run))
    before = drawn.readme.read_text()
    with pytest.raises(SystemExit, match=r"stale: \S+losses-here.md; run"):
        report.main(replace(drawn, check=True))
    report.main(drawn)
    assert drawn.readme.read_text() == before
    page = (drawn.results / "losses-here.md").read_text()
    assert "a machine, threads 2, backend cpu, torch 2.11.0" in page and "[losses-here.json](losses-here.json)" in page
    small, large = page.index("\nN 64, D 8, forward + backward"), page.index("\nN 4096, D 8")
    assert small < page.index("| a loop | 9 | 2 | 4.50 |") < page.index("| a sort | 1 | 2 | 0.50 |") < large
    assert large < page.index("| a loop | - | - | - |") < page.index("| a sort | 800 | 2 | 400.00 |")
    report.main(replace(drawn, check=True))


def test_a_row_where_we_lose_and_one_that_was_not_measured_are_in_the_table(drawn: report.Options) -> None:
    lines = [line for line in drawn.readme.read_text().splitlines() if line.startswith("| 2 x ")]
    assert any("2 x 2 x 16 x 4 x 4" in line and "0.75" in line for line in lines)
    assert any("2 x 3 x 16 x 1 x 1" in line and "| - | - | - | - |" in line for line in lines)


def test_the_same_runs_give_the_same_files(drawn: report.Options) -> None:
    paths = [drawn.readme, *drawn.results.glob("*.png")]
    first = [path.read_bytes() for path in paths]
    report.main(drawn)
    assert [path.read_bytes() for path in paths] == first


def test_check_names_a_page_and_drawings_that_are_out_of_date(options: report.Options, drawn: report.Options) -> None:
    with pytest.raises(SystemExit, match=r"stale: .*refine-here.png.*README.md; run: python -m benchmarks.report"):
        report.main(replace(options, check=True))
    assert options.readme.read_text() == PAGE
    check = replace(drawn, check=True)
    report.main(check)
    right = drawn.readme.read_text()
    drawn.readme.write_text(right.replace("2.43", "9.99"))
    with pytest.raises(SystemExit, match=r"stale: \S+README.md;"):
        report.main(check)
    drawn.readme.write_text(right)
    (drawn.results / "memory-here.png").write_bytes((drawn.results / "refine-here.png").read_bytes())
    with pytest.raises(SystemExit, match=r"stale: \S+memory-here.png;"):
        report.main(check)


def test_a_digit_that_no_table_shows_makes_its_runs_drawings_stale(drawn: report.Options) -> None:
    path = drawn.results / "refine-here.json"
    path.write_text(path.read_text().replace("123.4", "123.4001"))
    with pytest.raises(SystemExit, match=r"stale: \S+/refine-here.png, \S+/speed_up-here.png;"):
        report.main(replace(drawn, check=True))


def test_a_drawing_by_another_matplotlib_is_not_stale(drawn: report.Options) -> None:
    path = drawn.results / "refine-here.png"
    source = style.source(path)
    assert source is not None
    figure = Figure()  # other pixels
    style.save(figure, source, path)
    report.main(replace(drawn, check=True))


def test_a_run_without_a_place_in_the_page_is_an_error(options: report.Options) -> None:
    options.readme.write_text("nothing\n")
    with pytest.raises(SystemExit, match="got no place for the runs of memory, wanted <!-- memory -->"):
        report.main(options)


def test_an_axis_holds_the_base_and_the_rows_that_differ_from_it_there_alone() -> None:
    rows = _scaling()["rows"]
    assert [drawing.size(row, "B") for row in drawing.along(rows, BASE, "B")] == [1, 2]
    assert [drawing.size(row, "T") for row in drawing.along(rows, BASE, "T")] == [2, 3]
    assert [drawing.size(row, "threads") for row in drawing.along(rows, BASE, "threads")] == [1, 2]


def test_a_line_of_the_speed_ups_is_a_shape_and_the_implementations_compared_there() -> None:
    lines = dict(speed_up.lines([_refine(), _scaling()]))
    assert lines["refine, training, 2 x 3 x 16 x 4 x 4, bfloat16"]["eager, reference"] == 300 / 123.4
    assert lines["refine, training, 2 x 2 x 16 x 4 x 4"]["eager, authors"] == 0.75
    assert lines["refine, training, 2 x 3 x 16 x 4 x 4, threads 1"]["eager, reference"] == 2.5
    assert lines["refine, training, 2 x 3 x 16 x 1 x 1"]["eager, reference"] is None


def test_a_column_without_a_value_is_no_column() -> None:
    assert table.markdown([{"a": 1, "b": None}]) == "| a |\n| --- |\n| 1 |"


def test_a_missing_page_is_created_with_a_section_for_every_run(drawn: report.Options) -> None:
    page = drawn.results / "another.md"
    report.main(replace(drawn, readme=page))
    headings = [line for line in page.read_text().splitlines() if line.startswith("## ")]
    assert headings == ["## speed_up", "## refine", "## scaling", "## memory"]
    before = drawn.readme.read_text()
    for op in ("refine", "scaling", "memory", "speed_up"):
        begin, end = f"<!-- {op} -->", f"<!-- /{op} -->"
        assert before[before.index(begin) : before.index(end)] in page.read_text()


PAGES = {report.ROOT / "README.md": report.Options().results}
PAGES |= {page: page.parent for page in report.Options().results.glob("*/README.md")}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_is_up_to_date_with_the_measured_runs(page: Path) -> None:
    report.main(report.Options(results=PAGES[page], readme=page, check=True))
