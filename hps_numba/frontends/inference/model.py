"""What a network front end serves: a model with named inputs and outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future

from hps_numba.frontends.inference.tensors import InferenceRequest, InferenceResponse, TensorSpec

__all__ = ["InferenceModel"]


class InferenceModel(ABC):
    """A model that answers requests.

    Attributes:
        name: by which clients ask for it.   platform: what it is made of, e.g. ``hps_numba_tables``.
        has_threads: it answers requests on threads of its own, by ``submit``.
        max_batch_size: most samples of a request along the first axis; 0: the first axis is no batch, or there is no limit.

    Thread safety: every method from any thread.
    """

    name: str
    platform: str
    has_threads: bool = False
    max_batch_size: int = 0

    @property
    @abstractmethod
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it takes."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it answers."""

    @abstractmethod
    def versions(self) -> tuple[str, ...]:
        """Versions that it can answer with now; empty if it is not loaded."""

    def ready(self) -> bool:
        """Whether it can answer."""
        return bool(self.versions())

    def may_wait(self, request: InferenceRequest) -> bool:
        """Whether the answer may take long, so that it must not be computed on the thread of an event loop."""
        return True

    def submit(self, request: InferenceRequest, started: Callable[[], object]) -> Future[InferenceResponse]:
        """Have a request answered by threads of the model's own, so that nobody waits; only of a model that has them.

        Args:
            started: called once, by any thread, when the request waits no more; not if it was given up before.

        Raises:
            InferenceError: 429, too many wait.   HpsError: as ``infer``.
        """
        raise NotImplementedError(f"{self.platform}: expected a model that has threads, got one that has none")

    def output_bytes(self, request: InferenceRequest) -> int:
        """Bytes of the outputs, as far as the shapes of the inputs tell; 0: that is not known before they are there."""
        return 0

    @abstractmethod
    def infer(self, request: InferenceRequest) -> InferenceResponse:
        """Answer a request.

        Raises:
            InferenceError: the request is wrong.   HpsError: as a lookup of the server; ``problems.status_of`` tells either.
        """

    def close(self) -> None:
        """Free what it holds; it answers no more."""
