"""Implementations of each operator that the benchmarks compare, and their parity check."""
