"""A run's settings: what the command line says, over what the recipe or the resumed run says."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from training.config.presets import FREE, RECIPES, Recipe
from training.config.step import PLAIN, Amp, Speed
from training.config.table1 import ROWS
from training.data import Dataset, PridPeople
from training.data.resizing import Resize
from training.data.tracklets import Split
from training.engine.checkpoint import CONFIG, Checkpoint
from training.model.operators import Ops
from training.runtime import distributed
from training.runtime.atomic_files import resolved
from training.runtime.errors import UserError

# What was chosen for a backbone, and changes with it.
_OF_THE_BACKBONE = ("weights", "head_width", "classifier_width", "learning_rate", "learning_rate_pretrained")


@dataclass
class Options:
    """Train the paper's network. What is not given is as the recipe says, or as the resumed run had it."""

    recipe: Literal[tuple(RECIPES)] | None = None  # type: ignore[valid-type]
    """The recipe; quick if neither it nor --resume is given."""
    row: Literal[tuple(ROWS)] | None = None  # type: ignore[valid-type]
    """A row of the paper's Table 1 to train instead of the full model."""
    dataset: Dataset | None = None
    """What to train on."""
    data_root: Path | None = None
    """The dataset's folder, or a file made of it by training.pack; only the synthetic one has a default."""
    split: int | None = None
    """Which of the dataset's splits, from 0; the first if not given."""
    check_counts: bool = True
    """Whether iLIDS-VID, PRID-2011 and MARS must hold as much as published; a resumed run is as it was."""
    output: Path | None = None
    """The run's folder; a new one under runs/, or the resumed run's, if not given."""
    resume: Path | None = None
    """Folder of a run to continue from its last checkpoint."""
    prid: PridPeople | None = None
    """Which of PRID-2011's people: those of more than 21 frames, or of at least 27, as in the official splits."""
    backbone: Literal["inception_v3", "tiny"] | None = None
    """The backbone; in a recipe of another, tiny brings quick's weights, widths and learning rates with it."""
    epochs: int | None = None
    """Passes over the sampler."""
    batches: int | None = None
    """Batches an epoch."""
    sampler: Literal["pk", "official"] | None = None
    """The order of training: P people in turn with K clips each, or that of the authors' code."""
    people: int | None = None
    """P, people a batch."""
    bn_groups: int | None = None
    """Groups of clips with batch statistics of their own, in every batch norm; 4 stands for the authors' GPUs."""
    seed: int | None = None
    """Decides initial weights, order of the data and dropout."""
    classifier: Literal["paper", "official"] | None = None
    """The block before the identities, as the paper or as its authors' code has it."""
    auxiliary: Literal["frames", "clip"] | None = None
    """What Inception-v3's auxiliary classifier sees: each frame, or a clip's mean over time."""
    eval_from: int | None = None
    """The first epoch to test after, from which on it is every so many."""
    eval_every: int | None = None
    """Epochs between tests."""
    weights: str | None = None
    """The backbone's start: imagenet, random, or a .pth or .safetensors file."""
    ops: Ops | None = None
    """The library's operators (fast, if not given) or their plain PyTorch twins."""
    compare_ops: bool | None = None
    """Whether to end by timing a step with the one against the other."""
    amp: Amp | None = None
    """Autocast of the forward and the losses to a 16-bit dtype; off, if not given. float16 scales the gradients."""
    channels_last: bool | None = None
    """Whether frames and the backbone's weights lie channels last."""
    compile_backbone: bool | None = None
    """Whether to run the backbone through torch.compile; that takes minutes at the start."""
    cuda_graph: bool | None = None
    """Whether to run the RRU as CUDA graphs, on a GPU."""
    resize: Resize | None = None
    """Who resizes frames: the device that computes, a batch at once (if not given), or Pillow, as they are read."""
    sync_bn: bool = False
    """Batch statistics of all processes in every batch norm, not of each by itself; a resumed run is as it was."""
    workers: int = 0
    """Processes that read frames ahead."""
    pictures: bool = True
    """Whether TensorBoard shows, after every test, who is found for some probes and the maps around the gate."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


@dataclass(frozen=True)
class Settings:
    """What a run is made of, resolved.

    recipe: with the command line's changes in it.
    data_root: the dataset's folder; `None` for the dataset's default.
    split: which of its splits, from 0.
    ops: which operators.
    check_counts: whether the dataset must hold as much as published.
    speed: how a step is computed.
    resize: who resizes frames.
    sync_bn: whether batch statistics are those of all processes.
    """

    recipe: Recipe
    data_root: Path | None
    split: int
    ops: Ops
    check_counts: bool = True
    speed: Speed = PLAIN
    resize: Resize = "device"
    sync_bn: bool = False

    def fitted(self, split: Split) -> Settings:
        """These, with P lowered to the people there are to train on, where the recipe allows that."""
        people = len(split.train_people)
        if self.recipe.strict_people or people >= self.recipe.people or people < 2:
            return self
        return replace(self, recipe=replace(self.recipe, people=people))

    def config(self, split: Split, device: torch.device) -> dict[str, Any]:
        """What `config.json` keeps: these settings, the data they met, and what they ran on."""
        return {
            "recipe": asdict(self.recipe),
            "data_root": None if self.data_root is None else str(self.data_root),
            "split": self.split,
            "ops": self.ops,
            "check_counts": self.check_counts,
            "speed": asdict(self.speed),
            "resize": self.resize,
            "sync_bn": self.sync_bn,
            "data": split.description,
            "protocol": split.protocol,
            **trained_on(split),
            "environment": environment(device),
        }

    @staticmethod
    def of(checkpoint: Checkpoint) -> Settings:
        """The settings that a checkpoint was trained with.

        Raises:
            UserError: its config is of another version.
        """
        return Settings.from_config(checkpoint.config, checkpoint.folder / CONFIG)

    @staticmethod
    def from_config(config: Any, path: Path) -> Settings:
        """The settings that `config` kept, read from a file.

        Raises:
            UserError: it is of another version.
        """
        try:
            kinds = {"people": list, "tracklets": str, "data": str, "split": int, "check_counts": bool, "sync_bn": bool}
            for name, kind in kinds.items():
                if not isinstance(config[name], kind):
                    raise UserError(f"{name}: got {config[name]!r}, wanted a {kind.__name__}")
            for name, choices in {"ops": get_args(Ops), "resize": get_args(Resize)}.items():
                if config[name] not in choices:
                    raise UserError(f"{name}: got {config[name]!r}, wanted one of {', '.join(choices)}")
            root = config["data_root"]
            recipe = Recipe(**config["recipe"])
            root = None if root is None else Path(root)
            speed = Speed(**config["speed"])
            return Settings(
                recipe,
                root,
                config["split"],
                config["ops"],
                config["check_counts"],
                speed,
                config["resize"],
                config["sync_bn"],
            )
        except (KeyError, TypeError, UserError) as error:
            raise UserError(f"{path}: not one this version wrote ({error})") from error


def trained_on(split: Split) -> dict[str, Any]:
    """What tells the training data of one run from another's: its people, and a hash of its tracklets."""
    tracklets = repr([(t.person, t.camera, t.name, len(t.frames)) for t in split.train])
    return {"people": list(split.train_people), "tracklets": hashlib.sha256(tracklets.encode()).hexdigest()}


