"""Bytes that host and device agree on."""
