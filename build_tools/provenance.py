"""Commit and versions that a result was computed with."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def commit_of(checkout: Path, *paths: str, short: bool = False) -> str | None:
    """Return the commit of a checkout with "-dirty" appended if files have changed since, None without git.

    Args:
        checkout: folder of the repository.
        paths: git pathspecs of the files whose changes count; of all files if not given.
        short: abbreviate the commit.
    """

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]  # a killed process would leave the lock behind
        return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", *(["--short"] if short else []), "HEAD")
        changed = git("status", "--porcelain", "--", *paths)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "-dirty" * bool(changed)


def version_of(distribution: str) -> str | None:
    """Return the version of an installed distribution, None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
