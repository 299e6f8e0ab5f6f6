"""Storage tiers made of dicts, and tiers that block, fail or break the contract: named in configs as ``support.fakes:NAME``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
from support.waiting import HANG_SECONDS

from hps_numba.errors import TierError
from hps_numba.storage import Fetched, PartialWriteError, Tier
from hps_numba.storage.tiers._wrappers import CountingTier, FlakyTier, SlowTier, WrapperTier


class NaiveStore:
    """One table in one place: key -> row."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.rows: dict[int, np.ndarray] = {}

    def upsert(self, keys: Any, rows: Any) -> int:
        """Write all; returns how many keys were new. Of equal keys the last wins."""
        before = len(self.rows)
        for key, row in zip(keys, rows, strict=True):
            self.rows[int(key)] = np.array(row, np.float32)
        return len(self.rows) - before

    def update(self, keys: Any, rows: Any) -> int:
        """Write those that exist; returns how many of ``keys`` that were."""
        changed = 0
        for key, row in zip(keys, rows, strict=True):
            if int(key) in self.rows:
                self.rows[int(key)] = np.array(row, np.float32)
                changed += 1
        return changed

    def erase(self, keys: Any) -> int:
        """Remove; returns how many there were."""
        return sum(self.rows.pop(int(key), None) is not None for key in keys)


class DictTier(Tier):
    """The contract of a tier, by dicts."""

    def __init__(self, section: Any, *, wide_keys: bool = True) -> None:
        super().__init__(section, wide_keys=wide_keys)
        self.content: dict[str, NaiveStore] = {}
        self.closed = False

    def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> Fetched:
        found = np.zeros(len(keys), bool)
        asked = 0
        for part in self.batches(len(keys), deadline):
            for i in range(part.start, part.stop):
                row = self._rows(table).get(int(keys[i]))
                if row is not None:
                    rows[i], found[i] = row, True
            asked = part.stop
        return Fetched(found, asked)

    def insert(self, table: str, keys: np.ndarray, rows: np.ndarray) -> int:
        dim = rows.shape[1]
        store = self.content.setdefault(table, NaiveStore(dim))
        self.check_width(table, store.dim, dim)
        return store.upsert(keys, rows)

    def erase(self, table: str, keys: np.ndarray | None = None) -> int:
        if keys is None:
            return len(self.content.pop(table, NaiveStore(1)).rows)
        return self.content.get(table, NaiveStore(1)).erase(keys)

    def size(self, table: str) -> int:
        return len(self._rows(table))

    def tables(self) -> list[str]:
        return sorted(self.content)

    def scan(self, table: str, chunk_rows: int = 65536) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        every = list(self._rows(table).items())
        for start in range(0, len(every), chunk_rows):
            chunk = every[start : start + chunk_rows]
            yield np.array([key for key, _ in chunk], np.int64), np.stack([row for _, row in chunk])

    def close(self) -> None:
        self.closed = True

    def _rows(self, table: str) -> dict[int, np.ndarray]:
        return self.content[table].rows if table in self.content else {}


class CountedDictTier(CountingTier):
    """``CountingTier`` over a dict."""

    def __init__(self, section: Any, *, wide_keys: bool = True) -> None:
        super().__init__(DictTier(section, wide_keys=wide_keys))


class SlowDictTier(SlowTier):
    """``SlowTier`` over a dict; not slow until ``seconds`` is set."""

    def __init__(self, section: Any, *, wide_keys: bool = True) -> None:
        super().__init__(DictTier(section, wide_keys=wide_keys), 0.0)


class FlakyDictTier(FlakyTier):
    """``FlakyTier`` over a dict; does not fail until calls are put into ``fail_on``."""

    def __init__(self, section: Any, *, wide_keys: bool = True) -> None:
        super().__init__(DictTier(section, wide_keys=wide_keys), set())


class PartlyDownTier(DictTier):
    """Takes no writes of the keys in ``down``; ``refused`` counts the calls that it could not do in full."""

    def __init__(self, section: Any, *, wide_keys: bool = True) -> None:
        super().__init__(section, wide_keys=wide_keys)
        self.down: frozenset[int] = frozenset()
        self.refused = 0

    def insert(self, table: str, keys: np.ndarray, rows: np.ndarray) -> int:
        failed = self._failed(keys)
        new = super().insert(table, keys[~failed], rows[~failed])
        self._check(failed)
        return new

    def erase(self, table: str, keys: np.ndarray | None = None) -> int:
        if keys is None:
            return super().erase(table)
        failed = self._failed(keys)
        gone = super().erase(table, keys[~failed])
        self._check(failed)
        return gone

    def _failed(self, keys: np.ndarray) -> np.ndarray:
        down = self.down
        return np.array([int(key) in down for key in keys], bool)

    def _check(self, failed: np.ndarray) -> None:
        if failed.any():
            self.refused += 1
            raise PartialWriteError("a part is down", failed)


class WatchedWritesTier(DictTier):
    """Calls ``before_write`` with the number of each write, and ``after_write`` when it is done."""

    def __init__(self, section: Any, *, wide_keys: bool = True) -> None:
        super().__init__(section, wide_keys=wide_keys)
        self.writes = 0
        self.before_write: Callable[[int], None] = lambda number: None
        self.after_write: Callable[[int], None] = lambda number: None

    def _written(self, write: Callable[[], int]) -> int:
        self.writes += 1
        number = self.writes
        self.before_write(number)
        done = write()
        self.after_write(number)
        return done

    def insert(self, table: str, keys: np.ndarray, rows: np.ndarray) -> int:
        return self._written(lambda: DictTier.insert(self, table, keys, rows))

    def erase(self, table: str, keys: np.ndarray | None = None) -> int:
        return self._written(lambda: DictTier.erase(self, table, keys))


