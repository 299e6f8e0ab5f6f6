"""Formats of sparse models, one a file; ``_format.py`` says what a format is."""
