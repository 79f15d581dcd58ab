"""Options of a run: a base, from a recipe, a file or an earlier run, and what is given over it, flat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes

from training.config.presets import RECIPES, row_of, with_tiny_backbone
from training.config.recipe import Recipe
from training.config.settings import Settings
from training.config.table1 import ROWS
from training.data import Dataset
from training.engine import checkpoint
from training.engine.run_record import differences, options_of, settings_from_record
from training.runtime import distributed
from training.runtime.device import Device
from training.runtime.errors import UserError
from training.runtime.fields import Config, flatten, unchecked, update

K = TypeVar("K")
_FLAT = (OmitArgPrefixes,)


@dataclass(frozen=True)
class Machine(Config):
    """Options of the machine, on which no figure depends."""

    device: Device = "auto"
    """The device to compute on."""
    workers: int = 0
    """Processes that read frames ahead."""
    pictures: bool = True
    """Show in TensorBoard, after every evaluation, who is found for some queries and the maps around the gate."""

    def validate(self) -> None:
        if self.workers < 0:
            raise UserError(f"workers: got {self.workers}, wanted 0 or more")


@dataclass(frozen=True)
class Base:
    """The values that all other options start from, and show as their defaults."""

    recipe: Literal[tuple(RECIPES)] | None = None  # type: ignore[valid-type]
    """The recipe."""
    row: Literal[tuple(ROWS)] | None = None  # type: ignore[valid-type]
    """The row of the paper's Table 1 to train."""
    config: Path | None = None
    """A JSON file of options by their names, or the config.json of a run; other options are over it."""
    resume: Path | None = None
    """Folder of a run to continue from its last checkpoint."""


@dataclass(frozen=True)
class Options:
    """Train the paper's network: a recipe, and options over it."""

    base: Base = field(default_factory=Base)
    settings: Settings = field(default_factory=Settings)
    machine: Machine = field(default_factory=Machine)
    output: Path | None = None
    """The run's folder; a new one under runs/, or the resumed run's, if not given."""


def parse_options(prog: str, args: Sequence[str] | None = None) -> Options:
    """Read the command line twice: for the base, then for all options, whose defaults are the base's.

    Args:
        prog: the command, for the usage.
        args: the words; those of this process if not given.

    Raises:
        UserError: the base cannot be read, or options do not go together.
        SystemExit: an option is unknown or malformed, or --help was asked for.
    """
    first = parse_known(_First, prog, args)
    settings = base_settings(first.base, first.backbone)
    base = replace(first.base, recipe=settings.recipe.name, row=row_of(settings.recipe))
    options = Options(base, settings)
    return finish(parse_over(options, prog, args))


def make_options(**given: Any) -> Options:
    """Make options of those given, by their flat names, as the command line does.

    Raises:
        UserError: there is no such option, or options do not go together.
    """
    base = update(Base(), **{name: given.pop(name) for name in flatten(Base()) if name in given})
    options = Options(base, base_settings(base, given.get("backbone")))
    return finish(update(options, **given))


def base_settings(base: Base, backbone: str | None, default: str = "quick", dataset: Dataset | None = None) -> Settings:
    """Return the settings that options start from: of a resumed run or a recipe, with a file and a row over it.

    Args:
        base: the options that say so.
        backbone: the one asked for, if any: tiny brings quick's weights, widths and learning rates with it.
        default: the recipe where neither a file nor a run says.
        dataset: in place of the recipe's.

    Raises:
        UserError: a file cannot be read, or the recipe is not the one the resumed run was trained with.
    """
    given = _read_config(base.config) if base.config else {}
    row = given.pop("row", None)
    settings = _first_settings(base, given.pop("recipe", None), default)
    if dataset and not base.resume:
        settings = update(settings, dataset=dataset)
    recipe = apply_backbone(settings.recipe, given.get("backbone"))
    if row:
        recipe = ROWS[row].apply(recipe)
    try:
        settings = update(replace(settings, recipe=recipe), **given)  # all at once: one by one may be impossible
    except UserError as error:
        raise UserError(f"config: {base.config}: {error}") from error
    recipe = apply_backbone(settings.recipe, backbone)
    return replace(settings, recipe=ROWS[base.row].apply(recipe) if base.row else recipe)


def _first_settings(base: Base, named: str | None, default: str) -> Settings:
    """Return the settings of the run to resume or of the recipe: the one asked for, that a file names, or `default`."""
    if base.recipe and named and named != base.recipe:
        raise UserError(f"recipe: got {base.recipe!r}, but {base.config} starts from {named!r}")
    name = base.recipe or named
    if not base.resume:
        return Settings(RECIPES[name or default])
    settings = read_settings(base.resume)
    if name not in (None, settings.recipe.name):
        raise UserError(f"resume: the run was trained with recipe {settings.recipe.name!r}, got {name!r}")
    return settings


def apply_backbone(recipe: Recipe, backbone: str | None) -> Recipe:
    """Return the recipe, in which the tiny backbone is not changed without what goes with it."""
    return with_tiny_backbone(recipe) if backbone == "tiny" != recipe.model.backbone else recipe


def finish(options: Options) -> Options:
    """Return the options with absolute paths.

    Raises:
        UserError: the settings are not those the resumed run was trained with.
    """
    options = replace(options, settings=options.settings.absolute())
    if options.base.resume:
        trained = read_settings(options.base.resume)
        if other := differences(trained, options.settings, resuming=True):
            raise UserError(f"resume: the run was trained with {other}")
    return options


def read_settings(resume: Path) -> Settings:
    """Return the settings of a run that has a checkpoint, or of the checkpoint.

    Raises:
        UserError: it has none, or one of another version.
    """
    folder, record = checkpoint.load_config(resume)
    return settings_from_record(record, folder / checkpoint.CONFIG)


def parse_over(default: K, prog: str, args: Sequence[str] | None) -> K:
    """Read all options, flat, over a dataclass that --help shows as their defaults.

    Raises:
        UserError: options do not go together.
        SystemExit: an option is unknown or malformed, or --help was asked for.
    """
    main = distributed.is_main()
    with unchecked():  # tyro would tell of an impossible value in its own words
        given = tyro.cli(type(default), prog=prog, args=args, default=default, config=_FLAT, console_outputs=main)
    return update(given)


def parse_known(kind: type[K], prog: str, args: Sequence[str] | None) -> K:
    """Read the options of a dataclass, and leave all others, --help among them, for later."""
    known, _ = tyro.cli(
        kind,
        prog=prog,
        args=args,
        config=_FLAT,
        return_unknown_args=True,
        add_help=False,
        console_outputs=distributed.is_main(),
    )
    return known


def _read_config(path: Path) -> dict[str, Any]:
    """Read a file of options by name; "recipe" and "row", where it has them, are such."""
    try:
        given = options_of(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"config: {path} cannot be read ({error})") from error
    known = ["recipe", "row", *(name for name in flatten(Settings()) if name != "name")]
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"config: {path}: got {unknown[0]!r}, wanted some of {', '.join(known)}")
    for name, choices in (("recipe", RECIPES), ("row", ROWS)):
        if name in given and given[name] not in tuple(choices):
            raise UserError(f"config: got {name} {given[name]!r} in {path}, wanted one of {', '.join(choices)}")
    return given


@dataclass(frozen=True)
class _First:
    """The options that others have their defaults from."""

    base: Base = field(default_factory=Base)
    backbone: str | None = None
