"""rocksdict, imported on first use; its options, its errors, and how it iterates.

Column families and files are written so that HugeCTR reads them: keys and values are raw bytes, blocks are not compressed (rows
hardly shrink, and another build of RocksDB may lack the algorithm), and the table format is one that RocksDB reads since 6.6.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from types import ModuleType
from typing import Any

from hps_numba.errors import HpsError, TierError, TierUnavailable

__all__ = ["column_options", "database_options", "next_pairs", "one_line", "rocksdict", "typed_errors"]

_BLOCK_CACHE_BYTES = 8 << 20  # HugeCTR's; the page cache of the system holds the rest
_FORMAT_VERSION = 5
_STEP_PAIRS = 4096  # the GIL is held for one step of an iteration


def rocksdict(place: str) -> ModuleType:
    """The package.

    Raises:
        TierUnavailable: it is not installed, or cannot be loaded.
    """
    try:
        import rocksdict as package
    except ImportError as problem:
        raise TierUnavailable(
            f'{place}: RocksDB needs rocksdict: pip install "hps-numba[rocksdb]" ({one_line(problem)})'
        ) from None
    return package


@contextmanager
def typed_errors(place: str, kind: type[HpsError] = TierError) -> Iterator[None]:
    """Whatever rocksdict raises, which is a bare Exception for all of RocksDB, becomes an error of type ``kind``."""
    try:
        yield
    except HpsError:
        raise
    except Exception as problem:
        raise kind(f"{place}: {one_line(problem)}") from problem


def one_line(problem: BaseException) -> str:
    """The text of an error without line breaks."""
    return " ".join(str(problem).split())


def column_options(package: ModuleType) -> Any:
    """Options of a column family: what RocksDB calls optimised for point lookups, with level compaction."""
    options = package.Options(raw_mode=True)
    table = package.BlockBasedOptions()
    table.set_data_block_index_type(package.DataBlockIndexType.binary_and_hash())
    table.set_data_block_hash_ratio(0.75)
    table.set_bloom_filter(10, False)
    table.set_block_cache(package.Cache(_BLOCK_CACHE_BYTES))
    table.set_format_version(_FORMAT_VERSION)
    options.set_block_based_table_factory(table)
    options.set_memtable_prefix_bloom_ratio(0.02)
    options.set_memtable_whole_key_filtering(True)
    options.set_compaction_style(package.DBCompactionStyle.level())
    options.set_compression_type(package.DBCompressionType.none())
    return options


def database_options(package: ModuleType, threads: int, *, create: bool) -> Any:
    """Options of a database; ``threads``: of compaction and flushes."""
    options = column_options(package)
    options.create_if_missing(create)
    options.increase_parallelism(threads)
    options.set_keep_log_file_num(10)
    return options


def next_pairs(column: Any, after: bytes | None, most: int, keep: set[Any], *, values: bool = True) -> list[Any]:
    """The next pairs of key and value (or keys) of a column family, at most ``most``, in the order of the keys' bytes.

    Fewer than ``most`` are all that there are: rocksdict's iterators end without a word at a damaged block, so the end of each
    is looked at. No iterator is kept between two calls: one would keep an older version of the table, and its lock, alive.

    Args:
        after: the last key that is known; None begins.
        keep: holds the native iterator while it is used.

    Raises:
        Exception, of rocksdict: a damaged file.
    """
    pairs: list[Any] = []
    stalled = False
    while len(pairs) < most:
        step = min(_STEP_PAIRS, most - len(pairs))
        source = (column.items if values else column.keys)(from_key=None if after is None else after + b"\0")
        keep.add(source)
        try:
            some = list(islice(source, step))
        finally:
            keep.discard(source)
        pairs += some
        if some:
            after = some[-1][0] if values else some[-1]
        if len(some) < step:
            if _is_end(column, after, keep):
                break
            if stalled and not some:
                raise TierError(f"expected the row after key {after!r}, got none")
            stalled = True
    return pairs


def _is_end(column: Any, after: bytes | None, keep: set[Any]) -> bool:
    """Whether no key comes after this one; raises if that cannot be read."""
    look = column.iter()
    keep.add(look)
    try:
        look.seek(b"" if after is None else after + b"\0")
        if look.valid():
            return False
        look.status()
        return True
    finally:
        keep.discard(look)
