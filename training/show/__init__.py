"""Pictures of a trained network, one per file; `python -m training.show PICTURE` draws them."""
