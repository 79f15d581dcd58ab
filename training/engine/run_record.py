"""The record of a run: its settings, its data and its environment, as `config.json` keeps them."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from build_tools.provenance import commit_of, version_of
from training.config.presets import RECIPES, diff_from_preset, row_of
from training.config.settings import Settings
from training.data.tracklets import Split
from training.engine.checkpoint import CONFIG, Checkpoint
from training.runtime import distributed
from training.runtime.errors import UserError
from training.runtime.fields import differing, flatten, update

CODE = ("rru_fast", "csrc", "training/*.py")  # a change of these since the commit marks a run

# Options that records of earlier versions lack, with the values that these had in effect.
_ADDED = {"frame_size": None, "schedule": "none", "warmup_epochs": 0, "step_epochs": 300, "step_factor": 0.1}


def run_record(settings: Settings, split: Split, device: torch.device) -> dict[str, Any]:
    """Return the content of `config.json`: the settings, the data they met, and what they ran on."""
    return {
        "settings": settings_to_json(settings),
        "data": split.description,
        "protocol": split.protocol,
        **train_fingerprint(split),
        "environment": environment(device),
    }


def settings_to_json(settings: Settings) -> dict[str, Any]:
    """Return settings as JSON values, by the names of their options; "recipe" is the recipe that they start from."""
    values = flatten(settings)
    root = values["data_root"]
    return {"recipe": values.pop("name"), **values, "data_root": None if root is None else str(root)}


def options_of(content: Any) -> dict[str, Any]:
    """Return the options in a JSON file, by name: of a run's `config.json`, or of a flat object of options.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(content, Mapping):
        raise TypeError(f"got {type(content).__name__}, wanted an object of options")
    if isinstance(content.get("settings"), Mapping):
        return dict(content["settings"])
    if isinstance(content.get("recipe"), Mapping):  # as runs were recorded before options were flat
        if "speed" not in content or "name" not in content["recipe"]:
            raise TypeError("got a recipe of several options, wanted its name, and the options next to it")
        recipe = dict(content["recipe"])
        name, _ = recipe.pop("name"), recipe.pop("preset", None)
        rest = {option: content[option] for option in flatten(Settings()) if option in content}
        return {**rest, **recipe, **content["speed"], "recipe": name}
    return dict(content)


def settings_of(saved: Checkpoint) -> Settings:
    """Return the settings that a checkpoint was trained with.

    Raises:
        UserError: its config is of another version.
    """
    return settings_from_record(saved.config, saved.folder / CONFIG)


def settings_from_record(record: Any, path: Path) -> Settings:
    """Return the settings in a run's record.

    Args:
        record: of `run_record`.
        path: the file it was read from, for messages.

    Raises:
        UserError: it is of another version.
    """
    if isinstance(record, Mapping) and "identities" in record:
        raise UserError(f"{path}: a network without the record of a training, wanted a run, or python -m training.find")
    try:
        kinds = {"people": list, "tracklets": str, "data": str}
        for name, kind in kinds.items():
            if not isinstance(record[name], kind):
                raise UserError(f"{name}: got {record[name]!r}, wanted a {kind.__name__}")
        options = {**_ADDED, **options_of(record)}
        settings = Settings(RECIPES[options.pop("recipe")])
        if missing := [name for name in flatten(settings) if name not in ("name", *options)]:
            raise UserError(f"missing {len(missing)} options: {', '.join(missing)}")
        return update(settings, **options)
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{path}: not one this version wrote ({error})") from error


def differences(before: Settings, now: Settings, *, resuming: bool = False) -> str:
    """Describe in what a run that was trained differs from one to train; "" if only in where the data is.

    Args:
        before, now: the settings of the two.
        resuming: allow another length, other evaluations, and another way to compute a step.
    """
    now = replace(now, source=replace(before.source, resize=now.source.resize))
    if resuming:
        recipe = replace(now.recipe, epochs=before.recipe.epochs, eval=before.recipe.eval)
        now = replace(now, recipe=recipe, step=replace(before.step, sync_bn=now.step.sync_bn))
    return "; ".join(f"{name}={was!r}, got {got!r}" for name, (was, got) in differing(before, now).items())


def describe(settings: Settings, processes: int) -> dict[str, Any]:
    """Return what made a network, as a result shows it: recipe, row, preset, changes, operators, resizing.

    Args:
        settings: of the run.
        processes: how many trained it, in the end.
    """
    recipe, step = settings.recipe, settings.step
    return {
        "recipe": recipe.name,
        "row": row_of(recipe),
        "preset": recipe.preset,
        "changed": [
            *diff_from_preset(recipe, any_length=True),
            *step.diff_from_eager(),
            *([f"processes {processes} (1)"] if processes > 1 else []),
        ],
        "ops": step.ops,
        "resize": settings.source.resize,
    }


def train_fingerprint(split: Split) -> dict[str, Any]:
    """Return what tells training data from other data: its people, digests of their names, a hash of its tracklets."""
    tracklets = repr([(t.person, t.camera, t.name, len(t.frames)) for t in split.train])
    return {
        "people": list(split.train_people),
        **({"names": sorted(map(name_digest, split.names_of(split.train)))} if split.names else {}),
        "tracklets": hashlib.sha256(tracklets.encode()).hexdigest(),
    }


def name_digest(name: str) -> str:
    """Return a digest of a person's name: records are shared, and are to tell whether a known name is in them only."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def environment(device: torch.device) -> dict[str, Any]:
    """Return what figures computed here depend on apart from their settings, as JSON values."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": distributed.world(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("rru-fast", "torch", "torchvision", "numpy")},
        "commit": commit_of(Path(__file__).parents[2], *CODE),
    }
