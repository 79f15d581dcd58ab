"""Models of third-party code, swapped in place, and weights of the authors' code."""
