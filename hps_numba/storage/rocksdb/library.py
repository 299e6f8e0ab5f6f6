"""rocksdict, imported on first use; its options, its errors, and how it iterates.

Column families and files are written so that HugeCTR reads them: keys and values are raw bytes, blocks are not compressed (rows
hardly shrink, and another build of RocksDB may lack the algorithm), and the table format is one that RocksDB reads since 6.6.

*After a fork* the child has none of RocksDB's threads, and locks that were taken stay so, also those of the whole process: any
call may wait forever. So a child of a process that used RocksDB may not, not even to open another database. RocksDB also joins
its threads when a process exits, which crashes where there are none: such a child ends without the destructors of C++, as
processes of ``multiprocessing`` do. Turned down: opening the database again in the child, which works most of the time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from types import ModuleType
from typing import Any

from hps_numba.errors import HpsError, TierError, TierUnavailable
from hps_numba.runtime.fork import register_fork_reset

__all__ = ["column_options", "database_options", "next_pairs", "one_line", "rocksdict", "typed_errors"]

_BLOCK_CACHE_BYTES = 8 << 20  # HugeCTR's; the page cache of the system holds the rest
_FORMAT_VERSION = 5
_STEP_PAIRS = 4096  # the GIL is held for one step of an iteration


class _Process:
    """Whether RocksDB was used in this process, or in an ancestor before a fork."""

    def __init__(self) -> None:
        self.used = self.inherited = False
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Let a child end by ``_exit``, with its exit status, once Python has ended and the streams of C are flushed."""
        if not self.used or self.inherited:
            return
        self.inherited = True
        libc = ctypes.CDLL(None)
        on_exit = getattr(libc, "on_exit", None)  # of Linux with glibc
        if on_exit is not None:
            on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)
            at_exit = getattr(libc, "__cxa_atexit")  # in a class, a name with two underscores is another one
            at_exit(ctypes.cast(libc.fflush, ctypes.c_void_p), None, None)  # called before, as it comes later


_process = _Process()


def rocksdict(place: str) -> ModuleType:
    """The package.

    Raises:
        TierUnavailable: it is not installed, cannot be loaded, or was used in the parent of a forked process.
    """
    if _process.inherited:
        raise TierUnavailable(
            f"{place}: expected a process whose parent had not used RocksDB before the fork, got one that had"
        )
    try:
        import rocksdict as package
    except ImportError as problem:
        raise TierUnavailable(
            f'{place}: RocksDB needs rocksdict: pip install "hps-numba[rocksdb]" ({one_line(problem)})'
        ) from None
    _process.used = True
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
