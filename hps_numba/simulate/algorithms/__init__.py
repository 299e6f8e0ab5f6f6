"""Fully associative replacement algorithms for the simulator: one a file, found by its name."""
