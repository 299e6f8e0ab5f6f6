"""Changes of one cache that keep it in step with its host store: update, erase, refresh, clear."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np

from hps_numba.cache.host_arrays import contiguous_keys, contiguous_rows
from hps_numba.cache.kernel_set import KernelSet
from hps_numba.cache.lifecycle import Lifecycle
from hps_numba.cache.residency import Residency
from hps_numba.cache.sizing import CacheGeometry
from hps_numba.cache.state import CacheState
from hps_numba.errors import ConfigError
from hps_numba.kernels.layouts.cache import CLEARED, STATE_CHANGES, STATE_COUNT

__all__ = ["Changes", "range_of_sets"]

_PART_BYTES = 128 << 20  # of rows that are sent to a device at a time


def range_of_sets(geometry: CacheGeometry, first: int, stop: int | None) -> tuple[int, int]:
    """A range of sets of a cache; ``stop`` None: to the last.

    Raises:
        ConfigError: the range is not one of this cache's.
    """
    stop = geometry.sets if stop is None else stop
    if not 0 <= first <= stop <= geometry.sets:
        raise ConfigError(f"{geometry.name}: sets: expected a range within 0 to {geometry.sets}, got {first} to {stop}")
    return first, stop


class Changes:
    """Changes of one cache; each is done when its method returns.

    Args:
        reading: gives a block in which the host store frees nothing that this thread reads.

    Thread safety: all methods; they wait for each other.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        state: CacheState,
        lifecycle: Lifecycle,
        kernels: KernelSet,
        residency: Residency,
        reading: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._geometry, self._state, self._lifecycle = geometry, state, lifecycle
        self._kernels, self._residency, self._reading = kernels, residency, reading

    def update(self, keys: np.ndarray, rows: np.ndarray | None) -> None:
        """``EmbeddingCache.update``."""
        name = self._geometry.name
        keys = contiguous_keys(name, keys)
        if rows is None:
            with self._lifecycle.controlled(), self._state.kept_copies(keys) as (address,):
                self._update(address, len(keys), 0)
                self._residency.store_changed()
            return
        rows = contiguous_rows(name, rows, len(keys), self._geometry.dim)
        last = len(keys) - 1 - np.unique(keys[::-1], return_index=True)[1]
        with self._lifecycle.controlled(), self._state.copies(keys[last], rows[last]) as (address, source):
            self._update(address, len(last), source)

    def take_written(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """``EmbeddingCache.take_written``: a part at a time, so that a device needs little memory for it."""
        name, dim = self._geometry.name, self._geometry.dim
        keys = contiguous_keys(name, keys)
        rows = contiguous_rows(name, rows, len(keys), dim)
        step = max(1, _PART_BYTES // (4 * dim))
        with self._lifecycle.controlled():
            for start in range(0, len(keys), step):
                part = slice(start, start + step)
                with self._state.kept_copies(keys[part], rows[part]) as (address, source):
                    self._update(address, len(keys[part]), source)
            self._residency.store_changed()

    def _update(self, keys: int, n: int, source: int) -> None:
        self._run("update_kernel", n, *self._state.kernel_args, keys, n, source, 4 * self._geometry.dim, 1)

    def erase(self, keys: np.ndarray) -> int:
        """``EmbeddingCache.erase``."""
        state = self._state
        keys = contiguous_keys(self._geometry.name, keys)
        with self._lifecycle.controlled(), state.copies(keys) as (address,):
            self._residency.set_complete(False)
            state.zero_word(STATE_COUNT)
            self._run("erase_kernel", len(keys), state.lines, self._geometry.sets, state.address, address, len(keys))
            return state.word(STATE_COUNT)

    def refresh(self, first_set: int, stop_set: int | None, *, drop: bool) -> None:
        """``EmbeddingCache.refresh``."""
        first, stop = range_of_sets(self._geometry, first_set, stop_set)
        state = self._state
        with self._lifecycle.controlled():
            self._run("refresh_kernel", stop - first, state.lines, state.rows, state.address, first, stop, int(drop))

    def clear(self) -> None:
        """``EmbeddingCache.clear``."""
        state, sets = self._state, self._geometry.sets
        with self._lifecycle.controlled():
            self._residency.set_complete(False)
            state.set_word(STATE_CHANGES, state.word(STATE_CHANGES) + CLEARED)  # all changes are controlled: nobody else counts
            self._run("clear_kernel", sets, state.lines, sets)

    def _run(self, kernel: str, n: int, *args: int) -> None:
        """Run a kernel that reads the store, and wait for it."""
        if n:
            with self._reading():
                self._kernels.run(kernel, n, self._state.stream, *args)
                self._kernels.backend.synchronize(self._state.stream)
