from __future__ import annotations

from pathlib import Path

import pytest

from training.files import aside, write_whole


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")
    aside(path).mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    aside(path).rmdir()
    aside(path).write_text("half of what a kill")
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
