"""Libraries that only some commands need, and that an installation may therefore lack."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from training.errors import UserError


def need(library: str, extra: str) -> Any:
    """The module of a library.

    Args:
        library: its name.
        extra: the extra of this project that brings it.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(library)
    except ImportError as error:
        raise UserError(f"{library}: not usable here ({error}), wanted: pip install '.[{extra}]'") from error
