from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.runtime.command import need
from training.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def test_a_library_that_is_not_there_is_one_line_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert need("json", "search").dumps([]) == "[]"
    monkeypatch.setitem(sys.modules, "faiss", None)  # an import of it fails, as where it is not installed
    with pytest.raises(
        UserError, match=r"^faiss: not usable here \(.+\), wanted: pip install '\.\[search\]'$"
    ) as raised:
        need("faiss", "search")
    assert "\n" not in str(raised.value)


@pytest.fixture
def without(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which tyro and rich are not installed."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules |= dict.fromkeys(('tyro', 'rich'))\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


# They need torch, triton, numpy and pytest, which no extra brings together, or, the last, torch and the library alone.
WITHOUT_EXTRA = (
    "benchmarks.gpu.__main__",
    "benchmarks.gpu.sanitizer",
    "benchmarks.host_time",
    "benchmarks.implementations.floors",
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


COMMANDS = {
    path: (module_of(path).removesuffix(".__main__"), extra)
    for folder, extra in (("training", "train"), ("benchmarks", "bench"))
    for path in sorted((ROOT / folder).rglob("*.py"))
    if '\nif __name__ == "__main__":\n' in path.read_text("utf-8") and module_of(path) not in WITHOUT_EXTRA
}


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: COMMANDS[path][0])
def test_every_command_requires_its_extra_before_its_own_imports(path: Path) -> None:
    first = ast.parse(path.read_text("utf-8")).body[2]  # after the docstring and __future__
    wanted = "if __name__ == '__main__':\n    from build_tools.extras import require\n    require('{}')"
    assert ast.unparse(first) == wanted.format(COMMANDS[path][1])


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("training.train", "train"),
        ("benchmarks.refine", "bench"),
        *(pytest.param(*command, marks=pytest.mark.exhaustive) for command in COMMANDS.values()),
    ],
)
def test_a_command_without_its_extra_exits_with_one_line(module: str, extra: str, without: dict[str, str]) -> None:
    command = [sys.executable, "-m", module, "--help"]
    ended = subprocess.run(command, cwd=ROOT, env=without, capture_output=True, text=True, check=False)
    printed = f"error: not installed: rich, tyro; wanted: pip install -e '.[{extra}]'\n"
    assert (ended.returncode, ended.stderr) == (2, printed)


def test_the_gpus_commands_need_no_extra(without: dict[str, str]) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-c", f"import {', '.join(WITHOUT_EXTRA)}"]
    ended = subprocess.run(command, cwd=ROOT, env=without, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("module", ["training.train", "benchmarks.train_step"])
def test_a_command_on_a_system_that_cannot_run_it_exits_with_one_line(module: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['fcntl'] = None; sys.platform = 'win32'\n")
    ended = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: system: got win32, wanted Linux or macOS")
    assert ended.stderr.count("\n") == 1


def test_importing_them_never_ends_a_process(without: dict[str, str]) -> None:
    code = """if True:
        import importlib, sys
        sys.argv = ["-m", "train"]
        for name in sys.stdin.read().split():
            try:
                importlib.import_module(name)
            except ImportError:
                print(name)
    """
    names = "training benchmarks training.show.__main__ training.export.__main__"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, env=without, input=names, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.split()) == (0, names.split()[2:]), ended.stderr
