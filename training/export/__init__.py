"""Exports of a trained network: files of features, and the network as a program."""
