"""A tier whose answers are checked: what a tier of the user's own raises or returns never reaches the rows of others.

Problem: an int array in place of flags is taken for positions, a chunk of another width is garbage, and ``sys.exit`` in a tier
ends the server. Choice: one wrapper that every call of a server goes through. Turned down: checks where answers are used, which
were forgotten in half of the places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hps_numba.errors import HpsError, TierError
from hps_numba.storage.bin_dump import Dump
from hps_numba.storage.tiers._tier import Fetched, PartialWriteError, Tier

__all__ = ["CheckedTier", "TierDefect"]

T = TypeVar("T")
_BOOL = np.dtype(bool)


class TierDefect(TierError):
    """A tier broke its contract; unlike one that is out of order, it is not skipped."""


@contextmanager
def defects_as_errors(call: str) -> Iterator[None]:
    """Errors of this package go through, and so does Ctrl-C; whatever else the block raises becomes a TierDefect."""
    try:
        yield
    except (HpsError, KeyboardInterrupt):
        raise
    except BaseException as problem:
        raise _raised(call, problem) from problem


def _raised(call: str, problem: BaseException) -> TierDefect:
    return TierDefect(f"{call}: expected an answer or a TierError, got {type(problem).__name__}: {_text(problem)}")


def _text(problem: BaseException) -> str:
    try:
        return " ".join(str(problem).split())[:500]
    except Exception:
        return "an error without a message"


class CheckedTier(Tier):
    """Passes every call on to ``inner``, and checks what it returns and raises; otherwise as :class:`Tier`."""

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self.name = type(inner).__name__
        with defects_as_errors(f"{self.name}.section"):
            super().__init__(inner.section, wide_keys=inner.wide_keys)

    @property
    def read_only(self) -> bool:
        return bool(self._call("read_only", lambda: self.inner.read_only))

    @property
    def parallel_fetches(self) -> int:  # type: ignore[override]
        number: object = self._call("parallel_fetches", lambda: self.inner.parallel_fetches)
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise self._defect("parallel_fetches", "a number of at least 1", repr(number))
        return number

    def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> Fetched:
        answer: object = self._call("fetch", lambda: self.inner.fetch(table, keys, rows, deadline=deadline))
        if not isinstance(answer, Fetched):
            raise self._defect("fetch", "Fetched", type(answer).__name__)
        self._check_flags("fetch: found", answer.found, len(keys))
        if answer.failed is not None:
            self._check_flags("fetch: failed", answer.failed, len(keys))
        asked: object = answer.asked
        if isinstance(asked, bool) or not isinstance(asked, (int, np.integer)) or not 0 <= asked <= len(keys):
            raise self._defect("fetch: asked", f"0 to {len(keys)}", repr(asked))
        return answer

    def insert(self, table: str, keys: np.ndarray, rows: np.ndarray) -> int:
        return self._write("insert", len(keys), lambda: self.inner.insert(table, keys, rows))

    def erase(self, table: str, keys: np.ndarray | None = None) -> int:
        return self._write("erase", 0 if keys is None else len(keys), lambda: self.inner.erase(table, keys))

    def _write(self, name: str, n: int, write: Callable[[], int]) -> int:
        try:
            return self._call(name, write)
        except PartialWriteError as problem:
            self._check_flags(f"{name}: failed", problem.failed, n)
            raise

    def contains(self, table: str, keys: np.ndarray) -> np.ndarray:
        flags = self._call("contains", lambda: self.inner.contains(table, keys))
        self._check_flags("contains", flags, len(keys))
        return flags

    def size(self, table: str) -> int:
        return self._call("size", lambda: self.inner.size(table))

    def capacity(self, table: str) -> int:
        return self._call("capacity", lambda: self.inner.capacity(table))

    def tables(self) -> list[str]:
        return self._call("tables", self.inner.tables)

    def scan(self, table: str, chunk_rows: int = 65536) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with defects_as_errors(f"{self.name}.scan"):
            chunks = iter(self.inner.scan(table, chunk_rows))
        while True:
            with defects_as_errors(f"{self.name}.scan"):
                chunk: object = next(chunks, self)
            if chunk is self:
                return
            yield self._checked_chunk(chunk)

    def _checked_chunk(self, chunk: object) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(chunk, (tuple, list)) or len(chunk) != 2:
            raise self._defect("scan", "pairs of keys and rows", _form(chunk))
        keys, rows = chunk
        if not (isinstance(keys, np.ndarray) and keys.dtype == np.int64 and keys.ndim == 1):
            raise self._defect("scan: keys", "int64[n]", _form(keys))
        if not (isinstance(rows, np.ndarray) and rows.dtype == np.float32 and rows.ndim == 2 and len(rows) == len(keys)):
            raise self._defect("scan: rows", f"float32[{len(keys)}, dim]", _form(rows))
        return keys, rows

    def dump(self, table: str, path: str | Path) -> int:
        return self._call("dump", lambda: self.inner.dump(table, path))

    def load_dump(self, table: str, path: str | Path) -> int:
        return self._call("load_dump", lambda: self.inner.load_dump(table, path))

    def open_dump(self, path: str | Path) -> Dump:
        return self._call("open_dump", lambda: self.inner.open_dump(path))

    def close(self) -> None:
        self._call("close", self.inner.close)

    def _call(self, name: str, call: Callable[[], T]) -> T:
        try:  # as ``defects_as_errors``, which takes a microsecond longer
            return call()
        except (HpsError, KeyboardInterrupt):
            raise
        except BaseException as problem:
            raise _raised(f"{self.name}.{name}", problem) from problem

    def _check_flags(self, place: str, flags: Any, n: int) -> None:
        """NumPy would take an int array for positions, and the rows of other keys would be the answer."""
        if not (isinstance(flags, np.ndarray) and flags.dtype == _BOOL and flags.shape == (n,)):
            raise self._defect(place, f"bool[{n}]", _form(flags))

    def _defect(self, place: str, expected: str, got: str) -> TierDefect:
        return TierDefect(f"{self.name}.{place}: expected {expected}, got {got}")


def _form(value: object) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
