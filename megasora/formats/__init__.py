"""Weights and training states of other programs, in and out; a file or folder for each format."""
