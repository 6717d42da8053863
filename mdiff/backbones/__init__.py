"""Networks that predict tokens, one a file."""
