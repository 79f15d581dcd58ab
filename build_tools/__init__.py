"""How rru_fast/_C is built: what this machine offers (`toolchain`), and compiling, linking and recording it (`native`).

Neither imports setuptools or torch: setup.py wires them into an install, `python -m build_tools` builds in place.
Beside them, what else a command of this folder needs installed (`extras`).
"""
