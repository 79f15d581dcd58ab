"""The command that installs rru_fast again with its kernels, for the installer that is in use."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname


def remedy(package: Path) -> str:
    """Return what to run for the installation whose package folder this is."""
    found = next((d for d in distributions(name="rru_fast") if _installed(d, package)), None)
    origin = _origin(found) if found else {}
    editable = bool(origin.get("dir_info", {}).get("editable"))
    target = _target(origin) if found else None
    if found is None and (package.parent / "setup.py").exists():  # a source folder, not installed
        target, editable = shlex.quote(str(package.parent)), True
    if target is None:
        return f"in rru_fast's source folder, run: {_command(found, editable)} ."
    return f"run: {_command(found, editable)} {target}"


def _target(origin: dict[str, Any]) -> str | None:
    """The requirement to install again; None for a wheel's file, which holds no other kernels."""
    url = origin.get("url", "")
    if url.endswith(".whl"):
        return None
    if "vcs_info" in origin:
        return f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    if url.startswith("file:"):
        return shlex.quote(str(_path(url)))
    return url or "--no-binary rru_fast rru_fast"


def _command(found: Distribution | None, editable: bool) -> str:
    """The installer's command; without the cache, which may hold a wheel that was built without kernels."""
    by = found or next(iter(distributions(name="torch")), None)
    if by is not None and _installer(by) == "uv":
        return "uv pip install --no-build-isolation --no-deps --reinstall --no-cache" + " -e" * editable
    return "pip install --no-deps " + ("-e" if editable else "--force-reinstall --no-cache-dir")


def _installer(distribution: Distribution) -> str:
    return (distribution.read_text("INSTALLER") or "").strip()


def _origin(distribution: Distribution) -> dict[str, Any]:
    try:
        return dict(json.loads(distribution.read_text("direct_url.json") or "{}"))
    except ValueError:  # damaged: as if installed by name
        return {}


def _path(url: str) -> Path:
    return Path(url2pathname(urlsplit(url).path))


def _installed(distribution: Distribution, package: Path) -> bool:
    """Return True if an installer put this package there; the .egg-info of a source folder is not an installation."""
    origin = _origin(distribution)
    editable = origin.get("dir_info", {}).get("editable")
    home = _path(origin["url"]) if editable else Path(str(distribution.locate_file("")))
    return bool(_installer(distribution)) and (home / package.name).resolve() == package.resolve()
