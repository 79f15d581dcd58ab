from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from build_tools.provenance import commit_of
from training.config.presets import RECIPES
from training.config.settings import Settings
from training.data.tracklets import Split
from training.engine.checkpoint import Checkpoint
from training.engine.options import make_options
from training.engine.run_record import CODE, differences, run_record, settings_of, train_fingerprint
from training.runtime.errors import UserError

CPU = torch.device("cpu")


def record(data: Split, **given: Any) -> tuple[Settings, dict[str, Any]]:
    """Settings and their record, as a file has it."""
    settings = make_options(**given).settings
    return settings, json.loads(json.dumps(run_record(settings, data, CPU)))


def read(config: dict[str, Any]) -> Settings:
    return settings_of(Checkpoint(Path("run"), config, {}, {}))


def test_settings_survive_their_record(split: Split) -> None:
    settings, config = record(split, data_root=Path("here"), ops="reference", people=4, resize="pillow", amp="bfloat16")
    assert settings.source.data_root == Path.cwd() / "here"
    assert read(config) == settings
    assert config["people"] == [3, 5, 8, 9]
    assert config["environment"]["torch"] == torch.__version__.partition("+")[0]


def test_a_record_from_before_options_were_flat_is_read(split: Split) -> None:
    settings, config = record(split, recipe="official", bn_groups=2, split=3, amp="float16", data_root=Path("here"))
    flat = config.pop("settings")
    name, places = flat.pop("recipe"), ("data_root", "split", "ops", "check_counts", "resize", "sync_bn")
    step = ("amp", "channels_last", "compile_backbone", "cuda_graph")
    added = ("schedule", "warmup_epochs", "step_epochs", "step_factor")
    recipe = {option: value for option, value in flat.items() if option not in (*places, *step, *added)}
    old = {"recipe": {"name": name, "preset": "official", **recipe}, "speed": {option: flat[option] for option in step}}
    assert read({**config, **old, **{option: flat[option] for option in places}}) == settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ops": "slow"}, "ops: got 'slow', wanted one of fast, reference"),
        ({"resize": "later"}, "resize: got 'later', wanted one of device, pillow"),
        ({"head": "tail"}, "head: got 'tail', wanted one of baseline"),
        ({"margin": "wide"}, "margin: got 'wide', wanted a number"),
        ({"batches": 1.5}, "batches: got 1.5, wanted an integer or None"),
        ({"people": True}, "people: got True, wanted an integer"),
        ({"video_loss": 1}, "video_loss: got 1, wanted True or False"),
        ({"sync_bn": 1}, "sync_bn: got 1, wanted True or False"),
        ({"amp": "half"}, "amp: got 'half', wanted one of off, bfloat16, float16"),
        ({"turbo": True}, "options: got 'turbo', wanted one of name, dataset, "),
        ({"recipe": "slow"}, "'slow'"),
    ],
)
def test_a_record_of_another_version_is_named(split: Split, change: dict[str, object], message: str) -> None:
    _, config = record(split)
    with pytest.raises(UserError, match=f"run/config.json: not one this version wrote .*{message}"):
        read({**config, "settings": {**config["settings"], **change}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"people": 4}, "people: got 4, wanted a list"),
        ({"tracklets": None}, "tracklets: got None, wanted a str"),
        ({"settings": {"recipe": "quick"}}, r"missing \d\d options: dataset, "),
        ({"settings": {"recipe": "quick", "people": 4}}, r"missing \d\d options: dataset, "),
    ],
)
def test_a_record_that_lacks_something_is_named(split: Split, change: dict[str, object], message: str) -> None:
    _, config = record(split)
    with pytest.raises(UserError, match=f"run/config.json: not one this version wrote .*{message}"):
        read({**config, **change})


def test_a_difference_is_named_but_for_where_the_data_is() -> None:
    before = make_options(data_root=Path("here")).settings
    assert differences(before, make_options(data_root=Path("there"), check_counts=False).settings) == ""
    now = make_options(split=1, seed=4, amp="bfloat16", epochs=9).settings
    assert differences(before, now) == ("epochs=7, got 9; seed=0, got 4; split=0, got 1; amp='off', got 'bfloat16'")
    assert differences(before, now, resuming=True) == "seed=0, got 4; split=0, got 1"
    paper = replace(before, recipe=RECIPES["paper"])
    assert differences(before, paper).startswith("name='quick', got 'paper'; dataset='synthetic', got 'ilids-vid'")


def test_training_data_is_told_from_data_with_as_many_people(split: Split) -> None:
    shorter = replace(split.train[0], frames=split.train[0].frames[:1])
    assert train_fingerprint(split) == train_fingerprint(replace(split, query=()))
    assert train_fingerprint(split) != train_fingerprint(replace(split, train=(shorter, *split.train[1:])))


def test_a_commit_is_marked_where_code_was_changed_beside_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", *author, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert commit_of(tmp_path, *CODE) is None
    for path in ("training/data/mot.py", "training/README.md", "rru_fast/triton/refine.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("as committed")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "training" / "README.md").write_text("a table that a run wrote")
    (tmp_path / "runs").mkdir()
    assert commit_of(tmp_path, *CODE) == commit
    for path in ("training/data/mot.py", "rru_fast/triton/refine.py", "training/data/new.py"):
        (tmp_path / path).write_text("changed")
        assert commit_of(tmp_path, *CODE) == f"{commit}-dirty"
        git("stash", "-u", "-q")
    assert commit_of(tmp_path, *CODE) == commit
