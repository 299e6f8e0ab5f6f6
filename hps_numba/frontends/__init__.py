"""Front ends for frameworks, one folder each: layers, operators and gradients; files here are what they share."""
