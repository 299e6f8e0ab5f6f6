"""The host store in a named segment of shared memory, for all processes of a host."""
