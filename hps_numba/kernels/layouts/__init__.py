"""Memory layouts that the CPU and the GPU share."""
