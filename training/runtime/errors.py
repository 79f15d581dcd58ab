"""The one exception that means "what you gave us is wrong", as opposed to a bug."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input; the message is one line that names what was wrong, what was got and what was wanted."""


class NoSuchSplit(UserError):
    """A dataset was asked for a split beyond its last."""
