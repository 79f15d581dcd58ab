"""Search in files of features."""
