"""Parts of the GPU benchmark: findings, profiles, the suite and the sanitizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import kernel_times, parts, sanitizer, suite
from benchmarks.gpu.results import Findings, Results


def test_findings_are_added_by_their_keys(tmp_path: Path) -> None:
    results = Results(tmp_path, "toy", {"op": "gpu"})
    results.parts["smoke"] = {}
    lines = tmp_path / "lines"
    findings = Findings(lines)
    assert findings.new() == []
    results.rows = [{"ms": 0}]  # another part's
    whole = [
        {"rows": [{"ms": 1}, {"ms": 2}], "a": 1},
        {"row": 1, "columns": {"kernel ms": 5}},
        {"failed": "one"},
        {"environment": {"roofline": 3}},
    ]
    lines.write_text("".join(json.dumps(line) + "\n" for line in whole) + '{"fai')
    for finding in findings.new():
        results.add("smoke", finding)
    with lines.open("a") as file:
        file.write('led": "two"}\n')
    for finding in findings.new():
        results.add("smoke", finding)
    results.write()
    rows = [{"ms": 0}, {"ms": 1}, {"ms": 2, "kernel ms": 5}]
    content = {"environment": {"op": "gpu", "roofline": 3}, "rows": rows}
    assert json.loads(results.path.read_text()) == {
        **content,
        "parts": {"smoke": {"a": 1, "failed": ["one", "two"]}},
    }


def test_calls_are_profiled_after_all_have_been_timed_each_at_its_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def section(run: object) -> Iterator[list[dict[str, object]]]:
        for precision in ("defaults", "high"):
            done.append(f"timed at {precision}")
            row = {"implementation": "triton", "precision": precision, "ms": 2.0}
            yield [{**row, "kernel ms": lambda: None}, {"implementation": "eager", "precision": precision}]

    monkeypatch.setattr("benchmarks.gpu.sections.SECTIONS", {"one": ("refine", section), "two": ("refine", section)})
    monkeypatch.setattr("benchmarks.gpu.run.make_run", lambda *_: SimpleNamespace(copy=1e9))
    monkeypatch.setattr("benchmarks.gpu.run.set_precision", lambda precision, device: done.append(precision))
    monkeypatch.setattr("benchmarks.gpu.kernel_times.kernel_ms", lambda call: len(done))
    results = Results(tmp_path, "toy", {})
    results.parts["eval"] = {}
    for finding in parts.sections("one", "two")(parts.Context(torch.device("cuda"), False, 1, 1, tmp_path)):
        results.add("eval", json.loads(json.dumps(finding)))
    assert done[:4] == ["timed at defaults", "timed at high"] * 2
    assert done[4:] == [row["precision"] for row in results.rows]
    assert [row.get("kernel ms") for row in results.rows] == [5, None, 7, None, 9, None, 11, None]


def test_autotuned_configs_come_back_in_one_file(tmp_path: Path) -> None:
    results, configs = Results(tmp_path / "results", "toy", {}), tmp_path / "cache" / "rru_fast" / "autotune"
    results.gather(tmp_path / "cache")
    assert list(results.path.parent.iterdir()) == [results.path]
    configs.mkdir(parents=True)
    for name in ("a", "b"):
        (configs / f"{name}.json").write_text(json.dumps({"kind": name}))
    (configs / "c.json").write_text('{"half')
    results.gather(tmp_path / "cache")
    (gathered,) = results.path.parent.glob("*-autotune.json")
    assert json.loads(gathered.read_text()) == [{"kind": "a"}, {"kind": "b"}]


def test_the_suite_writes_its_results_before_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "ENDING", 2)
    monkeypatch.setattr(suite, "find_spec", lambda module: None)  # pytest-xdist takes 10 s to end
    for name in [name for name in os.environ if name.startswith("PYTEST")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # on a busy machine, plugins take seconds to import
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu: of a GPU\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu.py").write_text(
        "import pytest, time\npytestmark = pytest.mark.gpu\n"
        "def test_triton_quick(): pass\n"
        "def test_triton_wrong(): assert 1 == 2\n"
        "def test_triton_slow(): time.sleep(600)\n"
        "def test_triton_compiled(): pass\n"
    )
    found = list(suite.suite(tmp_path, suite.CORE, tmp_path / "junit.xml", seconds=8))
    assert found[0] == {"not installed": ["xdist", "pytest_timeout"]}
    assert found[1]["tests"] >= 2 and found[1]["failures"] == 1
    assert found[2]["failed"].startswith("test_triton_wrong: assert 1 == 2")
    assert found[3:] == [{"ended": "stopped after 6 s"}]
    found = list(suite.suite(tmp_path, suite.REST, tmp_path / "rest.xml", seconds=60))
    assert found[-1] == {"tests": 1, "skipped": 0, "failures": 0}


@pytest.mark.parametrize(
    ("output", "errors"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0),
        ("========= ERROR SUMMARY: 1 error", 1),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)", 2),
        ("========= Internal error", None),
    ],
)
def test_a_sanitizers_errors_are_counted(output: str, errors: int | None) -> None:
    assert sanitizer.count_errors(f"before\n{output}\nafter\n") == errors


def test_kernels_are_summed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [
        ("atb_kernel", 2.0),
        ("Memcpy DtoD", 1.0),
        ("atb_kernel", 4.0),
    ] * kernel_times.CALLS
    monkeypatch.setattr(kernel_times, "_device_events", lambda fn: events)
    assert kernel_times.kernel_ms(lambda: None) == pytest.approx(7e-3)
    assert kernel_times.by_kernel(lambda: None, most=1) == {
        "us per call": 7.0,
        "launches per call": 3.0,
        "kernels": [["atb_kernel", 2.0, 3.0]],
    }
