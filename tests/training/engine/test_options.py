from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from training.config.presets import RECIPES
from training.config.settings import Settings
from training.data.tracklets import Split
from training.engine.options import make_options, parse_options
from training.engine.run_record import run_record
from training.runtime.errors import UserError
from training.runtime.fields import flatten, update


@pytest.fixture
def resume(split: Split, tmp_path: Path) -> Any:
    """A function from options to the folder of a checkpoint with their record; nothing reads its tensors here."""

    def save(**given: Any) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        config = run_record(make_options(**given).settings, split, torch.device("cpu"))
        (folder / "config.json").write_text(json.dumps(config))
        for name in ("model.safetensors", "training.pt"):
            (folder / name).touch()
        return folder

    return save


def parse(*words: str | Path) -> Any:
    return parse_options("train", [str(word) for word in words])


def test_defaults_are_the_recipe_s() -> None:
    assert make_options().settings == parse().settings == Settings(RECIPES["quick"])
    assert parse("--recipe", "official").settings == Settings(RECIPES["official"])


def test_options_are_over_a_row_and_a_row_over_the_recipe() -> None:
    row = "Baseline+STIM+Lv"
    settings = make_options(recipe="paper", row=row, epochs=3, seed=0, split=2).settings
    assert settings == Settings(update(RECIPES["paper"], rru="none", part_loss=False, epochs=3), split=2)
    assert parse("--recipe", "paper", "--row", row, "--epochs", "3", "--split", "2").settings == settings


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--recipe", "paper"),
        ("--recipe", "paper", "--backbone", "tiny"),
        ("--row", "Baseline+Lv"),
        ("--config", "FILE"),
        ("--config", "FILE", "--backbone", "tiny"),
        ("--resume", "RUN"),
    ],
)
def test_help_shows_the_defaults_that_are_used(
    words: tuple[str, ...],
    resume: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "options.json").write_text('{"recipe": "official", "frames": 4, "backbone": "timm/resnet18"}')
    places = {"FILE": tmp_path / "options.json", "RUN": resume(people=4, amp="bfloat16") if "RUN" in words else None}
    words = tuple(str(places.get(word, word)) for word in words)
    monkeypatch.setenv("COLUMNS", "100")  # one column
    with pytest.raises(SystemExit, match="0"):
        parse(*words, "--help")
    text = " ".join(re.sub("[│╭╰─╮╯]", " ", capsys.readouterr().out).split())
    shown = dict(re.findall(r"--([a-z-]+)(?:, --no-[a-z-]+)? (?:(?!--[a-z]).)*?\(default: (.*?)\)", text))
    options = parse(*words)
    used = flatten(options.settings) | flatten(options.machine)
    assert used.pop("name") == shown["recipe"]
    assert {name: shown.get(name.replace("_", "-")) for name in used} == {
        name: str(value) for name, value in used.items()
    }


def test_every_option_of_the_settings_can_be_set_on_the_command_line() -> None:
    settings = parse().settings
    given: dict[str, Any] = {
        "dataset": "mars", "prid": "official-27", "backbone": "timm/resnet18", "frame_size": (64, 32),
        "weights": "imagenet",
        "auxiliary": "clip", "rru": "spatial", "rru_inputs": "raw", "bn_groups": 2, "head": "lstm", "head_width": 32,
        "classifier": "official", "classifier_width": 64, "video_loss": False, "part_loss": False, "margin": 0.3,
        "auxiliary_weight": 0.5, "sampler": "official", "people": 4, "clips": 3, "frames": 4, "strict_people": True,
        "batches": 5, "epochs": 6, "learning_rate": 0.02, "learning_rate_pretrained": 0.003, "weight_decay": 1e-4,
        "schedule": "step", "warmup_epochs": 2, "step_epochs": 3, "step_factor": 0.5, "eval_every": 2, "eval_from": 1,
        "compare_ops": False, "seed": 7, "split": 3, "data_root": Path("/somewhere"), "check_counts": False,
        "resize": "pillow", "ops": "reference", "amp": "bfloat16", "channels_last": True, "compile_backbone": True,
        "cuda_graph": True, "sync_bn": False,
    }  # fmt: skip
    assert given.keys() == flatten(settings).keys() - {"name"}
    same = {name for name, value in given.items() if flatten(settings)[name] == value}
    assert same == {"sync_bn"}  # it excludes bn_groups
    words: list[str] = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        values = map(str, value if isinstance(value, tuple) else (value,))
        words += [f"--no-{flag}"] if name in ("check_counts", "sync_bn") else [f"--{flag}", *values]
    assert flatten(parse(*words).settings) == {"name": "quick", **given}
    assert make_options(**given).settings == parse(*words).settings
    assert parse("--sync-bn").settings.step.sync_bn


