"""One replacement of all rows of a model, by the steps that keep every lookup in one version.

1. *Prepare*, which may stop or fail and then leaves nothing behind: load the new rows into stores aside, read every file to its
   end, make stand-ins for the caches (``cache.version_switch``).
2. *Slower tiers* get the new rows. From here on the replacement goes on to its end, unless a tier fails.
3. *The turn*, some microseconds a table: lookups that begin after it see the new version, those before it the old one. Nothing
   in it waits for a lookup.
4. *Settle*: wait for the lookups of the old version, let the caches follow and fill them with new rows, end the stand-ins,
   release the old rows. A problem in one step is logged and does not keep the others from being done.
5. Slower tiers lose the rows that the new version lacks.

Replays of captured graphs read the caches themselves. Those that are announced (``server.replays``) are held back from before
the turn until the caches follow.

*Other processes* may share host memory. None loads tables from step 2 to the end. The turn is one turn of the segment's
writers: inside it, tables are switched and marked with the new files, then all marks are made to say that the model was
replaced, so that a process which starts keeps the new rows. A process that is killed between two tables leaves no mark that
says so: the next one that starts loads all of its own files, and no mixture of versions stays.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np

from hps_numba.cache.parts import CacheParts
from hps_numba.cache.version_switch import VersionSwitch
from hps_numba.errors import HpsError
from hps_numba.server.fused_tables import FusedTables
from hps_numba.server.model_jobs import Check, go_on
from hps_numba.server.model_versions import ModelVersion, ModelVersions
from hps_numba.server.replays import Replays
from hps_numba.server.table import ServedTable
from hps_numba.server.table_loading import Progress, TableLoading, stoppable
from hps_numba.storage.host.content import TableContent
from hps_numba.storage.host.memory import Mark
from hps_numba.storage.host.store import HostStore
from hps_numba.storage.tiers._tier import Tier

__all__ = ["Replacement", "new_version"]

log = logging.getLogger(__name__)
_GRACE_SECONDS = 1.0  # for lookups that read old rows in host memory; later they are released by the next write


def new_version(table: ServedTable, loading: TableLoading, path: str, on_rows: Progress, *, fill: bool) -> HostStore | None:
    """A store with the rows of a sparse model; an empty one where lookups fill host memory from slower tiers.

    Raises:
        ModelFileError: the sparse model cannot be loaded.   CapacityError: no memory for it.
    """
    if table.store is None:
        return None
    return loading.load_store(table.spec, table.store, path, on_rows) if fill else table.store.sibling()


class NewerRows(NamedTuple):
    """What is newer than the files: int64 keys ``[n]``, their float32 rows ``[n, dim]``, and int64 deleted keys ``[m]``."""

    keys: np.ndarray
    rows: np.ndarray
    erased: np.ndarray

    def write(self, insert: Callable[[np.ndarray, np.ndarray], object], erase: Callable[[np.ndarray], object]) -> None:
        """Bring them to a tier that has the rows of the files."""
        if len(self.keys):
            insert(self.keys, self.rows)
        if len(self.erased):
            erase(self.erased)


class Replacement:
    """Replaces the rows of all tables of a model, once.

    Args:
        tables: of the model.   tiers: the slower tiers that can be written, fastest first.   groups: tables looked up together.
        no_loading: gives a block in which no other process loads tables.
        fill: host memory gets the rows of the files.   validate: read the files to their ends although host memory does not.
        versions: of the model; told of the new one.

    Thread safety: one thread, while no other replacement of the model is at work; lookups go on.
    """

    def __init__(
        self,
        tables: Sequence[ServedTable],
        tiers: Sequence[Tier],
        loading: TableLoading,
        switch: VersionSwitch,
        groups: FusedTables,
        replays: Replays,
        no_loading: Callable[[Check], AbstractContextManager[None]],
        *,
        fill: bool,
        validate: bool,
        versions: ModelVersions,
    ) -> None:
        self._tables, self._tiers, self._loading = tables, tiers, loading
        self._switch, self._groups, self._replays, self._no_loading = switch, groups, replays, no_loading
        self._fill, self._validate = fill, validate
        self._versions = versions
        self._stores: list[HostStore | None] = []
        self._stand_ins: list[dict[int, CacheParts]] = []
        self._turned = False

    def run(self, new: ModelVersion, on_rows: Progress, check: Check, *, carry: bool = False) -> None:
        """Replace all rows by those of the sparse models of a version.

        Args:
            carry: rows that updates have changed since ``new.since_ms`` are carried over.
            check: raises if the replacement is to stop; called while it can.

        Raises:
            As ``ServedModel.replace``, and as ``check``: the old version stays in every tier then.
        """
        paths = new.sources
        with ExitStack() as ending:
            for table, path in zip(self._tables, paths, strict=True):
                self._prepare(table, path, stoppable(on_rows, check), ending)
            switches = self._versions.prepare(new)
            ending.enter_context(self._no_loading(check))
            for table in self._tables:  # before the turn, which then waits for no write
                ending.enter_context(table.writes.changing())
            carried = [self._newer_rows(table, new) if carry else None for table in self._tables]
            for store, newer in zip(self._stores, carried):
                if store is not None and newer is not None and self._fill:
                    newer.write(store.upsert, store.erase)
            ending.callback(self._release_unused)
            for table, store in zip(self._tables, self._stores, strict=True):
                self._stand_ins.append({} if table.caches is None else table.caches.stand_ins(store))
            ending.callback(self._replays.let_in)
            if self._tiers:  # a block that stays open is to stop this before a tier changes
                self._replays.hold_back(check)
                self._replays.let_in()
            check()
            for tier in reversed(self._tiers):
                for table, path, newer in zip(self._tables, paths, carried, strict=True):
                    self._loading.insert(tier, table.spec, path, on_rows)
                    if newer is not None:
                        newer.write(partial(tier.insert, table.spec.tag), partial(tier.erase, table.spec.tag))
            marks = [
                Mark() if table.store is None or not self._fill else self._loading.mark_of(table.store, path)
                for table, path in zip(self._tables, paths, strict=True)
            ]
            self._announce_graphs()
            self._replays.hold_back(go_on if self._tiers else check)
            with self._alone():
                old = self._turn(marks, partial(self._versions.take, new, switches))
            self._settle(old)
            for table, path, newer in zip(self._tables, paths, carried, strict=True):
                self._loading.drop_stale(self._tiers, table.spec, path, None if newer is None else newer.keys)

    def _newer_rows(self, table: ServedTable, new: ModelVersion) -> NewerRows | None:
        """What updates made of a table since the files of the new version were written; None: they changed nothing."""
        keys = self._versions.newer_keys(table.spec.tag, -1 if new.since_ms is None else new.since_ms)
        if not len(keys):
            return None
        rows, found = table.writes.read(keys)
        return NewerRows(keys[found], rows[found], keys[~found])

    def _announce_graphs(self) -> None:
        """Say once that replays may see both versions, if there are graphs and no replay was ever announced."""
        if not self._replays.announced and any(table.caches is not None and table.caches.has_graphs for table in self._tables):
            self._replays.announced = True
            name = self._tables[0].spec.model
            log.warning(
                "model %s: a CUDA graph has captured lookups: a replay during replace_model may see rows of both versions, "
                "unless it is inside `with server.replaying(%r):`",
                name,
                name,
            )

    def _prepare(self, table: ServedTable, path: str, on_rows: Progress, ending: ExitStack) -> None:
        store = new_version(table, self._loading, path, on_rows, fill=self._fill)
        if store is not None:
            ending.callback(self._end_store, store)
        self._stores.append(store)
        if self._validate:
            self._loading.validate(table.spec, path, on_rows)

    def _end_store(self, store: HostStore) -> None:
        """The rows of a store aside belong to the table now, or to nobody."""
        if self._turned:
            store.hand_over()
        else:
            store.close()

    def _release_unused(self) -> None:
        """Close the stand-ins of a replacement that did not get as far as the turn."""
        if not self._turned:
            for stand_ins in self._stand_ins:
                for stand_in in stand_ins.values():
                    stand_in.close()

    # -- the turn ---------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process writes to a table meanwhile, or sees one of them switched and another not."""
        with ExitStack() as held:
            for store in self._shared:
                held.enter_context(store.write_lock.mutex)  # before the turn, as every writer
            for store in self._shared:
                held.enter_context(store.memory.turn())
            yield

    @property
    def _shared(self) -> list[HostStore]:
        """The stores whose rows other processes see."""
        return [table.store for table in self._tables if table.store is not None and table.store.memory.shared]

    def _note(self, *, replaced: bool) -> None:
        """Let the marks of all tables say whether a process that starts keeps the rows."""
        for store in self._shared:
            store.memory.mark = store.memory.mark._replace(replaced=replaced)

    def _turn(self, marks: Sequence[Mark], take: Callable[[], None]) -> list[TableContent | None]:
        """Let lookups see the new version from now on, and ``take`` it; returns the rows of the old one. All or nothing."""
        every = {address: stand_in for some in self._stand_ins for address, stand_in in some.items()}
        old: list[TableContent | None] = []
        marks_before = [store.memory.mark for store in self._shared]
        with self._switch.turning():
            try:
                self._note(replaced=False)
                for table in self._tables:
                    if table.caches is not None:
                        table.caches.hold()
                self._switch.active = every or None
                for table, store, mark in zip(self._tables, self._stores, marks, strict=True):
                    if table.store is None or store is None:
                        old.append(None)
                        continue
                    old.append(table.store.switch_to(store))
                    table.store.memory.mark = mark
                self._note(replaced=self._fill)
                take()
            except BaseException:
                self._turn_back(old)
                for shared, mark in zip(self._shared, marks_before, strict=True):
                    shared.memory.mark = mark
                raise
            self._turned = True
        return old

    def _turn_back(self, old: Sequence[TableContent | None]) -> None:
        """After a problem in the middle of the turn."""
        for table, content in zip(self._tables, old):
            if table.store is not None and content is not None:
                table.store.switch_back(content)
        self._switch.active = None
        for table in self._tables:
            if table.caches is not None:
                table.caches.let_go()
        for table, content in zip(self._tables, old):
            if table.store is not None and content is not None:
                table.store.wait_for_readers()

    # -- settling ---------------------------------------------------------------------

    def _settle(self, old: Sequence[TableContent | None]) -> None:
        """Let the caches follow, and release what only the old version needed."""
        cached = [
            (table.caches, stand_ins) for table, stand_ins in zip(self._tables, self._stand_ins) if table.caches is not None
        ]
        self._do(self._groups.drain)
        for caches, _ in cached:
            self._do(caches.drain)
        self._do(partial(self._replays.hold_back, stop=True))  # again: during a long wait they are let in
        for caches, _ in cached:
            self._do(caches.follow)
        self._replays.let_in()
        for caches, _ in cached:
            self._do(caches.fill)
        self._switch.active = None
        for caches, stand_ins in cached:
            self._do(partial(caches.end_stand_ins, stand_ins))
        end = time.monotonic() + _GRACE_SECONDS
        for table, content in zip(self._tables, old, strict=True):
            if table.store is not None and content is not None:
                table.store.retire(content, max(0.0, end - time.monotonic()))

    def _do(self, step: Callable[[], object]) -> None:
        try:
            step()
        except HpsError as problem:
            log.error("%s: replacement: %s", self._tables[0].spec.model, problem)
