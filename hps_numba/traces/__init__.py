"""Traces of requested keys: read, recorded."""
