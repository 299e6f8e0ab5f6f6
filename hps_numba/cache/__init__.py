"""The embedding cache of one table on one GPU, or on the CPU: state, lookups, insertion, refresh, policy changes."""
