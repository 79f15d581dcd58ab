from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import forked
from tests.helpers.small_people import render
from tests.helpers.small_sets import write_mars
from training.config.presets import RECIPES, with_tiny_backbone
from training.reproduce.__main__ import reproduce
from training.reproduce.options import Options, make_options, parse_options
from training.runtime.errors import UserError
from training.runtime.fields import update

ROWS = ("Baseline+RRU+STIM+Lv+Lp", "Baseline")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty rendered people in the iLIDS-VID layout: the ten to train on that a batch of the paper's needs."""
    return render(tmp_path_factory.mktemp("data") / "people", people=20)


def options(data: Path, output: Path, **changes: Any) -> Options:
    """Two rows of Table 1 on two splits of little data."""
    small = {"rows": ROWS, "splits": 2, "epochs": 2, "backbone": "tiny", "device": "cpu", "check_counts": False}
    places = {"table": 1, "dataset": "ilids-vid", "data_root": data}
    given = {**small, **places, "output": output, "pictures": False, **changes}
    return make_options(**{name: value for name, value in given.items() if value is not None})


def command(data: Path, output: Path, *more: str) -> list[str]:
    """The same on the command line."""
    fixed = ["--table", "1", "--dataset", "ilids-vid", "--splits", "2", "--epochs", "2", "--backbone", "tiny"]
    places = ["--data-root", str(data), "--output", str(output)]
    choice = ["--device", "cpu", "--no-check-counts", "--rows", *ROWS, *more]
    return [*fixed, *places, *choice]


