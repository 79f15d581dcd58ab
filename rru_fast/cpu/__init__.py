"""The operators in C++ for CPUs: csrc/cpu, called through the dispatcher. Only where `native.missing()` is None."""
