"""Build rru_fast/_C in place, for a checkout installed with `pip install -e .`: `python -m build_tools`."""

from build_tools import native, toolchain

native.build(toolchain.ROOT / "rru_fast", keep_last=True)
