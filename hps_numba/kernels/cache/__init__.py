"""Kernels of the embedding cache."""
