"""HugeCTR's names: two hashes a partition of a table, whose common tag keeps them on one node.

``hps_et{<table>/p<i>}v`` has the rows, raw float32 by raw key; ``hps_et{<table>/p<i>}t`` what evictions go by: under
``evict_least_used`` how often a key was asked for, as decimal text; under ``evict_oldest`` 8 bytes, seconds since 1970 as a
little-endian integer; under ``evict_random`` nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Partition", "partitions_of", "read_name", "table_pattern"]

_NAME = re.compile(rb"hps_et\{(.+)/p(\d+)\}v", re.DOTALL)


class Partition(NamedTuple):
    """A partition of a table.

    Attributes:
        table: its tag.   number: of the partition.   rows, uses: names of its hashes.   slot: in a cluster.
    """

    table: str
    number: int
    rows: bytes
    uses: bytes
    slot: int

    def __str__(self) -> str:
        return f"redis_cluster: {self.table}: partition {self.number}"


def _partition(table: str, number: int, slot_of: Callable[[bytes], int]) -> Partition:
    stem = b"hps_et{%b/p%d}" % (table.encode("utf-8", "surrogateescape"), number)
    return Partition(table, number, stem + b"v", stem + b"t", slot_of(stem + b"v"))


def partitions_of(table: str, count: int, slot_of: Callable[[bytes], int]) -> list[Partition]:
    """All partitions of a table."""
    return [_partition(table, number, slot_of) for number in range(count)]


def table_pattern(table: str | None = None) -> bytes:
    """The pattern, for SCAN, of the hashes of rows of one table, or of all."""
    stem = b"hps_et." if table is None else re.sub(rb"([\\*?\[\]])", rb"\\\1", table.encode("utf-8", "surrogateescape"))
    return b"hps_et{%b%b/p*}v" % (stem, b"*" if table is None else b"")


def read_name(name: bytes, slot_of: Callable[[bytes], int]) -> Partition | None:
    """The partition whose hash of rows has this name; None for the name of something else."""
    match = _NAME.fullmatch(name)
    return None if match is None else _partition(match[1].decode("utf-8", "surrogateescape"), int(match[2]), slot_of)
