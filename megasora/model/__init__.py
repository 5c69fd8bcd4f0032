"""The video diffusion transformer; knows kernels and configuration only."""
