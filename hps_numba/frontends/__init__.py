"""Faces for frameworks, one a folder. They come after the GPU cache."""
