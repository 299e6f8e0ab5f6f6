"""The lookup kernel: rows of every width, keys that stand beyond their primary line, answers written past the caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.oracles import assert_same_bits, rows_of

from hps_numba.kernels.hashing import primary_line
from hps_numba.kernels.layouts.host_store import ENTRIES_PER_LINE, lines_for
from hps_numba.storage import loading
from hps_numba.storage.host import reading
from hps_numba.storage.host.store import HostStore
from hps_numba.storage.model_files import open_model, write_model

ROWS = 12
LINES = lines_for(ROWS)
CANARY = np.float32(-77.5)


def store_with(keys: Any, dim: int = 3, rows: int = 0) -> HostStore:
    store = HostStore(dim, rows=rows)
    store.upsert(np.asarray(keys, np.int64), rows_of(keys, dim))
    return store


def keys_at_home_in(line: int, count: int) -> list[int]:
    """The first ``count`` keys from 0 on whose search starts in a line of an index for ``ROWS`` rows."""
    with np.errstate(over="ignore"):
        found = [key for key in range(2000) if primary_line(np.uint64(key), np.uint64(LINES)) == line]
    assert len(found) >= count
    return found[:count]


def looked_up(store: HostStore, keys: list[int], default: float = -1.0) -> tuple[np.ndarray, list[int]]:
    """(rows, positions without a row)."""
    out, misses = np.full((len(keys), store.dim), np.nan, np.float32), np.empty(len(keys), np.int64)
    missing = store.lookup(np.asarray(keys, np.int64), out, default, misses)
    return out, misses[:missing].tolist()


@pytest.mark.parametrize("dim", [*range(1, 34), 47, 48, 63, 64, 65, 127, 128, 129, 160, 255, 300])
def test_a_row_is_copied_or_filled_and_nothing_around_it(dim: int) -> None:
    store = store_with([4, 5, 6], dim)
    for start in range(0, 16, 5):  # any alignment of the answer that float32 can have
        memory = np.full(start + 4 * dim + 16, CANARY)
        out = memory[start : start + 4 * dim].reshape(4, dim)
        assert store.lookup(np.array([6, 99, 4, 5]), out, 0.25) == 1
        assert_same_bits(out[[0, 2, 3]], rows_of([6, 4, 5], dim))
        assert (out[1] == 0.25).all()
        assert (memory[:start] == CANARY).all() and (memory[start + 4 * dim :] == CANARY).all()


@pytest.mark.parametrize("home", [0, 2, LINES - 1])
@pytest.mark.parametrize("count", range(1, 3 * ENTRIES_PER_LINE))
def test_keys_of_one_primary_line_are_found_in_the_lines_after_it(home: int, count: int) -> None:
    """From the last line on, the search goes on in the first."""
    known = keys_at_home_in(home, count + 5)
    present, absent = known[:count], known[count:]
    next_door = keys_at_home_in((home + 1) % LINES, 3)
    store = store_with([*present, *next_door], rows=ROWS)
    keys = [*absent, *present, *next_door]
    out, misses = looked_up(store, keys)
    assert misses == list(range(len(absent)))
    assert_same_bits(out[len(absent) :], rows_of([*present, *next_door], 3))
    assert store.contains(np.array(keys)).tolist() == [False] * len(absent) + [True] * (count + 3)


def test_keys_beyond_a_line_of_erased_ones_are_found() -> None:
    known = keys_at_home_in(1, 2 * ENTRIES_PER_LINE)
    store = store_with(known, rows=ROWS)
    store.erase(np.array(known[:ENTRIES_PER_LINE]))
    out, misses = looked_up(store, known)
    assert misses == list(range(ENTRIES_PER_LINE))
    assert_same_bits(out[ENTRIES_PER_LINE:], rows_of(known[ENTRIES_PER_LINE:], 3))


def test_key_0_differs_from_the_zeros_of_empty_entries() -> None:
    with np.errstate(over="ignore"):
        home = int(primary_line(np.uint64(0), np.uint64(LINES)))
    neighbour = keys_at_home_in(home, 2)[1]
    for present in ([0], [neighbour], [0, neighbour], [neighbour, 0]):
        out, misses = looked_up(store_with(present, rows=ROWS), [0, neighbour])
        assert misses == [i for i, key in enumerate([0, neighbour]) if key not in present]
        assert_same_bits(np.delete(out, misses, 0), rows_of(sorted(present), 3))


@pytest.mark.parametrize("n", [15, 16, 17, 1023, 1024, 1025, 3000])
def test_any_number_of_keys_and_the_positions_of_missing_ones(n: int) -> None:
    store = store_with(range(0, 1000, 2), dim=5)
    keys = np.random.default_rng(n).integers(0, 1000, n)
    out, misses = looked_up(store, keys.tolist(), default=np.nan)
    assert misses == np.flatnonzero(keys % 2).tolist()
    assert_same_bits(out[keys % 2 == 0], rows_of(keys[keys % 2 == 0], 5))
    assert np.isnan(out[misses]).all()


@pytest.mark.parametrize(
    ("dim", "offset", "streams"), [(16, 0, True), (48, 0, True), (160, 0, True), (16, 4, False), (17, 0, False)]
)
def test_an_answer_written_past_the_caches_is_the_same(
    dim: int, offset: int, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only rows of whole cache lines to an aligned answer may be written so."""
    seen = []
    kernel = reading.host_lookup

    def watched(*arguments: Any) -> int:
        seen.append(arguments[-1])
        missing: int = kernel(*arguments)
        return missing

    monkeypatch.setattr(reading, "host_lookup", watched)
    monkeypatch.setattr(reading, "_STREAM_BYTES", 1)
    store = store_with(range(300), dim)
    keys = np.random.default_rng(dim).integers(-20, 320, 2000)
    memory = np.full(len(keys) * dim + 32, CANARY)
    first = -memory.ctypes.data % 64 // 4 + offset
    out = memory[first : first + len(keys) * dim].reshape(-1, dim)
    present = (keys >= 0) & (keys < 300)
    assert store.lookup(keys, out, 0.5, threads=2) == (~present).sum()
    assert set(seen) == {streams}
    assert_same_bits(out[present], rows_of(keys[present], dim))
    assert (out[~present] == 0.5).all()
    assert (memory[:first] == CANARY).all() and (memory[first + out.size :] == CANARY).all()


def test_a_small_answer_is_written_through_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    kernel = reading.host_lookup
    monkeypatch.setattr(reading, "host_lookup", lambda *arguments: seen.append(arguments[-1]) or kernel(*arguments))
    looked_up(store_with(range(9), 16), [1, 2, 3])
    assert seen == [False]


def test_a_model_of_many_chunks_is_loaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that are touched ahead of the reader are read into afterwards."""
    keys = np.random.default_rng(0).permutation(1000)
    write_model(tmp_path / "table", 16, [(keys, rows_of(keys, 16))])
    monkeypatch.setattr(loading, "_CHUNK_BYTES", 3 * 4096)
    with open_model(tmp_path / "table") as reader:
        store = loading.load_table(HostStore(16), reader, key_bits=64)
    out, misses = looked_up(store, [*keys.tolist(), 1000])
    assert misses == [1000]
    assert_same_bits(out[:-1], rows_of(keys, 16))
    store.close()
