"""Arrays of callers: keys and rows of any array library are taken in, and answers are returned in the same kind."""
