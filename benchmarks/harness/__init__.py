"""Parity, timing, memory and the environment of a run: all that every benchmark is measured with."""
