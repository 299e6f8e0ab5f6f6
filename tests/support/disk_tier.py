"""A tier that other processes see: dicts kept in a file, which fails or waits where its options say so."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from support.fakes import DictTier, NaiveStore

from hps_numba.errors import TierError, TierUnavailable
from hps_numba.storage import Fetched

__all__ = ["DiskTier", "write_table"]


@dataclass
class Settings:
    """``file`` holds the rows; calls named in ``fail_on`` fail, after ``fail_after`` that do not.

    Each call takes ``seconds``. A tier that is ``down`` cannot be opened; with ``wrong_all``, other rows come back; with
    ``failed_keys``, odd keys cannot be looked for.
    """

    file: str
    password: str = ""
    down: bool = False
    fail_on: list[str] = field(default_factory=list)
    fail_after: int = 0
    failed_keys: bool = False
    seconds: float = 0.0
    wrong_all: bool = False


@dataclass(frozen=True)
class PartlyFetched(Fetched):
    """An answer of a tier of which a part is out of order."""

    failed: np.ndarray | None = None


def write_table(file: Path, tag: str, keys: Any, rows: np.ndarray) -> None:
    """Write the file of a ``DiskTier`` with one table."""
    store = NaiveStore(rows.shape[1])
    store.upsert(keys, rows)
    file.write_bytes(pickle.dumps({tag: store}))


class DiskTier(DictTier):
    """A dict in memory, read from the file when it is opened and written to it when it is closed."""

    persistent: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    Options: ClassVar[type] = Settings

    def __init__(self, section: Any, *, wide_keys: bool = True) -> None:
        super().__init__(section, wide_keys=wide_keys)
        self.file, self.calls = Path(self.options.file), 0
        if self.options.down:
            raise TierUnavailable(f"{self.file}: nobody answers at x:{self.options.password}@{self.file}")
        if self.file.exists():
            self.content = pickle.loads(self.file.read_bytes())

    def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> Fetched:
        self._before("fetch")
        answer = super().fetch(table, keys, rows, deadline=deadline)
        if self.options.wrong_all:
            rows += 1
        if self.options.failed_keys:
            answer = PartlyFetched(answer.found & (keys % 2 == 0), answer.asked, failed=keys % 2 == 1)
        return answer

    def insert(self, table: str, keys: np.ndarray, rows: np.ndarray) -> int:
        self._before("insert")
        if self.read_only:
            raise TierError("read only")
        return super().insert(table, keys, rows)

    def erase(self, table: str, keys: np.ndarray | None = None) -> int:
        self._before("erase")
        return super().erase(table, keys)

    def scan(self, table: str, chunk_rows: int = 65536) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        self._before("scan")
        return super().scan(table, chunk_rows)

    def tables(self) -> list[str]:
        self._before("tables")
        return super().tables()

    def close(self) -> None:
        super().close()
        if not self.read_only:
            self.file.write_bytes(pickle.dumps(self.content))

    def _before(self, call: str) -> None:
        time.sleep(self.options.seconds)
        if call in self.options.fail_on:
            self.calls += 1
            if self.calls > self.options.fail_after:
                raise TierError(f"{call}: failed on purpose")