@pytest.fixture(scope="module")
def straight(people: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of an uninterrupted run, and its table."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    return output, reproduce(options(people, output))


def test_a_table_holds_ours_beside_the_paper_s_and_says_what_it_is_of(straight: tuple[Path, dict[str, Any]]) -> None:
    output, table = straight
    assert [row["row"] for row in table["rows"]] == ["Baseline", "Baseline+RRU+STIM+Lv+Lp"]  # in the paper's order
    full = table["rows"][1]
    assert full["paper"] == {"rank-1": 84.3, "rank-5": 96.8, "rank-20": 99.5}
    assert full["last"]["epoch"] == 2
    of_splits = [json.loads((output / full["row"] / f"split-{n}" / "result.json").read_text()) for n in (0, 1)]
    scores = [100 * of_split["results"][-1]["rank-1"] for of_split in of_splits]
    assert full["last"]["rank-1"]["mean"] == pytest.approx(sum(scores) / 2)
    assert full["last"]["rank-1"]["deviation"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    assert full["last"]["rank-1"]["minus_paper"] == pytest.approx(full["last"]["rank-1"]["mean"] - 84.3)
    assert table["title"] == (
        "Table 1 on dataset ilids-vid, protocol single-shot, ties stable, valid 10, gallery 10, junk 0.0, counts "
        "not checked, preset paper, backbone tiny, ops fast, seed 0, splits 2, epochs 2"
    )
    assert table["notes"][1].startswith(
        "Asked for: 2 of 12 rows, splits 0, 1 of 10, preset paper but for backbone tiny ("
    )
    assert table["notes"][2].startswith("Data: iLIDS-VID layout in ")
    environments = [of_splits[0]["environment"]]
    assert table["environments"] == environments and table["recipe"]["seed"] == 0
    assert table["notes"][3].startswith(f"Computed with device {environments[0]['device']}, threads ")
    assert f"commit {environments[0]['commit']}" in table["notes"][3]
    assert table["notes"][4].startswith("This is not the paper's experiment in full")
    assert json.loads((output / "table.json").read_text()) == table
    assert "| Baseline | rank-1 | 2 | " in (output / "table.md").read_text()


@pytest.mark.exhaustive  # starts four times; ablation's has the claim too
def test_killed_at_two_moments_it_ends_with_the_same_figures(
    people: Path, straight: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    first, second = (output / name / "split-0" for name in reversed(ROWS))
    moments: list[Callable[[], bool]] = [
        (first / "checkpoint-0001").exists,  # while the first checkpoint is written
        (second / "checkpoint-0002").exists,  # while the last checkpoint is written
    ]
    for moment in moments:
        running = forked.command("training.reproduce", *command(people, output))
        running.wait_for(moment)
        os.kill(running.pid, signal.SIGKILL)
        assert running.end().status == -signal.SIGKILL
    assert forked.command("training.reproduce", *command(people, output)).end().status == 0
    assert json.loads((output / "table.json").read_text()) == straight[1]
    assert (output / "table.md").read_text() == (straight[0] / "table.md").read_text()


def test_more_rows_are_added_to_those_that_are_there(
    people: Path, straight: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    output = Path(shutil.copytree(straight[0], tmp_path / "more"))
    before = (output / "Baseline" / "split-0" / "result.json").stat().st_mtime_ns
    table = reproduce(options(people, output, rows=("Baseline", "Baseline+Lv", "Baseline+RRU+STIM+Lv+Lp")))
    assert [row["row"] for row in table["rows"]] == ["Baseline", "Baseline+Lv", "Baseline+RRU+STIM+Lv+Lp"]
    assert [table["rows"][0], table["rows"][2]] == straight[1]["rows"]
    assert (output / "Baseline" / "split-0" / "result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": ("Baseline+Lp",)}, r"rows: got 'Baseline\+Lp', wanted some of table 1's: Baseline, Baseline\+Lv, "),
        (
            {"table": 3, "dataset": None, "rows": ("Baseline+Lv",)},
            r"rows: got 'Baseline\+Lv', wanted some of table 3's",
        ),
        ({"dataset": "mars"}, "dataset: got 'mars' for table 1, wanted one of ilids-vid, prid-2011, synthetic, mot"),
        ({"splits": 11}, "split: got 10, wanted 0 to 9"),
        ({"splits": 0}, "splits: got 0, wanted at least 1"),
        ({"epochs": 0}, "epochs: got 0, wanted at least 1"),
        ({"data_root": None}, "dataset ilids-vid: got no data root"),
        ({"data_root": Path("absent")}, "absent/i-LIDS-VID/sequences: not found; wanted"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(
    people: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        reproduce(options(people, tmp_path / "none", **change))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "none").exists()


def test_a_missing_split_file_is_one_line(people: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(people, tmp_path / "data"))
    (matlab,) = data.rglob("*.mat")
    matlab.unlink()
    with pytest.raises(UserError, match=r"train_test_splits_ilidsvid\.mat: not found; wanted"):
        reproduce(options(data, tmp_path / "none"))


def test_a_checkpoint_of_another_recipe_ends_the_command_in_one_line(
    people: Path, straight: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    output = Path(shutil.copytree(straight[0], tmp_path / "mixed"))
    (output / "Baseline" / "split-0" / "result.json").unlink()
    status, _, printed = forked.command("training.reproduce", *command(people, output, "--seed", "4")).end()
    assert status == 2
    assert printed.startswith("error: Baseline, split 1: output: ")
    assert printed.endswith("of a run with seed=0, got 4; wanted the same settings, or another output\n")
    assert printed.count("\n") == 1


def test_mars_has_a_table_of_four_rows_led_by_map(tmp_path: Path) -> None:
    people = [(person, camera, 8) for person in range(101, 111) for camera in (1, 2)]
    data = write_mars(tmp_path / "data", train=people)
    rows = ("Baseline", "Baseline+STIM+Lv")
    changes = {"table": 3, "dataset": None, "preset": "official", "rows": rows, "splits": None, "epochs": 1}
    table = reproduce(options(data, tmp_path / "runs", **changes))
    assert table["dataset"] == "mars" and table["protocol"] == "mars-official" and table["preset"] == "official"
    assert [row["paper"]["mAP"] for row in table["rows"]] == [64.7, 71.1]
    assert all(row["last"]["mAP"]["mean"] > 0 for row in table["rows"])


def test_every_option_of_a_run_is_one_of_the_table_s(tmp_path: Path) -> None:
    def parse(*words: str) -> Options:
        return parse_options("reproduce", words)

    paper = parse("--table", "1")
    assert paper == make_options(1) and paper.recipe == RECIPES["paper"]
    assert parse("--table", "3", "--preset", "official").recipe == update(RECIPES["official"], dataset="mars")
    words = ["--learning-rate", "0.02", "--frames", "4", "--amp", "bfloat16", "--workers", "2"]
    given = parse("--table", "1", "--dataset", "synthetic", "--backbone", "tiny", *words)
    recipe = update(with_tiny_backbone(RECIPES["paper"]), dataset="synthetic", learning_rate=0.02, frames=4)
    assert (given.recipe, given.step.amp, given.machine.workers) == (recipe, "bfloat16", 2)
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"recipe": "official", "frames": 4, "resize": "pillow"}))
    read = parse("--table", "3", "--config", str(file), "--margin", "0.3")
    assert read.recipe == update(RECIPES["official"], dataset="mars", frames=4, margin=0.3)
    assert (read.preset, read.source.resize) == ("official", "pillow")
    file.write_text(json.dumps({"recipe": "paper", "dataset": "prid-2011"}))
    assert parse("--table", "1", "--config", str(file)).recipe.data.dataset == "prid-2011"
    assert make_options(1, config=str(file)).recipe.data.dataset == "prid-2011"
    assert parse("--table", "1", "--config", str(file), "--dataset", "mot").recipe.data.dataset == "mot"
    file.write_text(json.dumps({"split": 3}))
    with pytest.raises(UserError, match=r"config: got split 3 in .*, wanted none: --splits is a table's"):
        parse("--table", "1", "--config", str(file))
    file.write_text(json.dumps({"recipe": "quick"}))
    with pytest.raises(UserError, match=r"config: got recipe 'quick' in .*, wanted paper or official"):
        parse("--table", "1", "--config", str(file))
    for option, got, wanted in (("head", "lstm", "stim"), ("rru-inputs", "raw", r"appearance\+motion")):
        with pytest.raises(UserError, match=f"got '{got}', wanted '{wanted}': the rows of the table set it"):
            reproduce(parse("--table", "1", f"--{option}", got, "--output", str(tmp_path / "none")))
