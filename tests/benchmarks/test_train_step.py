"""The benchmark of training, at toy size: real processes, the real trainer and loader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import train_step
from benchmarks.stages import STAGES
from benchmarks.train_step_sections import TOY, Pipeline, Run, pipelines, rows
from training.data.synthetic import generate
from training.model import losses as losses_module
from training.pack import Options as PackOptions
from training.pack import pack


def test_every_pipeline_that_is_right_is_timed_and_its_stages_are_all_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "rows.json"
    options = train_step.Options(toy=True, rounds=1, compile=False, people=4, json=path)
    found = train_step.main(options)
    assert json.loads(path.read_text())["rows"] == json.loads(json.dumps(found))
    by_name = {row["pipeline"]: row for row in found}
    assert list(by_name) == list(pipelines(compile=False))
    assert by_name.pop("fast ops, CUDA-graphed RRU")["left out"] == "n/a on a CPU"
    for name, row in by_name.items():
        assert row["left out"] is None, name
        assert row["frames/s"] == pytest.approx(12 / row["step ms"] * 1e3)
        shares = [row[f"{stage} %"] for stage in STAGES]
        assert min(shares) >= 0 and sum(shares) == pytest.approx(100)
        assert row["backward %"] > row["losses %"] > 0 and row["backbone %"] > 0 and row["RRU %"] > 0
    assert by_name["reference"]["x reference"] == 1
    told = capfd.readouterr().out
    assert all(f"parity: {name}, frames within " in told for name in by_name if name != "reference")


def test_no_figure_is_given_for_a_pipeline_whose_losses_or_frames_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "people"
    generate(data, people=4)
    pack(PackOptions("ilids-vid", data.with_suffix(".pack"), data, splits=(0,), check_counts=False))
    other = tmp_path / "other"
    generate(other, people=4, seed=1)
    pack(PackOptions("ilids-vid", other.with_suffix(".pack"), other, splits=(0,), check_counts=False))
    other.with_suffix(".pack").replace(data.with_suffix(".pack"))
    chosen = {"reference": Pipeline(), "packed frames": Pipeline(packed=True), "fast ops": Pipeline(ops="fast")}
    monkeypatch.setattr("benchmarks.train_step_sections.pipelines", lambda compile: chosen)
    exact = losses_module.operators
    monkeypatch.setattr(losses_module, "operators", lambda ops: exact("reference") if ops == "reference" else Doubled)
    run = Run("toy", next(iter(TOY.values())), data, torch.device("cpu"), 1, False)
    reference, packed, fast = rows(run)
    assert reference["frames/s"] > 0
    assert packed["left out"].startswith("wrong: frames within ") and packed["frames/s"] is None
    assert fast["left out"].startswith("wrong: frames within 0 grey levels, losses within ") and fast["step ms"] is None


class Doubled:
    """Operators of which one is wrong."""

    class BatchHardTripletLoss(torch.nn.Module):
        def __init__(self, margin: float, **_: object) -> None:
            super().__init__()
            self.margin = margin

        def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return 2 * features.mean() + self.margin
