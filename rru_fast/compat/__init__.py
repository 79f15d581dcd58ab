"""Swap modules of existing models for fast ones, and convert weights of the authors' code."""
