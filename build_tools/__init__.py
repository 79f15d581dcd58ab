"""Build rru_fast/_C.

`toolchain` finds what there is to build with, `native` compiles, links and records, `backend` is the build backend.
None imports torch. setup.py puts the result into an install, `python -m build_tools` builds in place. `extras` checks
the requirements of the commands in training and benchmarks.
"""
