"""Whole models by message: switch to a version that a manifest names, or load the files of the one in force again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hps_numba.errors import ClosedError, TierError
from hps_numba.updates._backlog import Item
from hps_numba.updates._manifests import Switches, read_manifest
from hps_numba.updates._recovery import Reload
from hps_numba.updates._source_counts import SourceCounts
from hps_numba.updates._update import Message
from hps_numba.updates._wire.messages import Skip

if TYPE_CHECKING:
    from hps_numba.server.update_targets import UpdateTargets

__all__ = ["ModelChanges"]

log = logging.getLogger(__name__)
_TRIES = 10  # of files that cannot be loaded


class ModelChanges:
    """Changes of whole models that one source asks for.

    Args:
        name: of the source.   sleep: waits after so many failures in a row.
        check_open: called with each failure; raises if there will be no further attempt.

    Thread safety: one thread.
    """

    def __init__(
        self,
        name: str,
        targets: UpdateTargets,
        counts: SourceCounts,
        sleep: Callable[[int], None],
        check_open: Callable[[BaseException], None],
    ) -> None:
        self._name, self._targets, self._counts = name, targets, counts
        self._sleep, self._check_open = sleep, check_open
        self._switches = Switches()

    def split(self, tag: str, items: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
        """``Switches.split``: of the updates of a table, those that count for the version in force, and others."""
        return self._switches.split(tag, items)

    def take(self, message: Message) -> None:
        """Switch to the version of a model that a message names; all updates before it are applied, and none after it.

        One whose files cannot be loaded, or that a function of the user's refuses, is tried some times and then passed over:
        the version in force stays. A tier that fails is waited for.
        """
        counts, failures = self._counts.of(message.table), 0
        try:
            manifest = read_manifest(message)
            while True:
                try:
                    reason = self._targets.take(message.table, manifest)
                    break
                except BaseException as problem:
                    self._check_open(problem)
                    failures += 1
                    counts.retries += 1
                    self._counts.add_problem(f"{message.table}: version {manifest.version} cannot be taken", problem)
                    if failures >= _TRIES and not isinstance(problem, TierError):
                        self._targets.passed_over(manifest)
                        raise Skip("version", f"expected version {manifest.version} to be loaded, got {problem}") from problem
                    self._sleep(failures)
            if reason is not None:
                raise Skip(reason, f"expected a version that can be taken, got {manifest.to_dict()}")
            self._switches.add(manifest, message.position)
        except Skip as skip:
            self._counts.add_skip(message, skip, counts)
        counts.handled += 1
        counts.positions[message.position.partition] = message.position.offset

    def reload(self, reload: Reload) -> None:
        """Load the files of the version in force of each model again, unless they cannot be."""
        try:
            models = self._targets.models_of({lost.table for lost in reload.lost})
        except ClosedError as problem:
            self._check_open(problem)
            raise
        kept = [model for model in models if not self._reload(model)]
        self._counts.reloads += not kept
        reload.done.put(None)

    def _reload(self, model: str) -> bool:
        """Whether it worked."""
        failures = 0
        while True:
            try:
                self._targets.reload(model)
                log.warning("%s: model %s: its files were loaded again; now what the bus has is applied", self._name, model)
                return True
            except BaseException as problem:
                self._check_open(problem)
                failures += 1
                self._counts.add_problem(f"model {model}: its files cannot be loaded again", problem)
                if failures >= _TRIES and not isinstance(problem, TierError):
                    log.error("%s: model %s keeps rows that may be old: load the last snapshot: %s", self._name, model, problem)
                    return False
                self._sleep(failures)
