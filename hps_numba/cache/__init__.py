"""The embedding cache of one table on one device, or on the CPU."""
