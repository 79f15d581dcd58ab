"""Time of a training step by its stages, each switch alone and together: `python -m benchmarks.train_step`."""
