"""Sparse models into the tiers of one model: into a store in host memory, into slower tiers, and stale rows out of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

from hps_numba.config import ServerConfig, TableSpec
from hps_numba.runtime.hugectr_log import TRACE
from hps_numba.server.model_jobs import Check
from hps_numba.storage.host.memory import Mark
from hps_numba.storage.host.store import HostStore
from hps_numba.storage.loading import load_table, rows_to_load, stream_table
from hps_numba.storage.model_files import open_model
from hps_numba.storage.shared.source import source_digest
from hps_numba.storage.tiers._tier import Tier

__all__ = ["Progress", "TableLoading", "no_progress", "stoppable"]

log = logging.getLogger(__name__)
Progress = Callable[[str, int], None]
"""Told the tag of a table and how many more of its rows were loaded."""


def no_progress(what: str, rows: int) -> None:
    """Tell nobody."""
    del what, rows


def stoppable(on_rows: Progress, check: Check) -> Progress:
    """``on_rows`` that may also raise, as ``check``, so that the loading stops."""

    def report(what: str, rows: int) -> None:
        check()
        on_rows(what, rows)

    return report


class TableLoading:
    """Reads sparse models of any format, as the config of a server says.

    Raises:
        ModelFileError, in every method: a sparse model is missing, damaged or does not fit its table.

    Thread safety: every method.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._key_bits = 64 if config.supportlonglong else 32
        self._host_rate = config.volatile_db.initial_cache_rate

    @staticmethod
    def rows(spec: TableSpec) -> int:
        """Rows in the sparse model of a table, duplicates included."""
        with open_model(spec.source, spec.dim) as reader:
            return reader.rows

    def validate(self, spec: TableSpec, path: str, on_rows: Progress = no_progress) -> None:
        """Read a sparse model to its end, as some damage shows only there; ``on_rows`` is told of no row, and may raise."""
        with open_model(path, spec.dim) as reader:
            for _ in stream_table(reader, reader.rows, key_bits=self._key_bits):
                on_rows(spec.tag, 0)

    def load_store(self, spec: TableSpec, store: HostStore, path: str, on_rows: Progress = no_progress) -> HostStore:
        """A new store like ``store`` with the rows of a sparse model, as many as ``initial_cache_rate`` says.

        Raises:
            CapacityError: no memory for the rows.
        """
        with open_model(path, spec.dim) as reader:
            return load_table(
                store,
                reader,
                key_bits=self._key_bits,
                rate=self._host_rate,
                on_rows=lambda rows: on_rows(spec.tag, rows),
            )

    def mark_of(self, store: HostStore, path: str) -> Mark:
        """What tells other processes that ``store`` has the rows of a sparse model; it says nothing if none can see them."""
        return Mark(source_digest(path, self._key_bits, self._host_rate), path) if store.memory.shared else Mark()

    def insert(self, tier: Tier, spec: TableSpec, path: str, on_rows: Progress = no_progress) -> None:
        """Insert the rows of a sparse model in a slower tier.

        Raises:
            TierError: the tier failed.
        """
        with open_model(path, spec.dim) as reader:
            inserted, began = 0, time.perf_counter()
            for keys, rows in stream_table(reader, _rows_for(tier, reader.rows), key_bits=self._key_bits):
                tier.insert(spec.tag, keys, rows)
                on_rows(spec.tag, len(keys))
                inserted += len(keys)
                log.log(
                    TRACE, "%s: %d rows in %s after %.3g s", spec.tag, inserted, tier.section.type, time.perf_counter() - began
                )
            log.info("%s: inserted %d of %d rows in %s", spec.tag, inserted, reader.rows, tier.section.type)

    @staticmethod
    def drop_stale(tiers: Sequence[Tier], spec: TableSpec, path: str, newer: np.ndarray | None = None) -> None:
        """Erase those rows from slower tiers whose keys are neither in a sparse model nor, int64, in ``newer``.

        Raises:
            TierError: a tier failed.
        """
        if not tiers:
            return
        with open_model(path, spec.dim) as reader:
            present = np.empty(reader.rows, np.int64)
            reader.read(0, reader.rows, present, None)
        for tier in tiers:
            kept = present[: _rows_for(tier, len(present))]
            _erase_others(tier, spec.tag, np.sort(kept if newer is None else np.concatenate([kept, newer])))


def _rows_for(tier: Tier, rows: int) -> int:
    """Rows at the head of a file that go to a tier: a volatile one has an ``initial_cache_rate``."""
    return rows_to_load(rows, getattr(tier.section, "initial_cache_rate", 1.0))


def _erase_others(tier: Tier, tag: str, kept: np.ndarray) -> None:
    """Erase all rows of a table but those of ``kept``, int64, ascending."""
    padded = np.append(kept, 0)
    for keys, _ in tier.scan(tag):
        slots = np.searchsorted(kept, keys)
        stale = keys[(slots == len(kept)) | (padded[slots] != keys)]
        if len(stale):
            tier.erase(tag, stale)
