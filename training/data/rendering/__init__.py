"""Renderer of the synthetic dataset: people, cameras, occluders."""
