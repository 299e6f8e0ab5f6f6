"""File formats of traces, one per file, found by file name."""
