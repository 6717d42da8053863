"""Architectures of other projects, one a file."""
