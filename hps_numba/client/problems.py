"""What an answer that tells an error is to a caller: the error that the server itself would have raised, or its closest kin."""

from __future__ import annotations

import json

from hps_numba.errors import (
    ArrayError,
    CapacityError,
    ConfigError,
    HpsError,
    TierError,
    TierUnavailable,
    UnknownModelError,
    VersionError,
)

__all__ = ["error_of"]

_ERRORS: dict[int, type[HpsError]] = {
    401: ConfigError,
    403: ConfigError,
    404: UnknownModelError,
    409: ConfigError,
    429: CapacityError,
    502: TierUnavailable,
    503: TierUnavailable,
    504: TierUnavailable,
}
_MAX_MESSAGE = 2000


def error_of(status: int, body: bytes, where: str) -> HpsError:
    """The error of an answer with a status of 400 or more.

    Args:
        body: JSON with ``error``, or whatever a proxy says.   where: the URL that was asked.

    Returns:
        ArrayError: the request is wrong or too large.   ConfigError: it is not allowed.
        UnknownModelError, VersionError: there is no such model or version.   CapacityError: too many requests.
        TierUnavailable: the server is not ready.   TierError: a fault of the server.
    """
    message = _message(body)
    kind = _ERRORS.get(status, ArrayError if 400 <= status < 500 else TierError)
    if kind is UnknownModelError and message.startswith("version"):
        kind = VersionError
    return kind(f"{where}: {message} (HTTP {status})")


def _message(body: bytes) -> str:
    try:
        told = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):  # not of this protocol
        told = body.decode("utf-8", "replace")
    return " ".join(str(told).split())[:_MAX_MESSAGE] or "no message"
