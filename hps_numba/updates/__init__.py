"""Online updates: rows that change while the server runs. ``UpdateSource`` is the interface; no source is built in yet."""

from hps_numba.updates._source import UpdateSource
from hps_numba.updates._update import NO_TIME, Lost, Message, Position, Update

__all__ = ["NO_TIME", "Lost", "Message", "Position", "Update", "UpdateSource"]
