"""Saving, finding and loading checkpoints; importing weights of other models."""
