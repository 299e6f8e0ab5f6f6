"""``hash_map``: tables in the memory of this process."""

from __future__ import annotations

from hps_numba.storage.tiers._host_tables import HostTablesTier

__all__ = ["PLUGIN", "HashMapTier"]


class HashMapTier(HostTablesTier):
    """One host store per table, in memory of this process."""


PLUGIN = HashMapTier
