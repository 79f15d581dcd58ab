"""Build rru_fast/_C.

`toolchain` finds the tools, `ninja_build` compiles and links with them, `native` builds the extension and writes its
record, `backend` is the build backend. None imports torch. setup.py builds for an install, `python -m build_tools` in
place. `extras` checks the requirements of the commands in training and benchmarks.
"""
