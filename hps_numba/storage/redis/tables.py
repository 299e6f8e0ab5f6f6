"""What is known of each table: its partitions, the width of its rows, and that they are where this process looks for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

import numpy as np

from hps_numba.errors import TierError
from hps_numba.kernels.host.resp import group_by_partition
from hps_numba.storage.redis.layout import Partition, partitions_of
from hps_numba.storage.redis.plain import PlainCommands
from hps_numba.storage.redis.topology import Topology

__all__ = ["Tables"]

log = logging.getLogger(__name__)
#: keys of a partition whose place is looked at
_SAMPLES = 8
#: seconds between two looks at a table that is empty, or of which a node does not answer
_PAUSE = 0.5


class Tables:
    """Tables by tag.

    Thread safety: every method; two threads may ask a node for the same.
    """

    def __init__(self, count: int, wide_keys: bool, plain: PlainCommands, topology: Topology) -> None:
        self._count, self._key_bytes, self._plain, self._topology = count, 8 if wide_keys else 4, plain, topology
        self._partitions: dict[str, list[Partition]] = {}
        self._checked: set[str] = set()
        self._pauses: dict[str, tuple[float, bool]] = {}
        self._widths: dict[str, int] = {}
        self._sampled: dict[str, tuple[int, float]] = {}  # width on the nodes that answered, and when it was looked at

    def partitions(self, table: str) -> list[Partition]:
        """Its partitions, by number."""
        known = self._partitions.get(table)
        if known is None:
            known = self._partitions[table] = partitions_of(table, self._count, self._topology.slot_of)
        return known

    def check(self, table: str, *, rows_seen: bool = False, strict: bool = False) -> None:
        """Check that rows written by others are where this process looks for them: until rows of the table have proven it.

        Args:
            rows_seen: the table has rows: look at once if it had none.
            strict: look at once, and raise if a node does not answer, which is passed over otherwise.

        Raises:
            TierError: they were written with another ``num_partitions`` or key width, so that keys would seem to be absent.
        """
        if table in self._checked:
            return
        until, was_empty = self._pauses.get(table, (0.0, False))
        if time.monotonic() < until and not (strict or (rows_seen and was_empty)):
            return
        answered = False
        try:
            self._look(table)
            answered = True
        except Misplaced:
            raise
        except TierError as problem:
            if strict:
                raise
            log.debug("%s: not checked: %s", table, problem)
        self._pauses[table] = time.monotonic() + _PAUSE, answered

    def check_width(self, table: str, dim: int) -> None:
        """Check that rows of width ``dim`` fit a table; once in a while only, as long as a node does not answer.

        Raises:
            TierError: its rows have another width; or as ``check``; or a node did not answer, and the others have no rows.
        """
        if self._widths.get(table) == dim:
            return
        sampled, at = self._sampled.get(table, (0, 0.0))
        if sampled == dim and time.monotonic() - at < _PAUSE:
            return
        complete, width = self._width(table)  # also if another one is known: the table may have been erased meanwhile
        if width not in (None, 4 * dim):
            raise TierError(f"{table}: expected rows of width {width // 4}, got {dim}")
        if complete and width is not None:
            self._widths[table] = dim
        elif width is not None:
            self._sampled[table] = dim, time.monotonic()

    def _width(self, table: str) -> tuple[bool, int | None]:
        """Whether all nodes were asked, and the bytes of a row; None if there is none.

        Raises:
            TierError: as ``check_width``.
        """
        try:
            return True, self._look(table)
        except Misplaced:
            raise
        except TierError as problem:
            width = None
            for part in self.partitions(table):
                try:
                    width = self._sample([part]) or width
                except Misplaced:
                    raise
                except TierError as silent:
                    log.debug("%s: not looked at: %s", part, silent)
            if width is None:
                raise problem
            return False, width

    def written(self, table: str, dim: int) -> None:
        """Rows of width ``dim`` were written."""
        self._widths[table] = dim

    def forget(self, table: str) -> None:
        """The table was erased."""
        self._widths.pop(table, None)
        self._sampled.pop(table, None)
        self._checked.discard(table)

    def _look(self, table: str) -> int | None:
        """As ``_sample``, of all partitions; the table counts as checked if it has rows, and none in further partitions.

        The place of a key does not tell a multiple of ``num_partitions``: half of the keys are in place.
        """
        width = self._sample(self.partitions(table))
        if table not in self._checked:
            for part in self._plain.partitions(table):
                if part.number >= self._count:
                    raise Misplaced(
                        f"{part}: expected {self._count} partitions at most, got rows in this one: "
                        "they were written with another num_partitions"
                    )
            if width is not None:
                self._checked.add(table)
        return width

    def _sample(self, parts: Sequence[Partition]) -> int | None:
        """Bytes of a row; None if there is none. Checks where some keys of each partition are."""
        width = None
        samples = self._plain.run_each(parts, lambda part: ("HRANDFIELD", part.rows, _SAMPLES, "WITHVALUES"))
        for part, flat in zip(parts, map(_flat, samples), strict=True):
            if flat:
                for field in flat[::2]:
                    self._check_place(part, field)
                width = len(flat[1])
        return width

    def _check_place(self, part: Partition, field: bytes) -> None:
        if len(field) != self._key_bytes:
            raise Misplaced(f"{part}: expected keys of {self._key_bytes} bytes (supportlonglong), got {len(field)}")
        ends = np.zeros(self._count, np.int64)
        group_by_partition(self._keys([field]).ctypes.data, 1, self._count, np.empty(1, np.int64), ends)
        number = int(np.flatnonzero(ends)[0])
        if number != part.number:
            raise Misplaced(
                f"{part}: expected keys of this partition, got one of partition {number} of {self._count}: "
                "the rows were written with another num_partitions"
            )

    def _keys(self, fields: list[bytes]) -> np.ndarray:
        """int64 keys; those of 32 bits zero-extended."""
        kind = np.int64 if self._key_bytes == 8 else np.uint32
        return np.frombuffer(b"".join(fields), kind).astype(np.int64)

    def scan(self, table: str, chunk_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All (keys, rows), each key once, also while other clients write: then some may come or not.

        Raises:
            TierError: a node failed, or rows have different widths; or as ``check``.
        """
        self.check(table, strict=True)
        for part in self.partitions(table):
            seen: set[bytes] = set()
            for fields, values in self._plain.scan_hash(part, part.rows, chunk_rows):
                fresh = {field: value for field, value in zip(fields, values, strict=True) if field not in seen}
                seen |= fresh.keys()
                pairs = list(fresh.items())
                for start in range(0, len(pairs), chunk_rows):
                    yield self._chunk(part, pairs[start : start + chunk_rows])

    def _chunk(self, part: Partition, pairs: list[tuple[bytes, bytes]]) -> tuple[np.ndarray, np.ndarray]:
        size = len(pairs[0][1])
        if any(len(field) != self._key_bytes or len(value) != size for field, value in pairs) or size % 4:
            raise TierError(f"{part}: expected keys of {self._key_bytes} bytes and rows of {size // 4} floats, got others")
        rows = np.frombuffer(b"".join(value for _, value in pairs), np.float32)
        return self._keys([field for field, _ in pairs]), rows.reshape(len(pairs), size // 4).copy()


class Misplaced(TierError):
    """Rows are not where this process looks for them."""


def _flat(answer: list[object]) -> list[bytes]:
    """Fields and values, which RESP3 nests."""
    nested = bool(answer) and isinstance(answer[0], list)
    return [one for pair in answer for one in pair] if nested else answer  # type: ignore[attr-defined, return-value]
