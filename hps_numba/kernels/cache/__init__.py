"""Kernels of the embedding cache: lookup, insertion, pooling, updates."""
