"""Build backend: that of setuptools, imported only if it is new enough to read pyproject.toml.

Without build isolation nothing else checks its version, and an old one fails with an error about project.license.
"""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

WANTED = re.findall(r'"setuptools>=(\d+)"', (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))[0]
try:
    got = version("setuptools")
except PackageNotFoundError:
    got = "none"
if got == "none" or int(got.split(".")[0]) < int(WANTED):
    raise SystemExit(f"setuptools: got {got}, wanted {WANTED} or newer: install 'setuptools>={WANTED}' and ninja first")

from setuptools.build_meta import *  # noqa: E402, F403 - the hooks of PEP 517
