"""Online updates: rows that change while the server runs. No source is built in yet; ``UpdateSource`` is what one has to be."""

from hps_numba.updates._source import Position, Update, UpdateSource

__all__ = ["Position", "Update", "UpdateSource"]
