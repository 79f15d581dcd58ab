"""Options as dataclasses: types checked when one is made, nested ones read and changed by the names of their fields."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from tyro.conf import FlagConversionOff

from training.runtime.errors import UserError

Switch: TypeAlias = FlagConversionOff[bool]
"""An option that takes True or False on the command line."""

C = TypeVar("C")
MOST = 10**9  # upper bound of every count
_checked = ContextVar("checked", default=True)
_NAMES = {bool: "True or False", int: "an integer", float: "a number", str: "a text", Path: "a path", NoneType: "None"}


class Config:
    """Base of frozen dataclasses of options: making one raises a UserError where a value is not possible."""

    def __post_init__(self) -> None:
        if _checked.get():
            self.check_types()
            self.validate()

    def check_types(self) -> None:
        """Raise a UserError unless each field has a value of its type."""
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _is_a(value, kind):
                raise UserError(f"{name}: got {value!r}, wanted {_named(kind)}")

    def validate(self) -> None:
        """Raise a UserError where a value is out of range, or does not go with another."""


@contextmanager
def unchecked() -> Iterator[None]:
    """Make dataclasses of options without checks inside the block; `update` of one that was made there checks it."""
    token = _checked.set(False)
    try:
        yield
    finally:
        _checked.reset(token)


def check_count(name: str, value: int | None, least: int = 1) -> None:
    """Raise a UserError unless a count is None or from `least` to MOST."""
    if value is not None and value < least:
        raise UserError(f"{name}: got {value}, wanted at least {least}")
    if value is not None and value > MOST:
        raise UserError(f"{name}: got {value}, wanted at most {MOST}")


def flatten(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, those of nested ones in their places, by name."""
    return dict(_leaves(config))


def differing(before: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two dataclasses of one type differ, by name, each as (before, now)."""
    was = flatten(before)
    return {name: (was[name], value) for name, value in flatten(now).items() if value != was[name]}


def update(config: C, /, **changes: Any) -> C:
    """Return a copy with fields replaced, of nested dataclasses too, all at once.

    Args:
        config: a frozen dataclass; no two fields of it and of those nested in it have the same name.
        changes: by name; a path may be given as text.

    Raises:
        UserError: there is no such field, or a value is not possible.
    """
    rest = dict(changes)
    changed: C = _update(config, rest)
    if rest:
        raise UserError(f"options: got {next(iter(rest))!r}, wanted one of {', '.join(flatten(config))}")
    return changed


def _leaves(config: Any) -> Iterator[tuple[str, Any]]:
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _leaves(value)
        else:
            yield field.name, value


def _update(config: Any, rest: dict[str, Any]) -> Any:
    """Take the changes of this dataclass and those nested in it out of `rest`."""
    kinds, own = get_type_hints(type(config)), {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            own[field.name] = _update(value, rest)
        elif field.name in rest:
            own[field.name] = _from_json(rest.pop(field.name), kinds[field.name])
    return replace(config, **own)


def _from_json(value: Any, kind: Any) -> Any:
    """Return a value as its field has it, where JSON has text for a path and a list for a tuple."""
    if isinstance(value, str) and Path in get_args(kind):
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def _is_a(value: object, kind: Any) -> bool:
    """Return True if a value is of a type; an integer is a number too, and a truth value is neither."""
    if get_origin(kind) is Literal:
        return value in get_args(kind) and not isinstance(value, bool)
    if get_origin(kind) in (Union, UnionType):
        return any(_is_a(value, part) for part in get_args(kind))
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_is_a, value, parts))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _named(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_named, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"({', '.join(map(_named, get_args(kind)))})"
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))
