"""Build entry point: add the native kernels, built by build_tools, to the package that pyproject.toml describes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.build import build
from setuptools.dist import Distribution

sys.path.insert(0, str(Path(__file__).resolve().parent))  # pip runs this file without its folder on the path

from build_tools import native, toolchain
from build_tools.ninja_build import BINARY

FILES = (BINARY, "_build.json")  # of the package, written by a build

for variable in ("RRU_FAST_NATIVE", "RRU_FAST_CUDA", "RRU_FAST_SANITIZE"):
    toolchain.read_switch(variable)  # raises at once for a wrong value, whichever command pip runs
toolchain.capabilities_to_build(in_place=False)
toolchain.max_jobs()


class BuildNative(Command):
    """Build rru_fast/_C and its record.

    Not build_ext, which cannot compile a source several times with different flags, and does not run if there is no
    extension to build, so that it could not record the reason.
    """

    user_options: ClassVar[list[tuple[str, str | None, str]]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        native.build(toolchain.ROOT / "rru_fast" if self.editable_mode else self._package())

    def _package(self) -> Path:
        assert self.build_lib is not None
        return Path(self.build_lib, "rru_fast")

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in has them

    def get_outputs(self) -> list[str]:
        return [str(path) for name in FILES if (path := self._package() / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.editable_mode:
            return {}
        source = toolchain.ROOT / "rru_fast"
        return {str(self._package() / name): str(source / name) for name in FILES if (source / name).exists()}


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]


class NativeDistribution(Distribution):
    """A distribution whose wheel, without native kernels, is for any Python and platform."""

    def has_ext_modules(self) -> bool:
        return native.skip_reason() is None


setup(distclass=NativeDistribution, cmdclass={"build": Build, "build_native": BuildNative})
