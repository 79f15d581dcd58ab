"""Pictures of the synthetic dataset: people, cameras, occluders."""
