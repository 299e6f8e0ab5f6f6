"""``parallel_hash_map``: the same as ``hash_map``: every host store is read in parallel. HugeCTR has both names."""

from hps_numba.storage.tiers.hash_map import HashMapTier

__all__ = ["PLUGIN"]

PLUGIN = HashMapTier
