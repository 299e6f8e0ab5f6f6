"""What a consumer needs of a source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from hps_numba.updates._backlog import Item
from hps_numba.updates._update import Lost, Position

if TYPE_CHECKING:
    from hps_numba.config import UpdateSourceConfig

__all__ = ["Polled"]


class Polled(Protocol):
    section: UpdateSourceConfig
    resume: bool
    starts_over: bool
    has_more: bool
    drained: Callable[[float], bool]

    def poll(self, seconds: float) -> Sequence[Item | Lost]:
        """What comes next."""

    def commit(self, positions: Sequence[Position]) -> None:
        """Begin after these the next time."""

    def start_over(self, lost: Sequence[Lost]) -> None:
        """Begin with the oldest."""

    def losses_handled(self) -> None:
        """Speak of them no more."""

    def keep_alive(self) -> None:
        """Nothing is polled for a while."""

    def lag(self) -> Mapping[str, int] | int | None:
        """Messages not read yet."""

    def wake(self) -> None:
        """End a poll."""

    def close(self) -> None:
        """Release everything."""
