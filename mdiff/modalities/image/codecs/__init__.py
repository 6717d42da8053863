"""Images to grids of ids and back, one codec a file."""
