"""CUDA devices, through the driver API: contexts, streams, events, and memory of device and host."""
