"""Trace formats, one a file, found by its name."""