def resolve(options: Options, resumed: Settings | None) -> Settings:
    """The settings that options ask for.

    Args:
        options: of the command line.
        resumed: of the run they continue, if any.

    Raises:
        UserError: the recipe they make is impossible, or is not the one the resumed run was trained with.
    """
    if options.workers < 0:
        raise UserError(f"workers: got {options.workers}, wanted 0 or more")
    if resumed is not None and options.weights is not None:
        raise UserError(f"weights: got {options.weights!r} with --resume, whose weights come from the checkpoint")
    if resumed is None:
        base = Settings(RECIPES[options.recipe or "quick"], None, 0, "fast")
    elif options.recipe not in (None, resumed.recipe.name):
        raise UserError(f"resume: the run was trained with recipe {resumed.recipe.name!r}, got {options.recipe!r}")
    else:
        base = resumed
    given = {field.name: getattr(options, field.name, None) for field in fields(Recipe) if field.name != "name"}
    changes = {name: value for name, value in given.items() if value is not None and name != "recipe"}
    if options.backbone == "tiny" != base.recipe.backbone:
        changes = {**{name: getattr(RECIPES["quick"], name) for name in _OF_THE_BACKBONE}, **changes}
    # A run may be continued from another working folder.
    if changes.get("weights") not in (None, "imagenet", "random"):
        changes["weights"] = str(resolved(changes["weights"]))
    switches = {field.name: getattr(options, field.name) for field in fields(Speed)}
    settings = Settings(
        recipe=replace(base.recipe, **(ROWS[options.row].changes if options.row else {}), **changes),
        data_root=base.data_root if options.data_root is None else resolved(options.data_root),
        split=base.split if options.split is None else options.split,
        ops=options.ops or base.ops,
        check_counts=options.check_counts and base.check_counts,
        speed=replace(base.speed, **{name: value for name, value in switches.items() if value is not None}),
        resize=options.resize or base.resize,
        sync_bn=options.sync_bn or base.sync_bn,
    )
    if settings.sync_bn and settings.recipe.bn_groups > 1:
        raise UserError(f"sync_bn: got True with bn_groups={settings.recipe.bn_groups}, wanted one or the other")
    if resumed is not None:
        other = differences(replace(resumed, ops=settings.ops, speed=settings.speed), settings, free=FREE)
        if other:
            raise UserError(f"resume: the run was trained with {other}")
    return settings


def differences(before: Settings, now: Settings, free: Collection[str] = ()) -> str:
    """Tell in what a run that was trained is another than one to train; nothing if only in where the data lies.

    Args:
        before, now: the settings of the two.
        free: fields of a recipe that may differ.
    """
    was, asked = (
        {
            **asdict(s.recipe),
            "split": s.split,
            "ops": s.ops,
            **asdict(s.speed),
            "resize": s.resize,
            "sync_bn": s.sync_bn,
        }
        for s in (before, now)
    )
    changed = [name for name in asked if asked[name] != was[name] and name not in free]
    return "; ".join(f"{name}={was[name]!r}, got {asked[name]!r}" for name in changed)


def choose_device(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" means here; of several GPUs each process has its own, made current.

    Raises:
        UserError: it is "cuda" and there is none, or one too few.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: got 'cuda', but PyTorch sees no CUDA device here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if distributed.world() == 1:
        return torch.device("cuda")
    here, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if here >= gpus:
        raise UserError(f"device: got process {here + 1} of this machine, which has {gpus} GPUs, wanted at most {gpus}")
    torch.cuda.set_device(here)
    return torch.device("cuda", here)


def environment(device: torch.device) -> dict[str, Any]:
    """What figures computed here depend on, beside their settings, as JSON values."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": distributed.world(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("rru-fast", "torch", "torchvision", "numpy")},
        "commit": commit_of(Path(__file__).parents[2]),
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:  # run from a checkout that was never installed
        return None


def commit_of(checkout: Path) -> str | None:
    """The commit of a checkout of this project, marked where its code has been changed since; `None` without git."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]  # a kill would leave the lock behind
        return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--", "rru_fast", "csrc", "training/*.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "-dirty" * bool(changed)
