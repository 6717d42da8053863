"""Networks of the codecs, and how they are fitted."""
