"""Traces of requested keys: reading them from files, and recording them in a server."""
