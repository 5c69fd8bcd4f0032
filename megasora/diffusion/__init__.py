"""Objective, timesteps, noise and samplers: functions of tensors."""
