"""Modalities: media to integer tokens and back."""
