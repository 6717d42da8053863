"""What a terminal or a file shows of a run."""
