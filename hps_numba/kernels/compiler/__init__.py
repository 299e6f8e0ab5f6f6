"""How kernels are specialized, compiled, kept on disk and launched."""
