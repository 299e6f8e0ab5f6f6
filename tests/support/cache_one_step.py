"""A backend that starts lookups in one step as that of a device does, with kernels of the CPU: for tests without a device."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from hps_numba.cache.backends import CpuBackend

__all__ = ["OneStepBackend"]

_KEYS_AT, _ADVANCE_AT, _WORDS_AT = 4, 6, 2


class _PreparedLookup:
    """As ``compiler.launch.PreparedLookup``: of each launch only what ``start`` is given changes."""

    def __init__(self, backend: OneStepBackend, kernels: Sequence[Any], launches: Sequence[Any], how: dict[str, int]) -> None:
        self._backend, self._kernels, self._launches, self._how = backend, kernels, launches, how

    def start(self, keys: int, n: int, out: int) -> bool:
        if self._backend.capturing:
            return False
        for i, (kernel, (_, rows, threads, args)) in enumerate(zip(self._kernels, self._launches, strict=True)):
            given = list(args)
            if i == 0:
                given[_KEYS_AT : _KEYS_AT + 3] = keys, n, out
            if i and i == self._how["insert_at"]:
                assert len(given) == _ADVANCE_AT + 1
                given[_ADVANCE_AT] = max(1, 4 * n // self._how["capacity"])
            if i and i == self._how["touch_at"]:
                assert len(given) == 4
            kernel.launch(1, 0, *given, threads=threads, rows=rows)
        self._backend.prepared += 1
        return True


class _PreparedTables:
    """As ``compiler.launch.PreparedTables``."""

    def __init__(self, backend: OneStepBackend, kernels: Sequence[Any], launches: Sequence[Any], how: dict[str, int]) -> None:
        self._backend, self._kernels, self._launches, self._how = backend, kernels, launches, how

    def start(self, words: int, n: int, keys: int = 0, key_step: int = 0, out: int = 0, out_step: int = 0) -> bool:
        if self._backend.capturing:
            return False
        tables = self._how["tables"]
        given = [(keys + key_step * i, n, out + out_step * i) for i in range(tables)]
        if words:
            given = [tuple((ctypes.c_int64 * 3).from_address(words + 24 * i)) for i in range(tables)]
        flat = [word for table in given for word in table]
        for i, (kernel, (_, rows, threads, args)) in enumerate(zip(self._kernels, self._launches, strict=True)):
            args = list(args)
            if i == 0 or i == self._how["insert_at"]:
                args[_WORDS_AT : _WORDS_AT + len(flat)] = flat
            kernel.launch(1, 0, *args, threads=threads, rows=rows)
        self._backend.chained += 1
        return True


class _LaunchChain:
    """As ``compiler.launch.LaunchChain``."""

    def __init__(self, backend: OneStepBackend, kernels: Sequence[Any]) -> None:
        self._backend, self._kernels = backend, kernels

    def start(self, context: int, stream: int, event: int, *launches: Any) -> bool:
        if self._backend.capturing:
            return False
        for kernel, (blocks, rows, threads, args) in zip(self._kernels, launches, strict=True):
            kernel.launch(blocks, stream, *args, threads=threads, rows=rows)
        self._backend.chained += 1
        return True


class OneStepBackend(CpuBackend):
    """Has the ordinal of a device.

    Attributes:
        capturing: a graph captures all streams.   prepared, chained: lookups that were started in one step.
    """

    ordinal = 41

    def __init__(self) -> None:
        self.capturing = False
        self.prepared = self.chained = 0

    def is_capturing(self, stream: int) -> bool:
        return self.capturing

    def prepared_lookup(
        self, kernels: Sequence[Any], launches: Sequence[Any], stream: int, event: int, **how: int
    ) -> _PreparedLookup:
        assert how["touch_at"] in (0, len(kernels) - 2) and how["insert_at"] in (0, len(kernels) - 1)
        return _PreparedLookup(self, kernels, launches, how)

    def prepared_tables(
        self, kernels: Sequence[Any], launches: Sequence[Any], stream: int, event: int, **how: int
    ) -> _PreparedTables:
        assert how["touch_at"] in (0, len(kernels) - 2) and how["insert_at"] in (0, len(kernels) - 1)
        return _PreparedTables(self, kernels, launches, how)

    def launch_chain(self, kernels: Sequence[Any]) -> _LaunchChain:
        return _LaunchChain(self, kernels)
