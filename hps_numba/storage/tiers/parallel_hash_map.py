"""``parallel_hash_map``: the same as ``hash_map``, as in the original (spec 1.7); every store here is read in parallel."""

from hps_numba.storage.tiers.hash_map import HashMapTier

__all__ = ["PLUGIN"]

PLUGIN = HashMapTier
