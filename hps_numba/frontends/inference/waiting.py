"""A request in the queue of a batched model."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field

from hps_numba.frontends.inference.tensors import InferenceRequest, InferenceResponse

__all__ = ["WaitingRequest"]


@dataclass(eq=False)
class WaitingRequest:
    """A request that waits for a call of the model.

    Attributes:
        form: what it has in common with those that it can be joined with, or ``ALONE``.   rows: its samples.
        since: when it came.   expires: when it has waited for too long (both by ``time.monotonic``).
        started: called when it waits no more.   answer: what its client gets.
    """

    request: InferenceRequest
    form: Hashable
    rows: int
    since: float
    expires: float
    started: Callable[[], object]
    answer: Future[InferenceResponse] = field(default_factory=Future)

    def start(self) -> bool:
        """It is answered now; False: it was given up."""
        live = self.answer.set_running_or_notify_cancel()
        if live:
            self.started()
        return live
