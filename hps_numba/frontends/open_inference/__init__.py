"""Open Inference Protocol (KServe, version 2): tables and whole models to any client of it, by HTTP and gRPC."""
