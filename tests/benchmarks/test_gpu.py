"""The GPU benchmark, tried where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from rru_fast import triton


@pytest.mark.skipif(triton.interpreted() or torch.cuda.is_available(), reason="it runs here")
def test_without_a_gpu_it_says_how_it_can_be_tried() -> None:
    with pytest.raises(
        SystemExit, match="--toy: got False without a GPU, wanted one, or --toy with TRITON_INTERPRET=1"
    ):
        gpu.main(gpu.Options())
    with pytest.raises(SystemExit, match="triton: got a backend that does not serve: no NVIDIA GPU is seen"):
        gpu.main(gpu.Options(toy=True))


interpreted = pytest.mark.skipif(not triton.interpreted(), reason="needs TRITON_INTERPRET=1")


@interpreted
def test_every_section_has_a_row_of_triton(tmp_path: Path) -> None:
    rows = gpu.main(gpu.Options(toy=True, results=tmp_path))
    (written,) = tmp_path.glob("*.json")
    kept = json.loads(written.read_text())
    assert kept["rows"] == json.loads(json.dumps(rows))
    assert kept["environment"]["left out"] == {}
    sections = dict.fromkeys(row["mode"] for row in rows)
    assert list(sections) == list(gpu.SECTIONS)
    for section in sections:
        own = {row["implementation"]: row for row in rows if row["mode"] == section}
        assert {"eager", "eager, authors"} & own.keys()
        assert (own["triton"].get("ms") or own["triton"]["fwd+bwd ms"]) > 0, section
    page = written.with_suffix(".md").read_text()
    assert all(section in page for section in sections)


@interpreted
def test_triton_keeps_what_it_has_when_the_time_is_over(tmp_path: Path) -> None:
    assert gpu.main(gpu.Options(toy=True, results=tmp_path, seconds=-1)) == []
    (written,) = tmp_path.glob("*.json")
    assert json.loads(written.read_text())["environment"]["left out"] == dict.fromkeys(gpu.SECTIONS, "-1 s are over")
    before = written.read_bytes()
    gpu.main(gpu.Options(toy=True, results=tmp_path, seconds=-1))
    assert len(list(tmp_path.glob("*.json"))) == 2 and written.read_bytes() == before


@interpreted
def test_triton_where_it_does_not_run_is_a_row_of_dashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RRU_FAST_FLOAT32", "tf16")  # refused by every kernel that multiplies
    monkeypatch.setattr(
        gpu, "SECTIONS", {title: gpu.SECTIONS[title] for title in ("many features, forward + backward",)}
    )
    with pytest.raises(SystemExit, match="triton: does not run: ValueError: RRU_FAST_FLOAT32: got 'tf16'"):
        gpu.main(gpu.Options(toy=True, results=tmp_path))
    (written,) = tmp_path.glob("*.json")
    rows = {row["implementation"]: row for row in json.loads(written.read_text())["rows"]}
    assert "RRU_FAST_FLOAT32" in rows["triton"]["left out"]
    assert rows["triton"]["ms"] is None and rows["triton"]["x eager"] is None
    assert rows["composite"]["ms"] > 0 and rows["composite"]["x eager"] > 0


@interpreted
def test_triton_keeps_the_sections_before_one_that_fails_and_runs_those_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "SECTIONS", {"one that nobody wrote": None, "forward + backward": None})
    with pytest.raises(SystemExit, match="left out:\n  one that nobody wrote: KeyError"):
        gpu.main(gpu.Options(toy=True, results=tmp_path))
    (written,) = tmp_path.glob("*.json")
    kept = json.loads(written.read_text())
    assert "KeyError" in kept["environment"]["left out"]["one that nobody wrote"]
    assert {row["implementation"] for row in kept["rows"]} >= {"eager", "triton"}