def test_a_file_of_options_is_under_those_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"recipe": "paper", "row": "Baseline+Lv", "frames": 4, "margin": 0.3, "data_root": "d"}))
    settings = parse("--config", file, "--frames", "5").settings
    expected = make_options(recipe="paper", row="Baseline+Lv", frames=5, margin=0.3, data_root=Path("d")).settings
    assert settings == expected and settings.source.data_root == Path.cwd() / "d"
    assert make_options(config=file, frames=5).settings == settings
    assert parse("--config", file, "--backbone", "tiny").settings.recipe.model.weights == "random"
    file.write_text(json.dumps({"backbone": "tiny", "recipe": "paper", "head_width": 96}))
    recipe = parse("--config", file).settings.recipe
    assert recipe == make_options(recipe="paper", backbone="tiny", head_width=96).settings.recipe
    assert (recipe.optim.learning_rate, recipe.model.weights) == (0.05, "random")


def test_the_record_of_a_run_is_such_a_file(resume: Any) -> None:
    given = {"recipe": "official", "row": "Baseline+RRU+Lv", "people": 4, "amp": "bfloat16", "split": 2}
    assert parse("--config", resume(**given) / "config.json").settings == make_options(**given).settings


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ("{", (), r"config: .*options.json cannot be read \("),
        ("[1]", (), r"config: .* cannot be read \(got list, wanted an object of options\)"),
        ('{"frame": 4}', (), "config: .*: got 'frame', wanted some of recipe, row, dataset, "),
        ('{"name": "paper"}', (), "config: .*: got 'name', wanted some of recipe, row, "),
        ('{"recipe": {"name": "quick"}}', (), r"config: .* cannot be read \(got a recipe of several options"),
        ('{"margin": NaN}', (), "config: .*: margin: got nan, wanted a finite number"),
        ('{"frames": 0}', (), "config: .*: frames: got 0, wanted at least 1"),
        ('{"recipe": "slow"}', (), "config: got recipe 'slow' in .*, wanted one of quick, paper, official"),
        ('{"row": "Mine"}', (), r"config: got row 'Mine' in .*, wanted one of Baseline, "),
        ('{"recipe": "paper"}', ("--recipe", "quick"), "recipe: got 'quick', but .* starts from 'paper'"),
    ],
)
def test_a_file_that_is_none_of_options_is_refused(
    content: str, words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "options.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        parse("--config", file, *words)


def test_an_option_that_is_not_known_or_not_possible_is_refused() -> None:
    with pytest.raises(UserError, match="options: got 'frame', wanted one of recipe, row, config, "):
        make_options(frame=4)
    with pytest.raises(UserError, match=r"^frames: got 0, wanted at least 1$"):
        parse("--frames", "0")
    with pytest.raises(UserError, match=r"^part_loss: got True with rru='none'"):
        parse("--rru", "none")
    with pytest.raises(UserError, match=r"^workers: got -1, wanted 0 or more$"):
        make_options(workers=-1)


def test_a_resumed_run_keeps_its_settings_and_may_be_longer(resume: Any) -> None:
    given: dict[str, Any] = {"people": 4, "seed": 5, "data_root": "here", "check_counts": False}
    given |= {"amp": "bfloat16", "sync_bn": True}
    folder = resume(**given)
    settings = make_options(resume=folder).settings
    assert settings == make_options(**given).settings and settings.step.sync_bn
    longer = make_options(resume=folder, recipe="quick", epochs=99, amp="off", channels_last=True).settings
    step = replace(settings.step, amp="off", channels_last=True)
    assert longer == replace(settings, recipe=replace(settings.recipe, epochs=99), step=step)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": "paper"}, "trained with recipe 'quick', got 'paper'"),
        ({"dataset": "mot"}, "trained with dataset='synthetic', got 'mot'$"),
        ({"split": 1, "seed": 4}, "trained with seed=0, got 4; split=0, got 1$"),
        ({"weights": "other.pth"}, "trained with weights='random', got '/.*/other.pth'$"),
        ({"row": "Baseline+RRU+STIM+Lv"}, "trained with part_loss=True, got False$"),
        ({"resize": "pillow"}, "trained with resize='device', got 'pillow'$"),
        ({"sync_bn": True}, "trained with sync_bn=False, got True$"),
        ({"learning_rate": 0.02}, "trained with learning_rate=0.05, got 0.02$"),
    ],
)
def test_resuming_as_something_else_names_the_difference(resume: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_options(resume=resume(), **given)
