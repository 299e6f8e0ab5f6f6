"""Shared by tests of tiers: the built-in ones in memory, and what the contract suite is written with."""

from hps_numba.testing._rows import ints
from hps_numba.testing.tiers import DIM, TAG, content_of, fetch

__all__ = ["DIM", "IN_MEMORY", "PACKAGE", "TAG", "content_of", "fetch", "ints"]

PACKAGE = "hps_numba.storage.tiers"
IN_MEMORY = ["hash_map", "parallel_hash_map"]
