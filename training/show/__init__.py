"""Pictures of what a trained network does: one file a picture, `python -m training.show PICTURE` to draw it."""
