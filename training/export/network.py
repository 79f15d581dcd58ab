"""Export a trained network as a folder to share: its config and its tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from training.engine import checkpoint
from training.engine.run_record import options_of, settings_of
from training.runtime.atomic_files import check_new_folder, new_folder, write_output
from training.runtime.terminal import say


@dataclass
class Options:
    """Write a network to share: a folder that --checkpoint takes anywhere, and `Network.from_pretrained`.

    It holds model.safetensors and config.json, with how and on what the network was trained, but not where that was.
    `hf upload NAME FOLDER` publishes it.
    """

    checkpoint: Path
    """Folder of a run, or of one checkpoint."""
    output: Path
    """The new folder."""


def export_network(options: Options) -> None:
    """Write the folder.

    Raises:
        UserError: there is no usable checkpoint, or the folder is there already or cannot be written.
    """
    check_new_folder(options.output)
    saved = checkpoint.load(options.checkpoint)
    settings_of(saved)  # raises unless it is one that this version reads
    config: dict[str, Any] = {**saved.config, "settings": options_of(saved.config), "epoch": saved.epoch}
    settings, root = config["settings"], config["settings"]["data_root"]
    settings["data_root"], settings["weights"] = None, Path(settings["weights"]).name  # no path of this machine
    config["data"] = config["data"] if root is None else config["data"].replace(root, "the data root")
    with new_folder(options.output) as folder:
        write_output(folder / checkpoint.CONFIG, json.dumps(config, indent=2) + "\n")
        write_output(folder / checkpoint.MODEL, safetensors.torch.save(saved.model))
    parameters = sum(tensor.numel() for tensor in saved.model.values())
    say(f"{options.output}: a network of {parameters:,} numbers, trained for {saved.epoch} epochs")
