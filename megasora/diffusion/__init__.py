"""Objectives, timesteps, noise and samplers; pure tensors."""
