"""Everything that numba compiles: one operation per file; scalar functions are plain Python."""
