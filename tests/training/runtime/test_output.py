from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.file_size import file_size_limit
from training.runtime.atomic_files import check_output, write_output
from training.runtime.errors import UserError


def test_a_file_is_written_in_a_folder_that_was_made_for_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    check_output(path, ".json")
    assert list(path.parent.iterdir()) == []
    write_output(path, b"content")
    assert path.read_bytes() == b"content"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file.txt", r"got .*file\.txt, wanted a name that ends in \.json"),
        ("there.json", r"there\.json is there already, wanted a new file"),
        ("folder.json", r"folder\.json is there already, wanted a new file"),
        ("link.json", r"link\.json is there already, wanted a new file"),
        ("there.json/file.json", "Not a directory|File exists"),
        ("x" * 300 + ".json", "File name too long"),
        ("/proc/none/file.json", "No such file"),
    ],
)
def test_a_file_that_cannot_be_written_is_reported_before_the_work(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "there.json").write_text("mine")
    (tmp_path / "link.json").symlink_to("nowhere")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=f"^output: .*({message})") as caught:
        check_output(tmp_path / name, ".json")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "there.json").read_text() == "mine"


def test_a_file_that_may_be_replaced_is_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "picture.PNG"
    path.write_text("before")
    check_output(path, ".png", replace=True)
    with file_size_limit(100), pytest.raises(UserError, match="File too large"):
        write_output(path, "x" * 1000)
    assert path.read_text() == "before"
    write_output(path, "after")
    assert path.read_text() == "after"
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"folder\.png is there already, wanted a file$"):
        check_output(tmp_path / "folder.png", ".png", replace=True)


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    with file_size_limit(100), pytest.raises(UserError, match=r"^output: .*/file\.json: File too large$"):
        write_output(tmp_path / "file.json", "x" * 1000)
    assert list(tmp_path.iterdir()) == []
