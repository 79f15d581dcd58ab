"""The GPU benchmark: parity, times and memory of every operator, `python3 -m benchmarks.gpu`."""
