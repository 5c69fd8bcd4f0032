"""The video diffusion transformer. Imports kernels and configuration only."""
