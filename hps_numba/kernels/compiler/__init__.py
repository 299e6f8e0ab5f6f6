"""Kernels specialized, compiled, kept on disk and launched."""
