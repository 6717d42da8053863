"""Media to tokens and back."""
