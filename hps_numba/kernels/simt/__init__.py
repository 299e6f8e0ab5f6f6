"""Memory accesses and warp operations of each target: reference, CPU, CUDA."""
