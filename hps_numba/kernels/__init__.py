"""One file a verb: what is done to rows and indexes, as compiled kernels; scalar pieces are plain Python."""
