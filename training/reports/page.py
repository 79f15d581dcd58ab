"""Generated parts of a Markdown page, each between two markers."""

from __future__ import annotations

import re
from pathlib import Path

from training.runtime.errors import UserError


def check_page(page: Path, name: str) -> str:
    """Read a page that has one place for a part, `<!-- name --> ... <!-- /name -->`.

    Raises:
        UserError: it cannot be read, or has no such place or several.
    """
    begin, end = markers(name)
    try:
        text = page.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"readme: {page} cannot be read ({error})") from error
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"readme: {page} has no place for the table, wanted {begin} ... {end} once")
    return text


def fill_page(page: Path, name: str, content: str) -> None:
    """Replace the part of a page with a name.

    Raises:
        UserError: as by `check_page`.
        OSError: the page cannot be written.
    """
    begin, end = markers(name)
    filled = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{content}\n{end}", check_page(page, name), flags=re.DOTALL)
    page.write_text(filled)


def markers(name: str) -> tuple[str, str]:
    """Return the comments before and after the part with a name."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"
