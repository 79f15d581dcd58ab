from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import tyro
from torch import Tensor

from training.config.presets import RECIPES, Recipe
from training.config.settings import Settings
from training.config.step import StepConfig
from training.config.table1 import ROWS
from training.data.tracklets import Split
from training.engine import checkpoint
from training.engine.run_record import run_record
from training.export.__main__ import Options as AnyOptions
from training.export.__main__ import main
from training.export.model import TOLERANCE, Options, difference, export_model
from training.model.network import Network
from training.runtime.command import run_command
from training.runtime.errors import UserError
from training.runtime.fields import update

CPU = torch.device("cpu")
WHOLE = "Baseline+RRU+STIM+Lv+Lp"


@pytest.fixture
def saved(recipe: Recipe, split: Split, tmp_path: Path) -> Callable[..., tuple[Path, Network]]:
    """A row of Table 1 as a checkpoint, with its running statistics moved, and its network in eval mode."""

    def save(row: str, base: Recipe = recipe, clips: int = 4, frames: int = 3) -> tuple[Path, Network]:
        settings = Settings(ROWS[row].apply(update(base, frames=frames)), step=StepConfig("reference"))
        network = Network(settings.recipe.model, len(split.train_people), "reference")
        network(torch.rand(clips, frames, 3, *network.backbone.size) * 2 - 1)
        run = tmp_path / "run"
        run.mkdir()
        checkpoint.save(run, network, {"epoch": 1}, run_record(settings, split, CPU))
        return run, network.eval()

    return save


@torch.no_grad()
def outputs_of(network: Network, clips: Tensor) -> dict[str, Tensor]:
    output = network(clips)
    strips = {} if output.strips is None else {"strips": output.strips}
    return {"feature": output.feature, "logits": output.logits, **strips}


