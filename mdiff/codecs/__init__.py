"""Codecs: pictures to ids and back, one file each."""
