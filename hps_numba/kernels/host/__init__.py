"""Kernels of the host store and of training, for the CPU."""
