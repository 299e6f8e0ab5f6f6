"""From a sparse model on disk into a host store: streamed, each byte read once and to its final place.

One thread reads rows straight into the table's memory while another indexes the keys of the chunk before, so that the peak is
the table plus two chunks of keys. Most of the time goes into page faults: memory that is used for the first time has to be
found and cleared. So the indexing thread, which would wait otherwise, touches the pages of every second chunk ahead of the
reader. Of equal keys in a file the last row wins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial

import numpy as np

from hps_numba.errors import ModelFileError
from hps_numba.runtime.rundown import Rundown
from hps_numba.runtime.threads import Ahead
from hps_numba.storage.formats._format import SparseModelReader
from hps_numba.storage.host.store import HostStore

__all__ = ["check_key_width", "load_table", "rows_to_load", "stream_table"]

_CHUNK_BYTES = 8 << 20
_PAGE_BYTES = 4096
_MAX_KEY_32 = 2**32 - 1
Progress = Callable[[int], None]


def rows_to_load(rows: int, rate: float) -> int:
    """Rows of the head of a file that ``initial_cache_rate`` asks for, rounded up."""
    return math.ceil(rows * Fraction(repr(rate)))  # as written: 0.07 of 100 rows are 7, in floats a little more


def check_key_width(reader: SparseModelReader, keys: np.ndarray, first: int, *, key_bits: int) -> None:
    """Raise ModelFileError if a key needs more bits than the server has (HugeCTR HPS truncates it)."""
    if key_bits == 64 or not len(keys):
        return
    bad = np.flatnonzero((keys < 0) | (keys > _MAX_KEY_32))
    if len(bad):
        key = int(keys[bad[0]])
        raise ModelFileError(
            f"{reader.path}: key {key} at row {first + int(bad[0])} does not fit 32 bits (0..{_MAX_KEY_32}); "
            "supportlonglong is false"
        )


def load_table(
    store: HostStore, reader: SparseModelReader, *, key_bits: int, rate: float = 1.0, on_rows: Progress | None = None
) -> HostStore:
    """Fill a sibling of ``store`` with the first ``rate`` of the file's rows; ``store.adopt`` swaps it in.

    Args:
        key_bits: width of the table's keys, 64 or 32.
        on_rows: called with the number of rows just loaded.

    Raises:
        ModelFileError: the file is damaged, or a key does not fit.
        CapacityError: no memory for the table.
    """
    rows = rows_to_load(reader.rows, rate)
    passes_bound = store.max_rows is not None and rows > store.max_rows
    filled = store.sibling(rows if passes_bound else 0)
    try:
        if passes_bound:
            for keys, part in stream_table(reader, rows, key_bits=key_bits):
                filled.upsert(keys, part)
                _report(on_rows, len(keys))
        else:
            _fill_in_place(filled, reader, rows, key_bits=key_bits, on_rows=on_rows)
    except BaseException:
        filled.close()
        raise
    return filled


def stream_table(reader: SparseModelReader, rows: int, *, key_bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first ``rows`` rows in chunks (keys int64 ``[n]``, rows float32 ``[n, dim]``) of arrays that are reused."""
    step = _chunk_rows(reader.dim)
    keys, part = np.empty(min(step, rows), np.int64), np.empty((min(step, rows), reader.dim), np.float32)
    for start in range(0, rows, step):
        n = min(step, rows - start)
        reader.read(start, start + n, keys[:n], part[:n])
        check_key_width(reader, keys[:n], start, key_bits=key_bits)
        yield keys[:n], part[:n]


def _fill_in_place(store: HostStore, reader: SparseModelReader, rows: int, *, key_bits: int, on_rows: Progress | None) -> None:
    content = store.new_content(rows)
    step = _chunk_rows(reader.dim)
    buffers = [np.empty(min(step, rows), np.int64) for _ in range(2)]
    starts = range(0, rows, step)
    now = time.monotonic_ns()

    def read(number: int) -> np.ndarray:
        start = starts[number]
        stop = min(start + step, rows)
        keys = buffers[number % 2][: stop - start]
        reader.read(start, stop, keys, content.rows_view(start, stop))
        return keys

    readers = Rundown()

    def ahead(number: int) -> Ahead[np.ndarray] | None:
        return Ahead(partial(read, number), name="hps_numba_load", inside=readers) if number < len(starts) else None

    try:
        reading = ahead(0)
        for number, start in enumerate(starts):
            assert reading is not None
            keys = reading.result()
            reading = ahead(number + 1)
            check_key_width(reader, keys, start, key_bits=key_bits)
            content.fill(keys, now)
            if number % 2 == 0 and start + 2 * step < rows:
                _touch(content.rows_view(start + 2 * step, min(start + 3 * step, rows)))
            _report(on_rows, len(keys))
    except BaseException:
        readers.wait()  # one that is at work writes to the memory that is released now
        content.release()
        raise
    store.replace(content)


def _touch(rows: np.ndarray) -> None:
    """Write to every page of memory that is about to be filled; NumPy releases the GIL meanwhile."""
    rows.reshape(-1)[:: _PAGE_BYTES // rows.itemsize] = 0


def _chunk_rows(dim: int) -> int:
    return max(1, _CHUNK_BYTES // (4 * dim + 8))


def _report(on_rows: Progress | None, rows: int) -> None:
    if on_rows is not None:
        on_rows(rows)
