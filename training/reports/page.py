"""Generated parts of a Markdown page, each between two markers."""

from __future__ import annotations

from pathlib import Path

from build_tools.pages import check_markers, replace_section
from training.runtime.errors import UserError


def check_page(page: Path, name: str) -> str:
    """Read a page that has one place for a part, `<!-- name --> ... <!-- /name -->`.

    Raises:
        UserError: it cannot be read, or has no such place or several.
    """
    try:
        text = page.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"readme: {page} cannot be read ({error})") from error
    try:
        check_markers(text, name, "the table")
    except ValueError as error:
        raise UserError(f"readme: {page}: {error}") from error
    return text


def fill_page(page: Path, name: str, content: str) -> None:
    """Replace the part of a page with a name.

    Raises:
        UserError: as by `check_page`.
        OSError: the page cannot be written.
    """
    page.write_text(replace_section(check_page(page, name), name, content))