@pytest.mark.parametrize(
    ("row", "ops", "free"),
    [
        (WHOLE, "fast", True),
        ("Baseline+RRU(od)+Lv", "reference", False),
        pytest.param("Baseline+RRU+LSTM+Lv", "fast", False, marks=pytest.mark.exhaustive),
        pytest.param("Baseline+STIM+Lv", "reference", True, marks=pytest.mark.exhaustive),
    ],
)
def test_a_program_computes_what_the_network_does(
    saved: Callable[..., tuple[Path, Network]], tmp_path: Path, row: str, ops: str, free: bool
) -> None:
    run, network = saved(row)
    assert export_model(Options(run, tmp_path / "model.pt2", ops=ops)) <= TOLERANCE
    about = {"about.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=about).module()
    for clips, frames in ((1, 3), (5, 3), *([(2, 7)] if free else [])):
        sample = torch.rand(clips, frames, 3, 64, 64) * 2 - 1
        torch.testing.assert_close(program(sample), outputs_of(network, sample), rtol=1e-4, atol=1e-5)
    written = json.loads(about["about.json"])
    assert written["input"] == f"clips: float32 (B, {'T' if free else 3}, 3, 64, 64)"
    assert (written["ops"], written["epoch"], written["checkpoint"]) == (ops, "1", str(checkpoint.last(run)))


@pytest.mark.exhaustive  # a large network, exported and run
@pytest.mark.parametrize(("row", "frames"), [("Baseline", 1), (WHOLE, 2)])
def test_inception_is_exported_without_its_auxiliary_classifier(
    saved: Callable[..., tuple[Path, Network]], tmp_path: Path, row: str, frames: int
) -> None:
    # Few frames: each takes Inception a quarter of a second.
    run, network = saved(row, update(RECIPES["paper"], weights="random"), clips=2, frames=frames)
    assert export_model(Options(run, tmp_path / "model.pt2")) <= TOLERANCE
    program = torch.export.load(tmp_path / "model.pt2").module()
    sample = torch.rand(1, frames, 3, 299, 299) * 2 - 1
    found, wanted = program(sample), outputs_of(network, sample)
    assert found["feature"].shape == (1, network.head.features) and found["feature"].std() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_files_run_where_this_code_is_not(saved: Callable[..., tuple[Path, Network]], tmp_path: Path) -> None:
    run, network = saved(WHOLE)
    for name in ("model.pt2", "model.onnx"):
        main(tyro.cli(AnyOptions, args=["model", "--checkpoint", str(run), "--output", str(tmp_path / name)]))
    clips = torch.rand(3, 3, 3, 64, 64) * 2 - 1
    wanted = outputs_of(network, clips)
    safetensors.torch.save_file({"clips": clips, **wanted}, tmp_path / "wanted")
    elsewhere = """
import sys, onnx, onnxruntime, safetensors.torch, torch
wanted = safetensors.torch.load_file("wanted")
clips = wanted.pop("clips")
of_program = torch.export.load("model.pt2").module()(clips)
session = onnxruntime.InferenceSession("model.onnx")
of_graph = dict(zip(wanted, map(torch.from_numpy, session.run(list(wanted), {"clips": clips.numpy()}))))
for found in (of_program, of_graph):
    torch.testing.assert_close(dict(found), wanted, rtol=1e-4, atol=1e-5)
assert not {"training", "rru_fast"} & set(sys.modules)
print({of.key: of.value for of in onnx.load("model.onnx").metadata_props}["input"])
"""
    there = subprocess.run([sys.executable, "-I", "-c", elsewhere], cwd=tmp_path, capture_output=True, text=True)
    assert there.returncode == 0, there.stderr
    assert there.stdout == "clips: float32 (B, 3, 3, 64, 64)\n"


def test_an_onnx_graph_takes_any_number_of_frames_where_there_is_no_rru(
    saved: Callable[..., tuple[Path, Network]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export_model(Options(saved("Baseline+Lv")[0], tmp_path / "model.onnx")) <= TOLERANCE
    shown = capsys.readouterr().out
    assert "model.onnx: clips: float32 (B, T, 3, 64, 64), ops reference, " in shown
    assert "of the largest element" in shown


def test_a_difference_is_seen_in_any_output_and_one_that_is_not_finite_is_infinite() -> None:
    def eager(clips: Tensor) -> dict[str, Tensor]:
        return {"feature": clips, "logits": torch.full((2,), 50.0), "strips": torch.zeros(3)}

    def changed(name: str, by: float) -> float:
        return difference(lambda clips: {**(of := eager(clips)), name: of[name] + by}, eager, torch.empty(2, 3))

    assert difference(eager, eager, torch.empty(2, 3)) == 0
    assert changed("logits", 1.0) == pytest.approx(0.02)
    assert changed("feature", 0.5) >= 0.5
    for name in ("feature", "logits", "strips"):
        assert changed(name, float("nan")) == changed(name, float("inf")) == float("inf")


def test_a_network_that_has_diverged_is_not_written(saved: Callable[..., tuple[Path, Network]], tmp_path: Path) -> None:
    run, network = saved("Baseline+Lv")
    next(network.classifier.parameters()).data[0, 0] = float("nan")
    safetensors.torch.save_file(network.state_dict(), checkpoint.last(run) / "model.safetensors")
    with pytest.raises(UserError, match=r"^\.pt2: off by inf of an output's largest element, wanted 1e-04 at most$"):
        export_model(Options(run, tmp_path / "model.pt2"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--output OUT/model.pt", "output: got OUT/model.pt, wanted a name that ends in .pt2 or .onnx"),
        ("--output OUT/model.onnx --ops fast", "output: got .onnx with ops fast on cpu, wanted ops reference on cpu"),
        ("--output OUT/model.pt2 --frames 0", "frames: got 0, wanted at least 1"),
        ("--output OUT/model.pt2 --frames 99999999999", "frames: got 99999999999, wanted as many as memory holds ("),
        ("--output OUT/model.pt2 --checkpoint OUT", "OUT: no checkpoint here (config.json is missing)"),
        ("--output OUT/model.onnx", "onnxruntime: not usable here (...), wanted: pip install '.[export]'"),
    ],
)
def test_bad_input_is_one_line_and_no_file(
    saved: Callable[..., tuple[Path, Network]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    message: str,
) -> None:
    run, _ = saved("Baseline")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # an import of it fails, as where it is not installed
    output = tmp_path / "out"
    output.mkdir()
    options = ["model", "--checkpoint", str(run), *arguments.replace("OUT", str(output)).split()]
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: main(tyro.cli(AnyOptions, args=options)))
    error = capsys.readouterr().err
    start, _, end = message.replace("OUT", str(output)).partition("...")
    assert error.startswith(f"error: {start}") and error.endswith(f"{end}\n")
    assert error.count("\n") == 1
    assert list(output.iterdir()) == []
