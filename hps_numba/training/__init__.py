"""Training of rows: optimizers, initializers, checkpoints."""
