"""An ordered stack of slower tiers that looks like one.

A row is in a slower tier before a faster one may drop it: writes go from the slowest to the fastest tier, reads the other
way, and each tier is asked only for keys that the ones before it lack.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hps_numba import plugins
from hps_numba.config import ServerConfig, VolatileDatabaseConfig, checked_options
from hps_numba.config.messages import dotted, show
from hps_numba.device.host_memory import HostAllocator
from hps_numba.errors import ClosedError, ConfigError, HpsError, TierError, TierUnavailable
from hps_numba.runtime.blocks import Blocks
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.hugectr_log import TRACE
from hps_numba.storage.tier_counts import TierCounts, TierFetches
from hps_numba.storage.tiers._checked import CheckedTier, TierDefect
from hps_numba.storage.tiers._host_tables import HostTablesTier
from hps_numba.storage.tiers._tier import Fetched, PartialWriteError, Tier

__all__ = ["StackAnswer", "StackWrite", "TierStack", "open_tiers"]

log = logging.getLogger(__name__)
_TIERS = "hps_numba.storage.tiers"
_SHOWN = (
    "initialize_after_startup",
    "initial_cache_rate",
    "cache_missed_embeddings",
    "read_only",
    "overflow_policy",
    "overflow_margin",
    "num_partitions",
    "max_batch_size",
)  # keys that the line about an opened tier has, where the tier has them


def open_tiers(config: ServerConfig, allocator: HostAllocator, *, allow_code: bool) -> tuple[HostTablesTier | None, TierStack]:
    """The first tier, if it keeps rows where this process reads them as they are, and all other tiers of a config.

    Raises:
        TierUnavailable: a tier does not exist, is not installed, cannot be reached, or raises another error when it is opened.
        ConfigError: what the config names is not a tier, or an option of it is not valid. In any case, no tier stays open.
    """
    host: HostTablesTier | None = None
    slower: list[Tier] = []
    with ExitStack() as undo:
        for place, given in config.tier_sections():
            kind = _tier_class(dotted(place), given.type, config.folder, allow_code)
            section = checked_options(given, kind.Options, place, strict=config.strict)
            with plugins.typed_errors(f"{dotted(place)}.type: {given.type!r}: cannot open", TierUnavailable, HpsError):
                if issubclass(kind, HostTablesTier) and given is config.volatile_db:
                    assert isinstance(section, VolatileDatabaseConfig)
                    tier: Tier = kind(section, wide_keys=config.supportlonglong, allocator=allocator)
                else:
                    tier = kind(section, wide_keys=config.supportlonglong)
            undo.callback(CheckedTier(tier).close)
            _log_opened(dotted(place), tier)
            if isinstance(tier, HostTablesTier) and given is config.volatile_db:
                host = tier
            else:
                slower.append(tier)
        undo.pop_all()
    return host, TierStack(slower)


def _log_opened(place: str, tier: Tier) -> None:
    if not log.isEnabledFor(logging.INFO):
        return
    values = {key: getattr(tier.section, key) for key in _SHOWN if hasattr(tier.section, key)}
    if values.get("overflow_margin") == VolatileDatabaseConfig.model_fields["overflow_margin"].default:  # there is no bound
        values = {key: value for key, value in values.items() if not key.startswith("overflow_")}
    log.info("%s: opened %s: %s", place, tier.section.type, ", ".join(f"{key} {show(value)}" for key, value in values.items()))


def _tier_class(place: str, name: str, folder: Path | None, allow_code: bool) -> type[Tier]:
    kind = plugins.load(_TIERS, name, allow_code=allow_code, folder=folder, error=TierUnavailable)
    if not (isinstance(kind, type) and issubclass(kind, Tier)):
        raise ConfigError(f"{place}.type: expected a subclass of Tier, got {name!r}, which is {kind!r}")
    if missing := sorted(getattr(kind, "__abstractmethods__", ())):
        raise ConfigError(f"{place}.type: expected a tier with {', '.join(missing)}, got {name!r}, which lacks them")
    return kind


class StackAnswer(NamedTuple):
    """What the stack found.

    Attributes:
        found: bool ``[n]``, which keys some tier had.
        unsure: bool ``[n]``, which keys were not found while a tier was late or failed: they may exist.
        errors: calls that failed.
    """

    found: np.ndarray
    unsure: np.ndarray
    errors: int


class StackWrite(NamedTuple):
    """What became of a write.

    Attributes:
        unwritten: bool ``[n]``, which keys a tier could not take: no faster one was asked to.   problem: why, or None.
    """

    unwritten: np.ndarray
    problem: TierError | None


class _Calls(NamedTuple):
    """The tiers of a stack, and what each lookup needs of them, kept.

    Attributes:
        checked: the tiers with their answers checked.
        names: in metrics: by type, with the number in the stack where two have one type.
        parallel_fetches: the least of all.
    """

    tiers: Sequence[Tier]
    checked: Sequence[CheckedTier]
    names: Sequence[str]
    parallel_fetches: int


def _names_of(tiers: Sequence[CheckedTier]) -> list[str]:
    types = [str(getattr(tier.section, "type", tier.name)).rpartition(":")[2] for tier in tiers]
    return [f"{kind}-{number}" if types.count(kind) > 1 else kind for number, kind in enumerate(types)]


class TierStack:
    """Slower tiers, fastest first.

    Active reads are counted, and ``close`` waits for them, so that a lookup gets its rows. It does not wait for writes: what
    happens to a write during ``close`` is up to the tier.

    Thread safety: every method.
    """

    #: seconds that ``close`` waits for active reads
    GRACE_SECONDS = 30.0

    def __init__(self, tiers: Iterable[Tier]) -> None:
        self.tiers: Sequence[Tier] = tuple(tiers)
        self._known: _Calls | None = None
        self._fetches: dict[tuple[str, str], TierFetches] = {}
        self._closed = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Forget the reads of threads that a forked child does not have."""
        self._reads = Blocks()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the slower tiers are closed")

    @property
    def checked(self) -> Sequence[CheckedTier]:
        """The tiers with their answers checked, fastest first: what a server calls."""
        return self._calls.checked

    @property
    def parallel_fetches(self) -> int:
        """Fetches at a time that every tier answers faster than one after the other."""
        return self._calls.parallel_fetches

    @property
    def _calls(self) -> _Calls:
        known = self._known
        if known is None or known.tiers is not self.tiers:
            checked = [CheckedTier(tier) for tier in self.tiers]
            parallel_fetches = min((tier.parallel_fetches for tier in checked), default=1)
            known = self._known = _Calls(self.tiers, checked, _names_of(checked), parallel_fetches)
        return known

    @property
    def writable(self) -> Sequence[CheckedTier]:
        """The tiers that can be written, fastest first, with their answers checked."""
        return [tier for tier in self.checked if not tier.read_only]

    @property
    def may_lack_rows(self) -> bool:
        """Some rows of a sparse model may be in no tier that can be written though there is one: it was not filled with all."""
        sections = [tier.section for tier in self.writable]
        return bool(sections) and not any(
            section.initialize_after_startup and getattr(section, "initial_cache_rate", 1.0) >= 1 for section in sections
        )

    def __bool__(self) -> bool:
        return bool(self.tiers)

    def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> StackAnswer:
        """Copy the rows of those keys that some tier has to ``rows``; what is in the others is undefined.

        A tier that fails is skipped: its keys are looked for in the next one and, if no tier has them, reported as unsure.

        Raises:
            TierError: a tier returned something that is not an answer, or raised something else than a TierError.
            ClosedError: after ``close``.
        """
        with self._reads.block():
            self._check_open()
            return self._fetch(table, keys, rows, deadline)

    def _fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, deadline: float | None) -> StackAnswer:
        n, calls = len(keys), self._calls
        found, unsure = np.zeros(n, bool), np.zeros(n, bool)
        errors, left = 0, n
        for tier, name in zip(calls.checked, calls.names, strict=True):
            if not left:
                break
            places = None if left == n else np.flatnonzero(~found)  # None: all
            some = keys if places is None else keys[places]
            into = rows if places is None else np.empty((left, rows.shape[1]), np.float32)
            try:
                answer, failed = self._fetch_from(tier, name, table, some, into, deadline)
            except TierDefect:
                raise
            except TierError as problem:
                log.debug("%s: %s: fetch failed: %s", table, name, problem)
                errors += 1
                unsure[... if places is None else places] = True
                continue
            if places is None:
                found[:] = answer.found
            else:
                rows[places[answer.found]] = into[answer.found]
                found[places] = answer.found
            if answer.asked < left or failed:
                _note_unsure(unsure, places, answer)
            errors += failed
            left = n - int(np.count_nonzero(found))
        return StackAnswer(found, unsure & ~found, errors)

    def _fetch_from(
        self, tier: CheckedTier, name: str, table: str, keys: np.ndarray, rows: np.ndarray, deadline: float | None
    ) -> tuple[Fetched, bool]:
        """``Tier.fetch`` of one tier, counted, and whether it failed in part."""
        start = time.perf_counter_ns()
        found, failed = 0, True
        try:
            answer = tier.fetch(table, keys, rows, deadline=deadline)
            found, failed = int(np.count_nonzero(answer.found)), answer.failed is not None and bool(answer.failed.any())
        finally:
            taken = time.perf_counter_ns() - start
            self._fetches_of(table, name).add(len(keys), found, failed=failed, nanoseconds=taken)
        if log.isEnabledFor(TRACE):
            log.log(TRACE, "%s: %s: %d of %d keys in %.3f ms", table, tier.name, found, len(keys), taken / 1e6)
        return answer, failed

    def _fetches_of(self, table: str, tier: str) -> TierFetches:
        known = self._fetches.get((table, tier))
        return self._fetches.setdefault((table, tier), TierFetches()) if known is None else known

    def counts(self, table: str) -> dict[str, TierCounts]:
        """What fetches from each tier, by name, did for a table since the server started."""
        return {tier: self._fetches_of(table, tier).read() for tier in self._calls.names}

    def forget(self, table: str) -> None:
        """Drop the counts of a table that is served no more."""
        for tier in self._calls.names:
            self._fetches.pop((table, tier), None)

    def contains(self, table: str, keys: np.ndarray) -> np.ndarray:
        """bool ``[n]``: which keys some tier has."""
        found = np.zeros(len(keys), bool)
        with self._reads.block():
            self._check_open()
            for tier in self.checked:
                found |= tier.contains(table, keys)
        return found

    def insert(self, table: str, keys: np.ndarray, rows: np.ndarray) -> None:
        """Write rows to every tier that can be written, slowest first.

        Raises:
            TierError: a tier failed; faster ones were not written.
        """
        self._write(lambda tier: tier.insert(table, keys, rows))

    def update(self, table: str, keys: np.ndarray, rows: np.ndarray) -> None:
        """Overwrite the rows of those keys that a tier has, in each tier that can be written."""

        def update_one(tier: Tier) -> None:
            present = tier.contains(table, keys)
            tier.insert(table, keys[present], rows[present])

        self._write(update_one)

    def apply(self, table: str, keys: np.ndarray, rows: np.ndarray, erased: np.ndarray, numbers: Container[int]) -> StackWrite:
        """Write rows, and remove other keys, in the tiers of these numbers, slowest first.

        A tier that fails costs its own keys only.

        Args:
            keys: int64 ``[n]``.   rows: float32 ``[n, dim]``.   erased: int64 ``[m]``.

        Returns:
            Of ``keys`` and then of ``erased``, ``n + m`` flags.

        Raises:
            TierError: a tier broke its contract; faster ones were not written.
        """
        self._check_open()
        unwritten, problem = np.zeros(len(keys) + len(erased), bool), None
        for number, tier in reversed([*enumerate(self.checked)]):
            if number in numbers:
                problem = _apply_to(tier, table, keys, rows, erased, unwritten) or problem
        return StackWrite(unwritten, problem)

    def erase(self, table: str, keys: np.ndarray | None = None) -> None:
        """Remove keys, or with None the whole table, from every tier that can be written.

        Raises:
            TierError: a tier failed. Faster ones keep the keys; a whole table is still dropped from all others.
        """
        if keys is not None:
            self._write(lambda tier: tier.erase(table, keys))
            return
        self._check_open()
        with ExitStack() as erasing:
            for tier in self.writable:
                erasing.callback(tier.erase, table)

    def _write(self, change: Callable[[Tier], object]) -> None:
        self._check_open()
        for tier in reversed(self.writable):
            change(tier)

    def close(self) -> None:
        """Refuse later calls, wait for active reads, then close every tier, also those after one that fails to close."""
        self._closed = True  # a read is counted before it looks at this
        if not self._reads.wait(self.GRACE_SECONDS):
            log.warning("slower tiers: closed during %d reads that took over %g s", len(self._reads), self.GRACE_SECONDS)
        with ExitStack() as closing:
            for tier in reversed(self.checked):
                closing.callback(tier.close)


