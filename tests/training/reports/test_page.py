from __future__ import annotations

from pathlib import Path

import pytest

from training.reports.page import check_page, fill_page
from training.runtime.errors import UserError

BEGIN, END = "<!-- ablation -->", "<!-- /ablation -->"


def test_a_page_gets_the_table_between_its_markers_again_and_again(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n\n{BEGIN}\nan old one\n{END}\n\nafter\n")
    for table in ("| \\1 |", "| b |"):
        fill_page(page, "ablation", table)
        assert page.read_text() == f"before\n\n{BEGIN}\n{table}\n{END}\n\nafter\n"


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_page_without_one_place_for_the_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(UserError, match=r"README\.md: got no place for the table, wanted <!-- ablation --> \.\.\. "):
        check_page(tmp_path / "README.md", "ablation")


def test_a_page_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"readme: .*absent\.md cannot be read"):
        check_page(tmp_path / "absent.md", "ablation")
