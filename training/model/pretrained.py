"""Networks as folders to share: config.json and model.safetensors, of a run or by the Hugging Face Hub's mixin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import PyTorchModelHubMixin

from training.model.config import ModelConfig
from training.model.operators import Ops
from training.runtime.errors import UserError

CONFIG = "config.json"
T = TypeVar("T", bound="Pretrained")


class Architecture(NamedTuple):
    """Arguments of a network, as its config.json has them.

    config: with random weights, which those of the file replace.
    identities: number of people the classifier tells apart.
    ops: operators it was trained with.
    """

    config: ModelConfig
    identities: int
    ops: Ops


def read_architecture(record: Any, source: str) -> Architecture:
    """Read the architecture from the content of config.json, of a run or of `Pretrained.save_pretrained`.

    Args:
        record: JSON values.
        source: its origin, for messages.

    Raises:
        UserError: it describes no network of this project.
    """
    try:
        settings = record["settings"]
        # An option that a record of an earlier version lacks had its default's effect.
        given = {field.name: settings[field.name] for field in fields(ModelConfig) if field.name in settings}
        given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        if "backbone" not in given:
            raise UserError("settings: got no backbone")
        identities = record["identities"] if "identities" in record else len(record["people"])
        if not isinstance(identities, int):
            raise UserError(f"identities: got {identities!r}, wanted a number of people")
        return Architecture(ModelConfig(**{**given, "weights": "random"}), identities, settings["ops"])
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{source}: not the config of a network of this project ({error})") from error


class Pretrained(PyTorchModelHubMixin, library_name="rru_fast", tags=["person-re-identification", "video"]):
    """Base of a network that Hugging Face's methods save and load: `save_pretrained`, `from_pretrained`, `push_to_hub`.

    `from_pretrained` also loads a checkpoint's folder, or one by `python -m training.export network`.
    """

    config: ModelConfig
    identities: int
    ops: Ops

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        settings = {**asdict(replace(self.config, weights="random")), "ops": self.ops}
        record = {"settings": settings, "identities": self.identities}
        (save_directory / CONFIG).write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def _from_pretrained(  # type: ignore[override]  # of the arguments only the config is looked at
        cls: type[T], *, model_id: str, config: Mapping[str, Any] | None = None, **arguments: Any
    ) -> T:
        architecture = read_architecture(config, f"{model_id}: {CONFIG}")
        loaded: T = super()._from_pretrained(model_id=model_id, **{**architecture._asdict(), **arguments})  # type: ignore[misc]
        return loaded
