"""Training of rows in a server: optimizers, initializers, checkpoints."""
