"""Formats of traces, one a file, found by its name."""
