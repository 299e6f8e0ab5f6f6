"""``redis_cluster``: rows in Redis or Valkey, a cluster or one plain server, in HugeCTR's layout, byte for byte.

*A node that fails costs its own keys.* ``fetch`` returns the rows of the other nodes and says which keys it could not look for
(``Fetched.failed``). ``insert`` and ``erase`` of keys write to the other nodes and raise PartialWriteError; ``contains``,
``size`` and whatever else needs every node raise TierError.

*Why not redis-py for rows.* Its clients make a Python object a field: 1.5 microseconds a row, under the GIL. Here redis-py
connects, authenticates and encrypts, and kernels write and parse what goes over its connections (``kernels.host.resp``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hps_numba.config import VolatileDatabaseConfig
from hps_numba.errors import TierError
from hps_numba.runtime.background import BackgroundJobs
from hps_numba.storage.redis.bulk import Batch, BulkRunner, Share, Write
from hps_numba.storage.redis.client import RedisClient
from hps_numba.storage.redis.eviction import Evictor, stamp_of
from hps_numba.storage.redis.layout import Partition
from hps_numba.storage.redis.limits import Limits
from hps_numba.storage.redis.plain import PlainCommands
from hps_numba.storage.redis.requests import Request, Values, add_uses, count_rows, delete, get, look_for, put, stamp
from hps_numba.storage.redis.tables import Tables
from hps_numba.storage.redis.topology import Topology
from hps_numba.storage.tiers._tier import NO_LIMIT, Fetched, PartialWriteError, Tier

__all__ = ["PLUGIN", "RedisClusterTier"]

log = logging.getLogger(__name__)
#: what Redis says if a time is to be counted up
_NOT_A_COUNT = "hash value is not an integer"


class _Written(NamedTuple):
    """What became of a batch: how many rows it added or removed, and the shares that failed."""

    batch: Batch
    changed: int
    failures: list[Share]


class RedisClusterTier(Tier):
    """Rows shared by many hosts; what Redis persists and replicates outlives them.

    Class attributes:
        limits: how long a node may take.

    Thread safety: every method.
    """

    parallel_fetches = 4  # a node answers one call after the other; the way to it takes time, too
    shared = True
    Options = VolatileDatabaseConfig
    section: VolatileDatabaseConfig
    limits = Limits()

    def __init__(self, section: VolatileDatabaseConfig, *, wide_keys: bool = True) -> None:
        """Connect to the first seed that answers.

        Raises:
            TierUnavailable: none does, or redis-py is not installed, or a certificate cannot be used.
        """
        super().__init__(section, wide_keys=wide_keys)
        self._closed = False
        client = RedisClient(section, self.limits)
        self._topology = Topology(client, section.address, section.num_node_connections, self.limits)
        self._plain = PlainCommands(self._topology, self.limits)
        self._bulk = BulkRunner(client, self._topology, self.limits)
        self._evictor = Evictor(section, self._plain)
        self._tables = Tables(section.num_partitions, wide_keys, self._plain, self._topology)
        self._background = BackgroundJobs()

    # -- keys ---------------------------------------------------------------------

    def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> Fetched:
        self._check_open()
        if rows.ndim != 2 or len(rows) != len(keys):
            raise TierError(f"redis_cluster: {table}: rows: expected shape ({len(keys)}, dim), got {rows.shape}")
        found, failed = np.zeros(len(keys), bool), np.zeros(len(keys), bool)
        asked = 0
        texts: list[str] = []
        partitions = self._tables.partitions(table)
        for part in self.batches(len(keys), deadline):
            self._tables.check(table)
            batch = self._fetched(partitions, keys[part], rows[part], deadline, failed[part], texts)
            found[part] = batch.found.view(bool)
            asked = part.stop
            if batch.found.any():
                self._tables.check(table, rows_seen=True)
        if asked and failed[:asked].all():
            raise TierError(texts[0])
        self._note_uses(partitions, keys[found])
        return Fetched(found, asked, failed if failed.any() else None)

    def _fetched(
        self,
        partitions: Sequence[Partition],
        keys: np.ndarray,
        rows: np.ndarray,
        deadline: float | None,
        failed: np.ndarray,
        texts: list[str],
    ) -> Batch:
        """Fetch one batch.   **Writes:** rows; failed; texts, a line for each failure."""
        direct = rows.flags.c_contiguous and rows.dtype == np.float32
        target = rows if direct else np.empty(rows.shape, np.float32)
        batch = Batch(keys, partitions, wide=self.wide_keys, rows=target)

        def ask(share: Share) -> list[Request]:
            return [get(share.partition, share.keys, batch.key_bytes)]

        for share in self._bulk.run(batch, ask, deadline=deadline):
            if share.width is not None:
                raise TierError(f"{share.partition}: expected rows of width {rows.shape[1]}, got {_in_floats(share.width)}")
            positions = batch.positions(share)
            failed[positions] = batch.found[positions] == 0
            texts.append(f"{share.partition}: {share.failure}")
            log.debug("%s", texts[-1])
        if not direct:
            here = batch.found.view(bool)
            rows[here] = target[here]
        return batch

    def insert(self, table: str, keys: np.ndarray, rows: np.ndarray) -> int:
        self._check_open()
        partitions = self._tables.partitions(table)
        if not len(keys):
            return 0
        self._tables.check_width(table, rows.shape[1])
        new = self._written(keys, lambda part: self._insert_batch(partitions, keys[part], rows[part]))
        self._tables.written(table, rows.shape[1])
        self._tables.check(table, rows_seen=True)  # now, as the node may hang when a lookup has little time
        return new

    def _written(self, keys: np.ndarray, write: Callable[[slice], _Written]) -> int:
        """Write batch by batch, until one finds no node; the sum of the counts.

        Raises:
            PartialWriteError: nodes failed.
        """
        count, failed, text = 0, np.zeros(len(keys), bool), ""
        for part in self.batches(len(keys), None):
            batch, number, failures = write(part)
            count += number
            for share in failures:
                failed[part][batch.positions(share)] = True
            text = text or _text_of(failures)
            if failed[part].all():
                failed[part.stop :] = True
                break
        if text:
            raise PartialWriteError(text, failed)
        return count

    def _insert_batch(self, partitions: Sequence[Partition], keys: np.ndarray, rows: np.ndarray) -> _Written:
        batch = Batch(keys, partitions, wide=self.wide_keys)
        note = self._uses_writer(batch)
        owned = np.ascontiguousarray(rows, np.float32)
        values = Values.of(owned)

        def ask(share: Share) -> list[Request]:
            written = put(share.partition, share.keys, batch.key_bytes, values)
            return [written, count_rows(share.partition), *note(share)]

        failures = self._run_all(batch, ask)
        del owned  # alive until here, as its address was in use
        written = [share for share in batch.shares if share not in failures]
        for share in written:
            self._evictor.evict(share.partition, share.totals[1])
        return _Written(batch, sum(share.totals[0] for share in written), failures)

    def erase(self, table: str, keys: np.ndarray | None = None) -> int:
        self._check_open()
        if keys is None:
            return self._erase_table(table)
        partitions = self._tables.partitions(table)
        self._tables.check(table)
        return self._written(keys, lambda part: self._erase_batch(partitions, keys[part]))

    def _erase_batch(self, partitions: Sequence[Partition], keys: np.ndarray) -> _Written:
        batch = Batch(keys, partitions, wide=self.wide_keys)

        def ask(share: Share) -> list[Request]:
            return [delete(name, share.keys, batch.key_bytes) for name in (share.partition.rows, share.partition.uses)]

        failures = self._run_all(batch, ask)
        return _Written(batch, sum(share.totals[0] for share in batch.shares if share not in failures), failures)

    def contains(self, table: str, keys: np.ndarray) -> np.ndarray:
        self._check_open()
        partitions = self._tables.partitions(table)
        self._tables.check(table)
        found = np.zeros(len(keys), bool)
        for part in self.batches(len(keys), None):
            batch = Batch(keys[part], partitions, wide=self.wide_keys)

            def ask(share: Share, batch: Batch = batch) -> list[Request]:
                return [look_for(share.partition, share.keys, batch.key_bytes)]

            if failures := self._run_all(batch, ask):
                raise TierError(_text_of(failures))
            found[part] = batch.found.view(bool)
        return found

    def _run_all(self, batch: Batch, write: Write) -> list[Share]:
        """Ask every node, with patience; the shares that failed."""
        failures = self._bulk.run(batch, write, patient=True)
        if foreign := [share for share in failures if _NOT_A_COUNT in share.failure]:
            self._forget_uses(foreign)
            failures = [share for share in failures if share not in foreign]
            failures += self._bulk.run(batch, write, shares=foreign, patient=True)
        return failures

    # -- what evictions go by ---------------------------------------------------------------------

    def _uses_writer(self, batch: Batch) -> Write:
        """The requests that note a use of each key of a batch."""
        policy = self.section.overflow_policy
        now = np.frombuffer(stamp_of(time.time()), np.uint8)

        def note(share: Share) -> list[Request]:
            if policy == "evict_oldest":
                return [stamp(share.partition, share.keys, batch.key_bytes, now)]
            if policy == "evict_least_used":
                return [add_uses(share.partition, share.keys, batch.key_bytes)]
            return []

        return note

    def _forget_uses(self, shares: Sequence[Share]) -> None:
        """Remove what another policy has noted for partitions: its times cannot be counted up."""
        for share in shares:
            self._plain.run(share.partition, ("UNLINK", share.partition.uses))

    def _note_uses(self, partitions: Sequence[Partition], keys: np.ndarray) -> None:
        """Note uses of keys that were fetched, in the background; some are lost if too many wait."""
        if self.section.overflow_policy == "evict_random" or not len(keys):
            return

        def job() -> None:
            batch = Batch(keys, partitions, wide=self.wide_keys)
            for share in self._bulk.run(batch, self._uses_writer(batch)):
                log.debug("%s: uses were not noted: %s", share.partition, share.failure)

        self._background.submit(job)

    # -- tables ---------------------------------------------------------------------

    def _erase_table(self, table: str) -> int:
        erased = 0
        for part in {*self._tables.partitions(table), *self._plain.partitions(table)}:
            rows, _ = self._plain.run_all(part, [("HLEN", part.rows), ("UNLINK", part.rows, part.uses)])
            erased += rows
        self._tables.forget(table)
        return erased

    def size(self, table: str) -> int:
        self._check_open()
        self._tables.check(table, strict=True)
        return sum(self._plain.run_each(self._tables.partitions(table), lambda part: ("HLEN", part.rows)))

    def capacity(self, table: str) -> int:
        return min(NO_LIMIT, self.section.overflow_margin * self.section.num_partitions)

    def tables(self) -> list[str]:
        self._check_open()
        return sorted({part.table for part in self._plain.partitions()})

    def scan(self, table: str, chunk_rows: int = 65536) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        self._check_open()
        return self._tables.scan(table, chunk_rows)

    # -- the end ---------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise self.closed_error()

    def close(self) -> None:
        self._closed = True
        if hasattr(self, "_background"):
            self._background.close()
            self._topology.close()


def _text_of(failures: Sequence[Share]) -> str:
    """The first failure, and how many more there are; empty if there is none."""
    if not failures:
        return ""
    more = f" (and {len(failures) - 1} more partitions)" if len(failures) > 1 else ""
    return f"{failures[0].partition}: {failures[0].failure}{more}"


def _in_floats(size: int) -> str:
    return str(size // 4) if size % 4 == 0 else f"{size} bytes"


PLUGIN = RedisClusterTier
