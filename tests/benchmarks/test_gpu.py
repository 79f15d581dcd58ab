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


@pytest.mark.skipif(not triton.interpreted(), reason="needs TRITON_INTERPRET=1")
def test_every_section_has_a_row_of_triton(tmp_path: Path) -> None:
    rows = gpu.main(gpu.Options(toy=True, results=tmp_path))
    (written,) = tmp_path.glob("*.json")
    kept = json.loads(written.read_text())
    assert kept["rows"] == json.loads(json.dumps(rows))
    assert kept["environment"]["left out"] == []
    sections = dict.fromkeys(row["mode"] for row in rows)
    assert len(sections) == 6
    for section in sections:
        assert {"eager", "eager, authors"} & {row["implementation"] for row in rows if row["mode"] == section}
        assert "triton" in {row["implementation"] for row in rows if row["mode"] == section}, section
    page = written.with_suffix(".md").read_text()
    assert all(section in page for section in sections)


@pytest.mark.skipif(not triton.interpreted(), reason="needs TRITON_INTERPRET=1")
def test_triton_keeps_what_it_has_when_the_time_is_over(tmp_path: Path) -> None:
    assert gpu.main(gpu.Options(toy=True, results=tmp_path, seconds=-1)) == []
