"""Sections of a Markdown page that a command writes, between the markers `<!-- name -->` and `<!-- /name -->`."""

from __future__ import annotations

import re


def check_markers(text: str, name: str, content: str) -> None:
    """Raise ValueError unless the page has the markers of `name` once, in order.

    Args:
        text: the page.
        name: of the section.
        content: what the section is for, as the message names it.
    """
    begin, end = _markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"got no place for {content}, wanted {begin} ... {end} once")


def replace_section(text: str, name: str, section: str) -> str:
    """Return the page with the text between the markers of `name` replaced by `section`."""
    begin, end = _markers(name)
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{section}\n{end}", text, flags=re.DOTALL)


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- /{name} -->"
