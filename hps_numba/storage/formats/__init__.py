"""Formats of sparse models, one per file; ``_format.py`` is their interface."""
