"""Fully associative replacement algorithms for the simulator, one per file, found by file name."""
