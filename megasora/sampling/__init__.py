"""Sampling videos from prompts."""
