"""Partitions that hold more rows than they may: which rows are evicted, a batch at a time.

Every command touches at most ``BATCH`` keys, so that the node answers others in between (HGETALL of a partition would stall
it for seconds). Rows whose uses are unknown, because they were written under another policy, are evicted at random after the
others.

*Aging.* After an eviction by ``evict_least_used`` the counts that are left are halved, so that rows which were popular once
make room in time. HugeCTR sets them all to one value, which forgets their order. HugeCTR's random eviction looks for keys in
the hash that is empty under this policy, and evicts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hps_numba.config import VolatileDatabaseConfig
from hps_numba.storage.redis.layout import Partition
from hps_numba.storage.redis.plain import PlainCommands

__all__ = ["Evictor", "stamp_of"]

#: keys in one command
BATCH = 1024


def stamp_of(seconds: float) -> bytes:
    """A time as HugeCTR writes it."""
    return int(seconds).to_bytes(8, "little", signed=True)


class Evictor:
    """Evicts rows of partitions as ``overflow_margin``, ``overflow_policy`` and ``overflow_resolution_target`` say.

    Thread safety: every method. Processes that evict from one partition at a time may leave fewer rows than the target.
    """

    def __init__(self, section: VolatileDatabaseConfig, plain: PlainCommands) -> None:
        self.margin, self.policy = section.overflow_margin, section.overflow_policy
        self.target = round(section.overflow_margin * section.overflow_resolution_target)
        self._plain = plain

    def evict(self, part: Partition, rows: int) -> int:
        """Evict from a partition that has ``rows`` rows, if these are too many; returns how many it has then.

        Raises:
            TierError: its node failed.
        """
        if rows <= self.margin:
            return rows
        rows = self._plain.run(part, ("HLEN", part.rows))  # others may have evicted, or the count is of two attempts
        if rows <= self.margin:
            return int(rows)
        if self.policy != "evict_random":
            rows = self._evict_by_use(part, rows)
        while rows > self.target:
            rows = self._evict_random(part, rows)
        return rows

    def _evict_random(self, part: Partition, rows: int) -> int:
        fields = self._plain.run(part, ("HRANDFIELD", part.rows, min(BATCH, rows - self.target)))
        if not fields:
            return 0
        return self._remove(part, fields)

    def _evict_by_use(self, part: Partition, rows: int) -> int:
        fields, uses = self._uses_of(part)
        order = np.argsort(uses, kind="stable")
        at = 0
        while rows > self.target and at < len(order):
            some = order[at : at + min(BATCH, rows - self.target)]
            rows = self._remove(part, [fields[i] for i in some])
            at += len(some)
        if self.policy == "evict_least_used":
            self._age(part, [fields[i] for i in order[at:]], uses[order[at:]])
        return rows

    def _uses_of(self, part: Partition) -> tuple[list[bytes], np.ndarray]:
        """Keys whose uses are known, and their counts or times, int64."""
        uses: dict[bytes, int] = {}
        for fields, values in self._plain.scan_hash(part, part.uses, BATCH):
            uses.update(zip(fields, map(self._number, values), strict=True))
        return list(uses), np.fromiter(uses.values(), np.int64, len(uses))

    def _number(self, value: bytes) -> int:
        """A count or a time; what is neither counts as never used."""
        if self.policy == "evict_oldest":
            return int.from_bytes(value, "little", signed=True) if len(value) == 8 else 0
        return min(int(value), 2**63 - 1) if value.isdigit() else 0

    def _remove(self, part: Partition, fields: list[bytes]) -> int:
        """Remove keys from both hashes; returns how many rows are left."""
        _, _, left = self._plain.run_all(
            part, [("HDEL", part.rows, *fields), ("HDEL", part.uses, *fields), ("HLEN", part.rows)]
        )
        return int(left)

    def _age(self, part: Partition, fields: list[bytes], uses: np.ndarray) -> None:
        for some in _batches(len(fields)):
            pairs: list[Any] = []
            for field, count in zip(fields[some], uses[some], strict=True):
                pairs += [field, b"%d" % (int(count) // 2)]
            self._plain.run(part, ("HSET", part.uses, *pairs))


def _batches(n: int) -> Iterator[slice]:
    return (slice(start, start + BATCH) for start in range(0, n, BATCH))
