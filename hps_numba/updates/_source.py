"""What an update source promises: batches of changed rows, each with the position from which the source could go on.

A source is one file in this folder that defines ``PLUGIN``, a subclass of :class:`UpdateSource`; an entry point of the group
``hps_numba.sources``; or a class of the user's own, named in the config as ``module:NAME`` or ``file.py:NAME``. It reads a bus
or a folder and never touches a store: whoever polls it applies the updates, in order, to every tier and cache, and then reports
the position. So a process that dies applies some updates again and loses none (at least once).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from hps_numba.updates._update import Position, Update

if TYPE_CHECKING:
    from hps_numba.config import UpdateSourceConfig

__all__ = ["UpdateSource"]


class UpdateSource(abc.ABC):
    """Where online updates come from.

    Class attributes:
        Options: dataclass or pydantic model of the source's own keys in ``update_source``; None: it has none.

    Thread safety: ``poll`` and ``applied`` from one thread at a time; ``close`` from any.
    """

    Options: ClassVar[type | None] = None

    def __init__(self, section: UpdateSourceConfig) -> None:
        """Open the source that ``update_source`` describes.

        Raises:
            TierUnavailable: it cannot be reached, or what it needs is not installed.
        """
        self.section = section

    @property
    def options(self) -> Any:
        """The instance of ``Options`` that the config describes."""
        return self.section.options

    @abc.abstractmethod
    def poll(self, seconds: float) -> Sequence[Update]:
        """The next updates, at most ``section.max_batch_size`` rows of a table together; empty if none come in ``seconds``.

        Within a partition positions ascend, and nothing is left out but what cannot be read.

        Raises:
            TierError: the source failed for now; the next call tries again.
        """

    @abc.abstractmethod
    def applied(self, position: Position) -> None:
        """All updates of a partition up to ``position`` are in every tier: after a restart, continue after it.

        A source may commit this lazily, but no later than in ``close``.
        """

    def close(self) -> None:
        """Commit what was applied and release everything; a second call does nothing."""
