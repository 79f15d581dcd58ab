"""The command that reinstalls rru_fast with its native kernels, for the installer in use: pip or uv."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname


def reinstall_command(package: Path, variables: str = "") -> str:
    """Return "run: COMMAND", where COMMAND reinstalls this package with native kernels.

    Installed from a wheel file, which holds no other kernels: "in rru_fast's source folder, run: COMMAND".

    Args:
        package: folder of the package.
        variables: environment variables that the build needs, as "NAME=value".
    """
    distribution = next((d for d in distributions(name="rru_fast") if _is_installation_of(package, d)), None)
    direct_url = _read_direct_url(distribution) if distribution else {}
    editable = bool(direct_url.get("dir_info", {}).get("editable"))
    requirement = _requirement(direct_url) if distribution else None
    if distribution is None and (package.parent / "setup.py").exists():  # a source folder, not installed
        requirement, editable = shlex.quote(str(package.parent)), True
    command = f"{variables} {_installer_command(distribution, editable)}".lstrip()
    if requirement is None:
        return f"in rru_fast's source folder, run: {command} ."
    return f"run: {command} {requirement}"


def _requirement(direct_url: dict[str, Any]) -> str | None:
    """Return the requirement to reinstall from, or None if that is a wheel file."""
    url = direct_url.get("url", "")
    if url.endswith(".whl"):
        return None
    if "vcs_info" in direct_url:
        return f"{direct_url['vcs_info']['vcs']}+{url}@{direct_url['vcs_info']['commit_id']}"
    if url.startswith("file:"):
        return shlex.quote(str(_file_url_to_path(url)))
    return url or "--no-binary rru_fast rru_fast"


def _installer_command(distribution: Distribution | None, editable: bool) -> str:
    """Return the command of the installer of `distribution`, else of torch, else of pip.

    It bypasses the installer's cache, which may hold a wheel that was built without kernels.
    """
    installed = distribution or next(iter(distributions(name="torch")), None)
    if installed is not None and _read_installer(installed) == "uv":
        return "uv pip install --no-build-isolation --no-deps --reinstall --no-cache" + " -e" * editable
    return "pip install --no-deps " + ("-e" if editable else "--force-reinstall --no-cache-dir")


def _read_installer(distribution: Distribution) -> str:
    return (distribution.read_text("INSTALLER") or "").strip()


def _read_direct_url(distribution: Distribution) -> dict[str, Any]:
    try:
        return dict(json.loads(distribution.read_text("direct_url.json") or "{}"))
    except ValueError:  # damaged: treated as installed by name
        return {}


def _file_url_to_path(url: str) -> Path:
    return Path(url2pathname(urlsplit(url).path))


def _is_installation_of(package: Path, distribution: Distribution) -> bool:
    """Return True if an installer put `package` there; the .egg-info of a source folder is not an installation."""
    direct_url = _read_direct_url(distribution)
    editable = direct_url.get("dir_info", {}).get("editable")
    parent = _file_url_to_path(direct_url["url"]) if editable else Path(str(distribution.locate_file("")))
    return bool(_read_installer(distribution)) and (parent / package.name).resolve() == package.resolve()
