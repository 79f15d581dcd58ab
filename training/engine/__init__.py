"""A training run: its loop, its checkpoints, its log, and the trained network again."""
