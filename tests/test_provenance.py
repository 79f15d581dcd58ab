"""Commit and versions of a result."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.harness import results
from build_tools.provenance import commit_of, version_of


@pytest.fixture
def checkout(tmp_path: Path) -> tuple[Path, str]:
    """A repository with two committed files, and its commit."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    for path in ("code.py", "benchmarks/results/run.json"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("committed")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    return tmp_path, git("rev-parse", "HEAD")


def test_a_commit_is_whole_or_short_and_dirty_after_any_change(checkout: tuple[Path, str]) -> None:
    folder, commit = checkout
    assert commit_of(folder) == commit
    short = commit_of(folder, short=True)
    assert short is not None and commit.startswith(short) and 7 <= len(short) < 40
    (folder / "new").touch()
    assert commit_of(folder) == f"{commit}-dirty"
    assert commit_of(folder, short=True) == f"{short}-dirty"


def test_results_of_benchmarks_are_no_change_of_what_they_measure(
    checkout: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, commit = checkout
    monkeypatch.setattr(results, "ROOT", folder)

    def measured() -> str:
        return str(results.environment(torch.device("cpu"))["commit"])

    (folder / "benchmarks" / "results" / "run.json").write_text("another")
    assert commit.startswith(measured())
    (folder / "code.py").write_text("another")
    assert measured().endswith("-dirty")


def test_without_a_repository_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit_of(tmp_path) is None
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert results.environment(torch.device("cpu"))["commit"] == "unknown"


def test_a_version_is_that_of_an_installed_distribution() -> None:
    assert torch.__version__.startswith(str(version_of("torch")))
    assert version_of("no-such-distribution") is None
