"""Prompts to videos."""
