"""What becomes of rows that host memory evicts to keep its bound: they are demoted to slower tiers, and callbacks are told.

Problem: a row in host memory that no slower tier has would be lost, though nobody erased it: it came from a sparse model with
which the slower tiers were not filled. Choice: such rows are written to every slower tier that can be written, before host
memory gives them up, inside the write that evicts them: no later write of the key can be overtaken. Turned down: to write them
in the background, as their slots would have to wait; and an option, as rows of which the slowest tier has every one cost
nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from hps_numba.config import TableSpec
from hps_numba.errors import HpsError
from hps_numba.storage.tier_stack import TierStack

__all__ = ["Evictions", "OnEvict"]

log = logging.getLogger(__name__)
OnEvict = Callable[[np.ndarray], object]
"""Told int64 keys ``[n]`` whose rows host memory has evicted."""


class Evictions:
    """The ``storage.host.bound.EvictionWatcher`` of one table.

    Attributes:
        demotes: host memory may have rows that no slower tier has.

    Thread safety: ``leaving`` and ``left`` by the writer of the table; other methods from any thread.
    """

    #: seconds for which nothing is demoted, and nothing evicted, after a slower tier failed
    PAUSE_SECONDS = 1.0

    def __init__(self, spec: TableSpec, tiers: TierStack) -> None:
        self.demotes = False
        self._spec = spec
        self._tiers = tiers
        self._callbacks: tuple[OnEvict, ...] = ()
        self._paused_until = 0.0

    def add(self, callback: OnEvict) -> Callable[[], None]:
        """Tell ``callback`` of evicted keys, until the function that this returns is called."""
        own: OnEvict = partial(callback)  # the same callback may be added twice
        self._callbacks = (*self._callbacks, own)
        return partial(self._remove, own)

    def _remove(self, own: OnEvict) -> None:
        self._callbacks = tuple(other for other in self._callbacks if other is not own)

    @property
    def watches(self) -> bool:
        """Whether evicted rows matter to anybody."""
        return self.demotes or bool(self._callbacks)

    def leaving(self, keys: np.ndarray, rows: np.ndarray) -> bool:
        """Write the rows that no slower tier has to all that can be written; false if they have to stay in host memory."""
        if not self.demotes:
            return True
        if time.monotonic() < self._paused_until:
            return False
        tag = self._spec.tag
        try:
            lacking = ~self._tiers.contains(tag, keys)
            if lacking.any():
                self._tiers.insert(tag, keys[lacking], rows[lacking])
        except HpsError as problem:
            self._paused_until = time.monotonic() + self.PAUSE_SECONDS
            log.warning("%s: host memory is over its bound: its rows cannot be demoted: %s", tag, problem)
            return False
        return True

    def left(self, keys: np.ndarray) -> None:
        """Tell the callbacks; what they raise is logged."""
        for callback in self._callbacks:
            try:
                callback(keys.copy())
            except BaseException as problem:
                if isinstance(problem, KeyboardInterrupt):
                    raise
                log.error("%s: on_evict: a callback failed: %s: %s", self._spec.tag, type(problem).__name__, problem)
