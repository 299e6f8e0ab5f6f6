"""Traces of the keys that lookups ask for, while they are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hps_numba.arrays.cuda import DeviceKeys
from hps_numba.device import driver, streams
from hps_numba.server.table import ServedTable
from hps_numba.traces.recording import TraceRecording

__all__ = ["Recordings"]


class Recordings:
    """The recordings under way.

    Attributes:
        active: each with its table; replaced as a whole. Lookups call ``record`` only if it is not empty.

    Thread safety: every method.
    """

    def __init__(self) -> None:
        self.active: tuple[tuple[ServedTable, TraceRecording], ...] = ()
        self._tables: dict[TraceRecording, ServedTable] = {}  # in the order in which they began

    def _publish(self) -> None:
        """Set ``active``; no lock, as a signal handler may start or end a recording here too: whoever sets it looks again."""
        while self.active != (now := self._under_way()):
            self.active = now

    def _under_way(self) -> tuple[tuple[ServedTable, TraceRecording], ...]:
        recordings = list(self._tables)  # others may be added and removed meanwhile
        return tuple((table, recording) for recording in recordings if (table := self._tables.get(recording)) is not None)

    def start(self, path: str | Path, table: ServedTable, *, name: str, rate: float, every: int, limit: int) -> TraceRecording:
        """As ``HPS.record_trace``; ``name`` is what the trace says of the table."""
        recording = TraceRecording(path, table=name, rate=rate, every=every, limit=limit, on_done=self._stop)
        self._tables[recording] = table
        self._publish()
        return recording

    def _stop(self, done: TraceRecording) -> None:
        self._tables.pop(done, None)
        self._publish()

    def record(self, table: ServedTable, keys: np.ndarray) -> None:
        """Keys int64 ``[n]`` were looked up in a table."""
        for recorded, recording in self.active:
            if recorded is table:
                recording.saw(keys)

    def record_on_device(self, table: ServedTable, keys: DeviceKeys, stream: int) -> None:
        """Keys in the memory of a GPU were looked up, in the order of a stream; those of a captured graph are not recorded."""
        with driver.current(keys.device):
            for recorded, recording in self.active:
                if recorded is table and not streams.is_capturing(stream):
                    recording.saw_on_device(keys.address, keys.n, keys.form, stream)

    def close(self) -> None:
        """End all recordings."""
        for _, recording in self.active:
            recording.close()
