"""Errors as a network front end tells them: an HTTP status and one line of text, never a traceback."""

from __future__ import annotations

from hps_numba.errors import (
    ArrayError,
    CapacityError,
    ClosedError,
    ConfigError,
    DeviceError,
    HpsError,
    KeyDtypeError,
    ReentryError,
    TierError,
    UnknownModelError,
)

__all__ = ["InferenceError", "message_of", "status_of"]

_STATUS = (
    (UnknownModelError, 404),
    (ConfigError, 400),
    (KeyDtypeError, 400),
    (ArrayError, 400),
    (ClosedError, 503),
    (TierError, 503),
    (ReentryError, 503),
    (CapacityError, 503),
    (DeviceError, 503),
)
_MAX_MESSAGE = 2000


class InferenceError(HpsError):
    """A request cannot be answered.

    Attributes:
        status: of HTTP: 400 the request is wrong, 404 no such model or version, 409 the model is not in a state for it,
            413 too large, 415 of another media type, 429 too many requests, 499 the client is gone, 500 a fault of the server,
            503 not ready, or a tier is down.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: BaseException) -> int:
    """The HTTP status that tells an error."""
    if isinstance(error, InferenceError):
        return error.status
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def message_of(error: BaseException) -> str:
    """What a client is told of an error: of one of this package its message, of any other only that there was one."""
    if isinstance(error, HpsError):
        return str(error)[:_MAX_MESSAGE] or type(error).__name__
    return f"internal error: {type(error).__name__}; the log of the server says more"
