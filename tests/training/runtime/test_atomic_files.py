from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from training.runtime.atomic_files import folder_lock, new_folder, realpath, temp_path, write_atomic
from training.runtime.errors import UserError


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    temp_path(path).mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    temp_path(path).rmdir()
    temp_path(path).write_text("half of what a kill")
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_one_processes_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from training.runtime.atomic_files import folder_lock\n"
        "with folder_lock(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"output: another process is writing in {tmp_path}, wanted one at a time"):
        folder_lock(tmp_path).__enter__()
    process.kill()
    process.communicate()
    with folder_lock(tmp_path):
        pass


def test_links_in_a_circle_are_a_path_too(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert realpath(tmp_path / "a").parent == tmp_path.resolve()


def fill(path: Path, before_the_end: Callable[[], object]) -> None:
    with new_folder(path) as folder:
        (folder / "file").write_text("mine")
        before_the_end()


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    fill(path, lambda: pytest.fail("there too early") if path.exists() else None)
    assert (path / "file").read_text() == "mine"
    with pytest.raises(ZeroDivisionError):
        fill(tmp_path / "c", lambda: 1 / 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_was_made_meanwhile_loses_nothing_of_either(tmp_path: Path) -> None:
    def meanwhile() -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "file").write_text("theirs")

    with pytest.raises(UserError, match=r"^output: .*/a was made meanwhile; the result is in .*/a-\d+$") as raised:
        fill(tmp_path / "a", meanwhile)
    assert (tmp_path / "a" / "file").read_text() == "theirs"
    assert Path(str(raised.value).rpartition(" ")[2], "file").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2
