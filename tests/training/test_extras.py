from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.errors import UserError
from training.extras import need


def test_a_library_that_is_not_there_is_one_line_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert need("json", "search").dumps([]) == "[]"
    monkeypatch.setitem(sys.modules, "faiss", None)  # an import of it fails, as where it is not installed
    with pytest.raises(UserError, match=r"^faiss: not usable here \(.+\), wanted: pip install '\.\[search\]'$") as told:
        need("faiss", "search")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("training.train", "rich, tyro; wanted: pip install -e '.[train]'"),
        ("training.data.synthetic", "rich, tyro; wanted: pip install -e '.[train]'"),
        ("benchmarks.refine", "rich, tyro; wanted: pip install -e '.[bench]'"),
    ],
)
def test_a_command_where_the_extra_was_not_installed_says_so_in_one_line(
    module: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules |= dict.fromkeys(('tyro', 'rich'))\n")
    root, environment = Path(__file__).resolve().parents[2], {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", module, "--help"]
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (2, f"error: not installed: {told}\n")
