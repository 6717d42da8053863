"""Architectures: each file holds one, and each is a Denoiser."""
