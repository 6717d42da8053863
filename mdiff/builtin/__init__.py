"""Small checkpoints that ship with the package."""
