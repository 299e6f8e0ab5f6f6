"""Cache policies, one a file. They come with the GPU cache."""
