"""Formats of sparse models, one per file; ``_format.py`` says what a format is."""
