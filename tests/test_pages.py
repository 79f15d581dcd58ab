"""Sections of a page between markers."""

from __future__ import annotations

import pytest

from build_tools.pages import check_markers, replace_section


def test_a_section_is_replaced_between_its_markers_again_and_again() -> None:
    page = "before\n<!-- a -->\nold\n<!-- /a -->\nbetween\n<!-- b -->\n<!-- /b -->\nafter\n"
    for section in (r"| \1 |", "| 2 |\n| 3 |"):
        check_markers(page, "a", "the table")
        page = replace_section(page, "a", section)
        assert page == f"before\n<!-- a -->\n{section}\n<!-- /a -->\nbetween\n<!-- b -->\n<!-- /b -->\nafter\n"


@pytest.mark.parametrize("page", ["", "<!-- a -->", "<!-- /a -->\n<!-- a -->", "<!-- a --><!-- /a -->" * 2])
def test_a_page_without_one_pair_of_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match=r"^got no place for the table, wanted <!-- a --> \.\.\. <!-- /a --> once$"):
        check_markers(page, "a", "the table")
