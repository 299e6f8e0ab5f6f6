"""CUDA devices through the driver: contexts, streams, events, memory of device and host."""