def _note_unsure(unsure: np.ndarray, places: np.ndarray | None, answer: Fetched) -> None:
    """Note keys that a tier did not look for; it was asked for those at ``places``, or for all.   **Writes:** unsure."""
    lost = np.zeros(len(answer.found), bool)
    lost[answer.asked :] = True
    if answer.failed is not None:
        lost |= answer.failed
    unsure[... if places is None else places] |= lost


def _apply_to(
    tier: CheckedTier, table: str, keys: np.ndarray, rows: np.ndarray, erased: np.ndarray, unwritten: np.ndarray
) -> TierError | None:
    """``TierStack.apply`` to one tier, of what slower ones took; why it failed.   **Writes:** unwritten."""

    def insert(some: np.ndarray, places: Any) -> None:
        tier.insert(table, some, rows[places])

    def erase(some: np.ndarray, _: Any) -> None:
        tier.erase(table, some)

    n = len(keys)
    problems = _attempt(insert, keys, unwritten[:n]), _attempt(erase, erased, unwritten[n:])
    return problems[0] or problems[1]


def _attempt(write: Callable[[np.ndarray, Any], None], keys: np.ndarray, unwritten: np.ndarray) -> TierError | None:
    """``write`` the keys that are not unwritten yet, which it gets with their places; why some are afterwards.

    **Writes:** unwritten.
    """
    places: Any = np.flatnonzero(~unwritten) if unwritten.any() else slice(None)
    some = keys[places]
    if not len(some):
        return None
    try:
        write(some, places)
    except TierDefect:
        raise
    except PartialWriteError as problem:
        unwritten[places] = problem.failed
        return problem
    except TierError as problem:
        unwritten[places] = True
        return problem
    return None