class StuckTableTier(DictTier):
    """Cannot drop the first table of a model."""

    def erase(self, table: str, keys: np.ndarray | None = None) -> int:
        if table.endswith("0"):
            raise TierError(f"{table}: stuck")
        return super().erase(table, keys)


class HeldTier(DictTier):
    """Answers its first fetch, then waits for the test before it returns."""

    def __init__(self, section: Any, *, wide_keys: bool = True) -> None:
        super().__init__(section, wide_keys=wide_keys)
        self.fetched, self.go_on = threading.Event(), threading.Event()

    def fetch(self, *args: Any, **options: Any) -> Any:
        answer = super().fetch(*args, **options)
        if not self.fetched.is_set():
            self.fetched.set()
            assert self.go_on.wait(HANG_SECONDS)
        return answer


class HeldEraseTier(DictTier):
    """Waits for the test before it erases keys."""

    def __init__(self, section: Any, *, wide_keys: bool = True) -> None:
        super().__init__(section, wide_keys=wide_keys)
        self.erasing, self.go_on = threading.Event(), threading.Event()

    def erase(self, table: str, keys: np.ndarray | None = None) -> int:
        self.erasing.set()
        assert self.go_on.wait(HANG_SECONDS)
        return super().erase(table, keys)


class CrowdTier(DictTier):
    """Counts who is in ``fetch`` and lets nobody go before the test does."""

    def __init__(self, section: Any, *, wide_keys: bool = True) -> None:
        super().__init__(section, wide_keys=wide_keys)
        self.inside: set[str] = set()
        self.changed, self.go_on = threading.Condition(), threading.Event()

    def fetch(self, *args: Any, **options: Any) -> Any:
        with self.changed:
            self.inside.add(threading.current_thread().name)
            self.changed.notify_all()
        assert self.go_on.wait(HANG_SECONDS)
        return super().fetch(*args, **options)


class GateTier(CountingTier):
    """Counts calls, and lets a fetch return only while the gate is open, or one for each ``let_one_go``.

    Attributes:
        inside: fetches that have read their rows and wait.   asked: the keys of each fetch, sorted, in order.
        problem: raised by the next fetch that returns, once.
    """

    def __init__(self, section: Any, *, wide_keys: bool = True) -> None:
        super().__init__(DictTier(section, wide_keys=wide_keys))
        self._changed = threading.Condition()
        self._open, self._passes = True, 0
        self.inside = 0
        self.asked: list[list[int]] = []
        self.problem: BaseException | None = None

    def shut(self) -> None:
        """Hold the fetches that come."""
        self._open = False

    def open(self) -> None:
        """Let all go."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def let_one_go(self) -> None:
        """Let one fetch return, whichever."""
        with self._changed:
            self._passes += 1
            self._changed.notify()

    def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> Fetched:
        answer = super().fetch(table, keys, rows, deadline=deadline)
        self.asked.append(sorted(keys.tolist()))
        with self._changed:
            self.inside += 1
            assert self._changed.wait_for(lambda: self._open or self._passes > 0, HANG_SECONDS)
            self.inside -= 1
            if not self._open:
                self._passes -= 1
            problem, self.problem = self.problem, None
        if problem is not None:
            raise problem
        return answer


class FaultyTier(WrapperTier):
    """A dict that fails, is late, or is out of order in part, as ``mode`` says; and a journal that several tiers share.

    Attributes:
        mode: ``""``, ``raises`` (TierError), ``late`` (time is over behind the first half), ``partial`` (keys of one parity
            fail). Writes fail with ``raises`` only.
        journal: (name, call) of each write.   name: of this tier there.
    """

    def __init__(self, section: Any, *, wide_keys: bool = True) -> None:
        super().__init__(DictTier(section, wide_keys=wide_keys))
        self.mode = ""
        self.journal: list[tuple[str, str]] = []
        self.name = ""

    def before(self, call: str, keys: int) -> None:
        if self.mode == "raises":
            raise TierError(f"{call}: failed on purpose")
        if call in ("insert", "erase"):
            self.journal.append((self.name, call))

    def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> Fetched:
        answer = super().fetch(table, keys, rows, deadline=deadline)
        if self.mode == "late":
            asked = len(keys) // 2
            answer.found[asked:] = False
            return Fetched(answer.found, asked)
        if self.mode == "partial":
            failed = keys % 2 == 1
            return Fetched(answer.found & ~failed, len(keys), failed)
        return answer


class LateTier(DictTier):
    """Reads at once, and returns ``seconds`` later: what it returns may have been overwritten meanwhile."""

    seconds = 0.0

    def fetch(self, *args: Any, **options: Any) -> Any:
        answer = super().fetch(*args, **options)
        time.sleep(self.seconds)
        return answer


class NoisyTier(FlakyTier):
    """Opens, and takes no rows. Remembers every tier that was opened."""

    opened: ClassVar[list[DictTier]] = []

    def __init__(self, section: Any, *, wide_keys: bool = True) -> None:
        self.opened.append(DictTier(section, wide_keys=wide_keys))
        super().__init__(self.opened[-1], {"insert"})


class WrongTier(DictTier):
    """Gives whatever answer the test sets."""

    answer: Any = None

    def fetch(self, *args: Any, **options: Any) -> Any:
        return self.answer

    def contains(self, table: str, keys: np.ndarray) -> Any:
        return self.answer
