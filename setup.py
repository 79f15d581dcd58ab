"""Build entry point: adds the native kernels, which build_tools makes, to what stands in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.build import build
from setuptools.dist import Distribution

sys.path.insert(0, str(Path(__file__).resolve().parent))  # pip runs this file without its folder on the path

from build_tools import native, toolchain

for variable in ("RRU_FAST_NATIVE", "RRU_FAST_CUDA", "RRU_FAST_SANITIZE"):
    toolchain.asked(variable)  # a wrong value is an error at once, whatever pip goes on to run
toolchain.capabilities(in_place=False)
toolchain.jobs()


class BuildNative(Command):
    """Build rru_fast/_C and its record.

    A command of its own, not build_ext: that one cannot compile a source several times with different flags, and does
    not run, and so could not record why, where there is no extension to build.
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
        return [str(path) for name in (native.BINARY, "_build.json") if (path := self._package() / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.editable_mode:
            return {}
        here = toolchain.ROOT / "rru_fast"
        return {str(self._package() / n): str(here / n) for n in (native.BINARY, "_build.json") if (here / n).exists()}


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]


class NativeDistribution(Distribution):
    """Without native kernels, a wheel for any Python and platform."""

    def has_ext_modules(self) -> bool:
        return native.skipped() is None


setup(distclass=NativeDistribution, cmdclass={"build": Build, "build_native": BuildNative})
