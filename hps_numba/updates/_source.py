"""What an update source promises: changed rows in order, each with the position from which the source could go on.

A source is one file in this folder that defines ``PLUGIN``, a subclass of :class:`UpdateSource`; an entry point of the group
``hps_numba.sources``; or a class of the user's own, named in the config as ``module:NAME`` or ``file.py:NAME``. It reads a bus
or a folder and never touches a store: a consumer (``updates._consumer``) polls it, applies the updates in order to every tier
and cache, and then commits the position. So a process that dies applies some updates again and loses none (at least once).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from hps_numba.updates._consumer import Consumer
from hps_numba.updates._producer import UpdateProducer
from hps_numba.updates._update import Lost, Message, Position, Update

if TYPE_CHECKING:
    from hps_numba.config import UpdateSourceConfig
    from hps_numba.server.update_targets import UpdateTargets

__all__ = ["UpdateSource"]


class UpdateSource(abc.ABC):
    """Where online updates come from.

    Class attributes:
        Options: dataclass or pydantic model of the source's own keys in its section of the config; None: it has none.
        Producer: what publishes to the bus that it reads; None: nothing here does.

    Attributes:
        section: of the config, with the keys of every source, such as ``poll_timeout_ms`` and ``max_batch_size``.
        resume: begin after what was committed before; else with the oldest update that the bus has.
        key_bytes: of a key of the server, 8 or 4.
        starts_over: it has ``start_over``, and its updates are those of this server and no other one.
        has_more: the bus may have more than the last ``poll`` has returned. If it has not, what comes next is collected for
            ``batch_interval_ms`` before the next call. By default that is not known, and ``poll`` is called again at once.
        drained: to be called inside ``poll``, ``keep_alive`` or ``commit`` before partitions go to another process, as an older
            row must not be written after that one has written a newer: waits so many seconds until everything that ``poll``
            has returned is applied, and commits it; what is not applied by then is dropped, and the answer is False.

    Thread safety: all methods from one thread at a time, but ``wake``.
    """

    Options: ClassVar[type | None] = None
    Producer: ClassVar[type[UpdateProducer] | None] = None

    def __init__(self, section: UpdateSourceConfig, *, resume: bool = True, key_bytes: int = 8) -> None:
        """Open the source that ``section`` describes. A bus that does not answer now is no error: ``poll`` tries again.

        Raises:
            TierUnavailable: what it needs is not installed, or it can never be reached.
        """
        self.drained: Callable[[float], bool] = lambda seconds: True
        self.section = section
        self.resume = resume
        self.key_bytes = key_bytes
        self.starts_over = False
        self.has_more = True

    @classmethod
    def consumer(cls, section: UpdateSourceConfig, targets: UpdateTargets, name: str) -> Consumer:
        """Open the source, and what applies its updates to the tables of a server, called ``name``.

        Raises:
            As the class.
        """
        resume = section.start == "committed" or (section.start == "auto" and targets.outlive_the_process)
        return Consumer(cls(section, resume=resume, key_bytes=targets.key_bytes), targets, name)

    @classmethod
    def from_options(cls, *, resume: bool = True, key_bytes: int = 8, **keys: Any) -> Self:
        """Open a source without a config file: ``keys`` are what its section would hold beside ``type``.

        Raises:
            ConfigError: a key is unknown, or its value is not valid.
        """
        from hps_numba.config import checked_options, source_config

        section = source_config({"type": f"{cls.__module__}:{cls.__name__}", **keys})
        return cls(checked_options(section, cls.Options, (), strict=True), resume=resume, key_bytes=key_bytes)

    @property
    def options(self) -> Any:
        """The instance of ``Options`` that the config describes."""
        return self.section.options

    # -- to be written ---------------------------------------------------------------------

    @abc.abstractmethod
    def poll(self, seconds: float) -> Sequence[Update | Message | Lost]:
        """What comes next; waits for ``seconds`` if there is nothing, and then returns nothing.

        Updates of a partition come in order and their offsets ascend; nothing is left out: what cannot be read is a Message as
        it is, and what the bus has dropped is a Lost before what follows it. Some thousand rows at a time are enough.

        Raises:
            TierError: the source failed for now; the next call tries again, and leaves nothing out.
        """

    @abc.abstractmethod
    def commit(self, positions: Sequence[Position]) -> None:
        """All updates of some partitions up to these positions are in every tier: after a restart, begin after them.

        When it returns, the bus knows. Each partition is there at most once.

        Raises:
            TierError: it failed for now; the same or later positions are committed again.
        """

    # -- may be overridden ---------------------------------------------------------------------

    def start_over(self, lost: Sequence[Lost]) -> None:
        """Begin with the oldest update of every partition, whatever was read before: the files of the models are loaded again.

        Called if ``starts_over``, when ``poll`` has returned some Lost and everything else that it returned was applied or
        dropped. A source that resumes tells the bus of the new positions, but for the partitions of ``lost``, so that a process
        that ends before ``losses_handled`` is followed by one that gets a Lost again. Later commits may be of earlier positions
        than those before. A second call does the same.

        Raises:
            TierError: it failed for now.
        """
        raise NotImplementedError(f"{type(self).__name__}.start_over: expected a method, as starts_over is true")

    def losses_handled(self) -> None:
        """What was lost so far was counted and, if that is wanted, made up for: it need not be said after a restart.

        Raises:
            TierError: it failed for now.
        """

    def keep_alive(self) -> None:
        """Called every second or so instead of ``poll`` while too much waits to be applied, as a tier is slow or out of order.

        Raises:
            TierError: the source failed for now.
        """

    def lag(self) -> Mapping[str, int] | int | None:
        """Messages on the bus that ``poll`` has not returned yet, together or by table; None if that is not known.

        Called every second or so, more often while it is not known; it must not wait for long.
        """
        return None

    def wake(self) -> None:
        """End a ``poll`` that waits, so that the server can be closed; called from any thread."""

    def close(self) -> None:
        """Release everything; a second call does nothing. Nothing is committed: that was done before."""
