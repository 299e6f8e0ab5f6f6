"""Traces of requested keys: read, and recorded by a server."""
