"""Benchmark of a training step, at toy size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from torch.optim import SGD

import rru_fast
from benchmarks.harness import measure
from benchmarks.train_step import pipelines, runner, sections
from benchmarks.train_step.__main__ import Options, main
from benchmarks.train_step.pipelines import PIPELINES, REFERENCE, TOY, Pipeline, Run, packed
from benchmarks.train_step.runner import Runner
from benchmarks.train_step.stages import STAGES
from training.config.optim import OptimConfig
from training.config.step import StepConfig
from training.data.datasets.synthetic import generate
from training.data.loading import Batch
from training.model.config import LossConfig, ModelConfig
from training.model.losses import Losses
from training.model.network import Network
from training.model.operators import Ops
from training.pack import Options as PackOptions
from training.pack import pack

PEOPLE = 4  # two of them to train on, as many as in a batch of the toy


def test_each_pipeline_trains_as_the_reference_does_and_has_its_time_by_stages(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    rows = main(Options(toy=True, people=PEOPLE, json=path))
    assert [row["pipeline"] for row in rows] == list(PIPELINES)
    not_here = {row["pipeline"]: row["left out"] for row in rows if row["left out"]}
    assert not_here.pop("fast ops, CUDA-graphed RRU") == "n/a on a CPU"
    lacks_bfloat16 = not measure.has_bfloat16(torch.device("cpu"))
    for name, own in PIPELINES.items():
        if own.step.amp == "bfloat16" and lacks_bfloat16:
            assert not_here.pop(name) == "n/a: this processor has no bfloat16"
        elif own.step.compile_backbone:
            assert not_here.pop(name) == "n/a: compilation takes minutes"
    assert not not_here
    measured = [row for row in rows if not row["left out"]]
    assert measured[0]["pipeline"] == REFERENCE and measured[0]["x reference"] == 1
    printed = capfd.readouterr().out
    for row in measured:
        assert row["frames/s"] == pytest.approx(2 * 2 * 3 / (row["step ms"] / 1e3))
        shares = [row[f"{stage} %"] for stage in STAGES]
        assert min(shares) > 0 and sum(shares) == pytest.approx(100)
        assert row["pipeline"] == REFERENCE or f"parity: {row['pipeline']}, frames within" in printed
    written = json.loads(path.read_text())
    assert written["rows"] == json.loads(json.dumps(rows))
    assert {"hardware", "threads", "torch", "commit"} <= written["environment"].keys()


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "people"
    generate(root, people=PEOPLE)
    return root


def test_a_pipeline_of_other_frames_and_one_that_does_not_run_have_no_figures(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, others = tmp_path / "people", tmp_path / "others"
    data.symlink_to(people)
    shutil.copytree(data, others)
    for path in others.rglob("*.png"):
        with Image.open(path) as frame:
            ImageOps.invert(frame).save(path)
    run = Run("toy", TOY["toy, 1 worker"], data, torch.device("cpu"))
    tried = {REFERENCE: Pipeline(), "packed frames": Pipeline(packed="encoded")}
    monkeypatch.setattr(pipelines, "PIPELINES", tried)
    _, not_running = sections.rows(run)
    assert not_running["left out"].startswith("does not run: UserError: ") and not_running["frames/s"] is None
    pack(PackOptions("ilids-vid", packed(data, "encoded"), others, splits=(0,), check_counts=False))
    _, wrong = sections.rows(run)
    assert wrong["left out"].startswith("wrong: frames within ") and wrong["frames/s"] is None


def other_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    right = runner.Losses

    def wrong(config: LossConfig, ops: Ops) -> Losses:
        return right(replace(config, margin=config.margin + 0.001) if ops == "fast" else config, ops)

    monkeypatch.setattr(runner, "Losses", wrong)


def no_gradient_of_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    right = runner.Network

    def wrong(config: ModelConfig, people: int, ops: Ops, cuda_graph: bool) -> Network:
        network = right(config, people, ops, cuda_graph)
        if ops == "fast":
            assert network.rru is not None
            network.rru.transition.weight.register_hook(torch.zeros_like)
        return network

    monkeypatch.setattr(runner, "Network", wrong)


def no_change_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    right = runner.make_optimizer

    def wrong(network: Network, config: OptimConfig) -> SGD:
        optimizer = right(network, config)
        if isinstance(network.rru, rru_fast.RRU):
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        return optimizer

    monkeypatch.setattr(runner, "make_optimizer", wrong)


def other_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Runner.batches

    def wrong(self: Runner) -> list[Batch]:
        first, *others = right(self)
        if isinstance(self.trainer.network.rru, rru_fast.RRU):
            others[-1] = replace(others[-1], labels=others[-1].labels.flip(0))
        return [first, *others]

    monkeypatch.setattr(Runner, "batches", wrong)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(other_margin, "wrong: frames within ", marks=pytest.mark.exhaustive),
        pytest.param(no_gradient_of_the_gate, "wrong: frames within ", marks=pytest.mark.exhaustive),
        (no_change_of_the_weights, "wrong: frames within "),
        (other_labels, "wrong: its batches are of other clips, or have other labels"),
    ],
)
def test_a_pipeline_that_trains_differently_has_no_figures(
    people: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[pytest.MonkeyPatch], None], reason: str
) -> None:
    spoil(monkeypatch)
    monkeypatch.setattr(pipelines, "PIPELINES", {REFERENCE: Pipeline(), "fast ops": Pipeline(step=StepConfig("fast"))})
    _, row = sections.rows(Run("toy", TOY["toy, 1 worker"], people, torch.device("cpu")))
    assert str(row["left out"]).startswith(reason)


def test_a_section_that_the_time_did_not_reach_is_named() -> None:
    with pytest.raises(SystemExit, match="left out:\n  toy, 1 worker: the time is over"):
        main(Options(toy=True, people=PEOPLE, seconds=-1))
