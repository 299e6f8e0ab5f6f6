"""Background refreshes: the timer of a server, for ``refresh_delay`` and ``refresh_interval`` (spec 1.3, 6.8)."""

from __future__ import annotations

from hps_numba.timer import Timer

__all__ = ["RefreshTimer"]


class RefreshTimer(Timer):
    """The timer that refreshes the models of a server, by name.   **Threads:** every method."""

    def __init__(self) -> None:
        super().__init__("refresh")
