"""Measurements of the operators against eager PyTorch, its compiler and their peers."""
