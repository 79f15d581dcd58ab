"""Readers of datasets, one file each, named as the dataset."""
