"""Build rru_fast/_C in place: `python -m build_tools`, for a checkout installed with `pip install -e .`."""

from build_tools import native

native.build(native.ROOT / "rru_fast")
