"""Checks of the nodes of a job before training; `python -m megasora.preflight --help`."""
