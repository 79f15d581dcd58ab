from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from training.config.presets import RECIPES
from training.config.settings import Options, Settings, commit_of, resolve, trained_on
from training.data.tracklets import Split
from training.engine.checkpoint import Checkpoint
from training.runtime.errors import UserError


def test_what_is_not_given_is_as_the_recipe_says() -> None:
    assert resolve(Options(), None) == Settings(RECIPES["quick"], None, 0, "fast")


def test_options_change_the_recipe_and_a_row_changes_the_model() -> None:
    settings = resolve(Options(recipe="paper", row="Baseline+STIM+Lv", epochs=3, seed=0, split=2), None)
    paper = RECIPES["paper"]
    assert settings.recipe == replace(paper, rru="none", part_loss=False, epochs=3)
    assert settings.split == 2


def test_settings_survive_their_config(split: Split) -> None:
    settings = resolve(Options(data_root=Path("here"), ops="reference", people=4, resize="pillow"), None)
    assert settings.data_root == Path.cwd() / "here"
    config = json.loads(json.dumps(settings.config(split, torch.device("cpu"))))
    assert Settings.of(Checkpoint(Path(), config, {}, {})) == settings
    assert config["people"] == [3, 5, 8, 9]
    assert config["environment"]["torch"] == torch.__version__.partition("+")[0]


def test_a_resumed_run_keeps_its_settings_and_may_be_longer() -> None:
    resumed = resolve(Options(people=4, seed=5, data_root=Path("here")), None)
    settings = resolve(Options(recipe="quick", epochs=99), resumed)
    assert settings == replace(resumed, recipe=replace(resumed.recipe, epochs=99))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(recipe="paper"), "trained with recipe 'quick', got 'paper'"),
        (Options(dataset="mot"), "trained with dataset='synthetic', got 'mot'$"),
        (Options(split=1, seed=4), "trained with seed=0, got 4; split=0, got 1$"),
        (Options(weights="random"), "weights: got 'random' with --resume"),
        (Options(row="Baseline+RRU+STIM+Lv"), "trained with part_loss=True, got False$"),
        (Options(resize="pillow"), "trained with resize='device', got 'pillow'$"),
    ],
)
def test_resuming_as_something_else_names_the_difference(options: Options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(options, resolve(Options(), None))


def test_a_weights_file_is_found_from_another_working_folder_too() -> None:
    assert resolve(Options(weights="some.pth"), None).recipe.weights == str(Path.cwd() / "some.pth")
    assert resolve(Options(recipe="paper", weights="imagenet"), None).recipe.weights == "imagenet"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ops": "slow"}, "ops: got 'slow', wanted one of fast, reference"),
        ({"resize": "later"}, "resize: got 'later', wanted one of device, pillow"),
        ({"recipe": {**asdict(RECIPES["quick"]), "head": "tail"}}, "head: got 'tail', wanted one of baseline"),
        ({"recipe": {**asdict(RECIPES["quick"]), "margin": "wide"}}, "margin: got 'wide', wanted a number"),
        ({"recipe": {**asdict(RECIPES["quick"]), "batches": 1.5}}, "batches: got 1.5, wanted an integer or None"),
        ({"recipe": {**asdict(RECIPES["quick"]), "people": True}}, "people: got True, wanted an integer"),
        ({"recipe": {**asdict(RECIPES["quick"]), "video_loss": 1}}, "video_loss: got 1, wanted True or False"),
        ({"recipe": {"name": "quick"}}, "missing [23][0-9] required"),
        ({"people": 4}, "people: got 4, wanted a list"),
        ({"tracklets": None}, "tracklets: got None, wanted a str"),
        ({"sync_bn": 1}, "sync_bn: got 1, wanted a bool"),
    ],
)
def test_a_config_of_another_version_is_named(split: Split, change: dict[str, object], message: str) -> None:
    config = resolve(Options(), None).config(split, torch.device("cpu"))
    with pytest.raises(UserError, match=f"run/config.json: not one this version wrote .*{message}"):
        Settings.of(Checkpoint(Path("run"), {**config, **change}, {}, {}))


def test_the_data_trained_on_is_told_from_data_with_as_many_people(split: Split) -> None:
    shorter = replace(split.train[0], frames=split.train[0].frames[:1])
    assert trained_on(split) == trained_on(replace(split, probe=()))
    assert trained_on(split) != trained_on(replace(split, train=(shorter, *split.train[1:])))


def test_a_set_read_without_its_counts_is_read_so_again_on_resuming(split: Split) -> None:
    begun = resolve(Options(check_counts=False), None)
    assert not begun.check_counts and resolve(Options(), None).check_counts
    config = json.loads(json.dumps(begun.config(split, torch.device("cpu"))))
    assert not resolve(Options(), Settings.of(Checkpoint(Path(), config, {}, {}))).check_counts


def test_a_commit_is_marked_where_code_was_changed_beside_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", *author, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert commit_of(tmp_path) is None
    for path in ("training/data/mot.py", "training/README.md", "rru_fast/triton/refine.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("as committed")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "training" / "README.md").write_text("a table that a run wrote")
    (tmp_path / "runs").mkdir()
    assert commit_of(tmp_path) == commit
    for path in ("training/data/mot.py", "rru_fast/triton/refine.py", "training/data/new.py"):
        (tmp_path / path).write_text("changed")
        assert commit_of(tmp_path) == f"{commit}-dirty"
        git("stash", "-u", "-q")
    assert commit_of(tmp_path) == commit


def test_synchronised_statistics_are_kept_and_are_no_matter_of_resuming(split: Split) -> None:
    begun = resolve(Options(sync_bn=True), None)
    again = Settings.from_config(begun.config(split, torch.device("cpu")), Path("config.json"))
    assert resolve(Options(), again).sync_bn
    with pytest.raises(UserError, match=r"trained with sync_bn=False, got True$"):
        resolve(Options(sync_bn=True), resolve(Options(), None))
    with pytest.raises(UserError, match="sync_bn: got True with bn_groups=2, wanted one or the other"):
        resolve(Options(sync_bn=True, bn_groups=2), None)
