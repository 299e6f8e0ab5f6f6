"""Online updates: rows that change while the server runs. ``UpdateSource`` is the interface; no source is built in yet."""

from hps_numba.updates._source import Position, Update, UpdateSource

__all__ = ["Position", "Update", "UpdateSource"]
