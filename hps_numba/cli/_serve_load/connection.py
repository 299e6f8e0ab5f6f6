"""What the engine needs of a protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

__all__ = ["Access", "Connection", "Done", "ModelFacts", "Probe", "Target", "TensorFacts"]

Done = Callable[[Any, str, int], None]
"""Called with the connection, the status and the bytes of the answer."""


@dataclass(frozen=True)
class TensorFacts:
    """A tensor in the metadata of a model: datatype of the protocol, shape with -1 for what varies."""

    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelFacts:
    """The metadata of a model."""

    name: str
    platform: str
    inputs: Mapping[str, TensorFacts]


@dataclass(frozen=True)
class Probe:
    """The answer to one request: name -> (datatype, shape), and the bytes of all tensors; None if they are JSON."""

    outputs: Mapping[str, tuple[str, tuple[int, ...]]]
    tensor_bytes: int | None


class Connection(Protocol):
    """Carries one request at a time.   Thread safety: used by the thread of its event loop."""

    alive: bool
    slot: Any
    """Of the engine: the request under way."""

    def send(self, wire: bytes, done: Done) -> None:
        """Send a prepared request; ``done`` is called once, also if the connection is lost."""

    def abort(self) -> None:
        """Close at once; a request under way fails."""


class Target(Protocol):
    """A server and one of its protocols."""

    async def models(self) -> Sequence[str]:
        """Names of the models that it has."""

    async def facts(self, model: str) -> ModelFacts:
        """Metadata of a model."""

    def wire(self, model: str, tensors: Mapping[str, np.ndarray], parameters: Mapping[str, Any]) -> bytes:
        """A request as it is sent."""

    async def probe(self, wire: bytes) -> Probe:
        """Send a request and look into the answer."""

    async def text(self, path: str) -> str | None:
        """The page at a path; None if there is none."""

    async def connect(self, expected: int | None) -> Connection:
        """A new connection; an answer whose tensors are not ``expected`` bytes long is an error."""

    async def close(self) -> None:
        """Close what is shared by connections."""


@dataclass(frozen=True)
class Access:
    """How to reach a server.

    Attributes:
        headers: HTTP headers, or gRPC metadata, of each request.
        ca: file of certificates to trust; None for those of the system.
        timeout: seconds for one request.
        json: send and ask for JSON instead of binary tensors.
    """

    headers: Mapping[str, str] = field(default_factory=dict)
    ca: Path | None = None
    timeout: float = 10.0
    json: bool = False
