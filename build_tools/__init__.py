"""Build rru_fast/_C.

`toolchain` finds the tools, `ninja_build` compiles and links with them, `native` builds the extension and writes its
record, `backend` is the build backend. None imports torch. setup.py builds for an install, `python -m build_tools` in
place.

The commands in training and benchmarks share the rest: `extras` checks their requirements, `provenance` reads the
commit and the versions of a result, `pages` replaces sections of a Markdown page, `palette` has the colors of drawings.
"""
