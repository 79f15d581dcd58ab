from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.small_people import render
from training.config.presets import RECIPES
from training.engine import checkpoint
from training.engine.options import Options, make_options
from training.engine.resumable_run import RESULT, run
from training.runtime.atomic_files import temp_path
from training.runtime.errors import UserError
from training.runtime.fields import update
from training.train import train


def options(data: Path, output: Path, **changes: Any) -> Options:
    """Recipe `quick` on little, without pictures: 4 people, a batch an epoch."""
    small = {"people": 4, "batches": 1, "epochs": 2, "compare_ops": False, "device": "cpu", "check_counts": False}
    return make_options(dataset="ilids-vid", data_root=data, output=output, pictures=False, **{**small, **changes})


@pytest.fixture(scope="module")
def straight(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A finished run's folder and its results."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, run(options(small_data, folder))


def test_a_finished_run_is_read_and_nothing_in_it_changes(
    small_data: Path, straight: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder, results = straight
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run(options(small_data, folder)) == results
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert [result["epoch"] for result in results] == [0, 2]
    assert "kind" not in results[0] and results[0]["protocol"] == "single-shot"


def test_a_run_without_its_result_is_continued_to_the_same_figures(
    small_data: Path, straight: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, results = straight
    copy = Path(shutil.copytree(folder, tmp_path / "killed"))  # as a kill in the last evaluation leaves it
    (copy / RESULT).unlink()
    (copy / "metrics.jsonl").write_bytes((copy / "metrics.jsonl").read_bytes()[:-5])
    assert run(options(small_data, copy)) == results


def test_what_a_kill_in_the_first_epoch_leaves_is_begun_again(
    small_data: Path, straight: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, results = straight
    (tmp_path / "run").mkdir()
    temp_path(tmp_path / "run" / "config.json").write_text('{"recipe": {"na')
    assert run(options(small_data, tmp_path / "run")) == results
    (tmp_path / "again" / "checkpoint-0001").mkdir(parents=True)
    (tmp_path / "again" / "checkpoint-0001" / "model.safetensors").write_bytes(b"\0" * 100)
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(folder / name, tmp_path / "again" / name)
    assert run(options(small_data, tmp_path / "again")) == results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed=0, got 1;"),
        ({"ops": "reference"}, "ops='fast', got 'reference';"),
        ({"split": 1}, "split=0, got 1;"),
        ({"epochs": 3}, "epochs=2, got 3;"),
        ({"recipe": "paper", "backbone": "tiny"}, "name='quick', got 'paper';"),
        ({"row": "Baseline"}, "rru='both', got 'none'; head='stim', got 'baseline';"),
    ],
)
def test_a_folder_of_other_settings_is_refused_finished_or_not(
    small_data: Path, straight: tuple[Path, list[dict[str, Any]]], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    unfinished = Path(shutil.copytree(straight[0], tmp_path / "unfinished"))
    (unfinished / RESULT).unlink()
    begun = Path(shutil.copytree(unfinished, tmp_path / "begun"))
    (begun / checkpoint.LAST).unlink()
    for folder in (straight[0], unfinished, begun):
        with pytest.raises(UserError, match=rf"output: {folder}/.*json is of a run with {message}") as raised:
            run(options(small_data, folder, **change))
        assert str(raised.value).endswith("wanted the same settings, or another output")
        assert "\n" not in str(raised.value)


def test_a_folder_of_other_data_or_of_something_else_is_refused(
    straight: tuple[Path, list[dict[str, Any]]], small_data: Path, tmp_path: Path
) -> None:
    render(tmp_path / "others", people=8, seed=1)
    with pytest.raises(UserError, match="is of a run with other data"):
        run(options(tmp_path / "others", straight[0]))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(UserError, match="notes is not an empty folder"):
        run(options(small_data, tmp_path / "notes"))
    with pytest.raises(UserError, match="output: got None"):
        run(replace(options(small_data, tmp_path), output=None))


def test_evaluation_counts_from_the_recipe_s_first_epoch(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "quick", update(RECIPES["quick"], eval_every=2, eval_from=3))
    results = run(options(small_data, tmp_path / "run", epochs=5))
    assert [result["epoch"] for result in results] == [0, 3, 5]  # always the untrained network, and the last


def test_a_run_continued_by_hand_for_longer_is_another(
    straight: tuple[Path, list[dict[str, Any]]], small_data: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(straight[0], tmp_path / "longer"))
    train(make_options(resume=copy, epochs=3, device="cpu", pictures=False))
    assert run(options(small_data, copy)) == straight[1]
    with pytest.raises(UserError, match="epochs=2, got 3"):
        run(options(small_data, copy, epochs=3))
