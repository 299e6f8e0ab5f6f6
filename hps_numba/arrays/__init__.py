"""Arrays of any library at the edge: opened once, answered in the same kind."""
