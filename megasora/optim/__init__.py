"""Rates and averaged weights."""
