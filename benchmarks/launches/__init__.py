"""Launches of Triton kernels without a GPU: recorded for the compiler, or bound and stopped before the driver."""
