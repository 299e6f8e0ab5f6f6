"""CPU kernels of the host store, of the simulator's numbering and of training."""
