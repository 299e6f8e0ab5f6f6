"""Inference over a network: what every front end that serves requests shares, whatever its protocol."""
