"""Bounds of what clients may ask for, and how much of it is under way at a time.

Choice: memory is counted before it is taken, by what a request says of itself (its length, the shapes of its inputs), so that
many clients together cannot take more than the bounds allow; what exceeds them is refused at once with 413 or 429 rather than
made to wait. Turned down: a bound of the requests alone, which says nothing of memory.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from hps_numba.errors import ConfigError
from hps_numba.frontends.inference.model import InferenceModel
from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.tensors import InferenceRequest

__all__ = ["Admission", "Limits"]

#: bytes of a float32 in JSON, as text, as an object and in the list of them, by those that it has in memory
JSON_FACTOR = 16


@dataclass(frozen=True)
class Limits:
    """Bounds of a front end; of each process, where there are several.

    Attributes:
        max_body_bytes: of a request.   max_json_bytes: of the JSON in it.
        max_keys: elements of all inputs of a request.
        max_answer_bytes: of the outputs of a request; in JSON, values count for 16 times what they take as bytes.
        max_held_bytes: of requests and answers that are under way, together.
        max_concurrent: requests that are answered at a time by threads of their own; small ones from memory need none.
        max_queue: requests that wait for one of these threads.
        max_connections: open at a time.   max_header_bytes: of a request's line and headers.
        request_seconds: in which a request is answered, once it is here.
        read_seconds: in which it has to arrive.   write_seconds: in which a client has to read what is sent.
        keep_alive_seconds: for which an idle connection stays open.

    Raises:
        ConfigError: one is not positive.
    """

    max_body_bytes: int = 64 << 20
    max_json_bytes: int = 4 << 20
    max_keys: int = 1 << 22
    max_answer_bytes: int = 256 << 20
    max_held_bytes: int = 1 << 30
    max_concurrent: int = min(32, (os.cpu_count() or 1) + 4)
    max_queue: int = 256
    max_connections: int = 2048
    max_header_bytes: int = 64 << 10
    request_seconds: float = 30.0
    read_seconds: float = 30.0
    write_seconds: float = 60.0
    keep_alive_seconds: float = 75.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not 0 < value < math.inf and not (one.name == "max_queue" and value == 0):
                raise ConfigError(f"{one.name}: expected more than 0, got {value}")

    def check_body(self, size: int, json_size: int | None) -> None:
        """Refuse a body by its size in bytes, and that of its JSON if tensors follow it.

        Raises:
            InferenceError: 413.
        """
        if size > self.max_body_bytes:
            raise InferenceError(413, f"body: expected at most {self.max_body_bytes} bytes, got {size}")
        json_bytes = size if json_size is None else json_size
        if json_bytes > self.max_json_bytes:
            raise InferenceError(
                413, f"body: expected at most {self.max_json_bytes} bytes of JSON, got {json_bytes}; send tensors as bytes"
            )

    def answer_bytes(self, model: InferenceModel, request: InferenceRequest, *, binary: bool = True) -> int:
        """Bytes that answering a request takes, as far as its inputs tell.

        Raises:
            InferenceError: 413, there are too many keys, or the answer would be too large.
        """
        if request.items > self.max_keys:
            raise InferenceError(413, f"inputs: expected at most {self.max_keys} elements together, got {request.items}")
        needed = model.output_bytes(request) * (1 if binary else JSON_FACTOR)
        if needed > self.max_answer_bytes:
            how = "" if binary else " in JSON; ask for outputs as bytes"
            raise InferenceError(
                413, f"inputs: expected some whose answer takes at most {self.max_answer_bytes} bytes, got {needed}{how}"
            )
        return needed


class Admission:
    """What is under way: bytes of requests and answers, and requests for threads.

    Attributes:
        held_bytes: of requests and answers now.   requests: that have a thread or wait for one now.

    Thread safety: every method.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self.held_bytes = 0
        self.requests = 0

    def hold(self, size: int) -> int:
        """Count bytes as held until ``release``; returns how many.

        Raises:
            InferenceError: 429, there are too many.
        """
        with self._lock:
            if self.held_bytes + size > self._limits.max_held_bytes:
                raise InferenceError(
                    429, f"server: expected at most {self._limits.max_held_bytes} bytes under way, try again in a while"
                )
            self.held_bytes += size
        return size

    def release(self, size: int) -> None:
        """Count bytes no more."""
        with self._lock:
            self.held_bytes -= size

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Count bytes as held in the block; raises as ``hold``."""
        self.hold(size)
        try:
            yield
        finally:
            self.release(size)

    def enter(self) -> None:
        """A request wants a thread; it has one or waits for one until ``leave``.

        Raises:
            InferenceError: 429, too many wait.
        """
        with self._lock:
            if self.requests >= self._limits.max_concurrent + self._limits.max_queue:
                raise InferenceError(429, f"server: {self._limits.max_queue} requests wait already, try again in a while")
            self.requests += 1

    def leave(self) -> None:
        """A request is done with its thread, or does not want it any more."""
        with self._lock:
            self.requests -= 1
