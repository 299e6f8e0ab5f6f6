"""The error tree. Every error of this package is one of these, and also the builtin one would guess.

::

    HpsError
    ├── ConfigError       (ValueError)     a config value is missing, wrong or out of range
    ├── ModelFileError    (OSError)        a sparse model on disk is missing, damaged or does not fit its table
    ├── ArrayError        (ValueError)     an ``out=`` array or given rows have the wrong shape or dtype, or cannot be written
    ├── KeyDtypeError     (TypeError)      keys are not integers, or do not fit the key width of the server
    ├── UnknownModelError (LookupError)    no such model, or no such table in it
    │   └── VersionError                   ... or a lookup asked for a version of it that is not in force
    ├── CapacityError     (MemoryError)    a plan or an insertion does not fit the memory it may use
    ├── DeviceError       (RuntimeError)   a listed device is missing, or an array is on the wrong one
    ├── TierError         (OSError)        a storage tier failed
    │   └── TierUnavailable                ... because it cannot be reached or is not installed
    │       └── TierNotMade                ... or was opened for reading, and nobody has written anything there yet
    ├── PolicyError       (ValueError)     a cache policy is unknown or breaks its contract
    ├── TraceError        (OSError)        a trace of keys on disk is missing, damaged or of an unknown form
    ├── ReentryError      (RuntimeError)   a call from inside another one of the same thread, which is halfway through a change
    └── ClosedError       (RuntimeError)   the server was closed

A message is one line that says where the problem is, what was expected and what was given.
"""

from __future__ import annotations

__all__ = [
    "ArrayError",
    "CapacityError",
    "ClosedError",
    "ConfigError",
    "DeviceError",
    "HpsError",
    "KeyDtypeError",
    "ModelFileError",
    "PolicyError",
    "ReentryError",
    "TierError",
    "TierNotMade",
    "TierUnavailable",
    "TraceError",
    "UnknownModelError",
    "VersionError",
]


class HpsError(Exception):
    """Base of every error raised by hps_numba."""


class ConfigError(HpsError, ValueError):
    """A config value is missing, has the wrong type or is out of range. ``problems`` lists all that were found."""

    problems: tuple[str, ...] = ()


class ModelFileError(HpsError, OSError):
    """A sparse model cannot be read: it is missing, truncated or misaligned, or its rows are not as wide as its table's."""


class ArrayError(HpsError, ValueError):
    """An ``out=`` array or the rows of a write have the wrong shape or dtype, or cannot be written."""


class KeyDtypeError(HpsError, TypeError):
    """Keys are not integers, or a key does not fit the key width of the server."""


class UnknownModelError(HpsError, LookupError):
    """No model of this name is deployed, or it has no table of this number or name."""


class CapacityError(HpsError, MemoryError):
    """A plan, a table or an insertion does not fit the memory that it may use."""


class DeviceError(HpsError, RuntimeError):
    """A listed device is missing, or an array is on a device that cannot serve it."""


class TierError(HpsError, OSError):
    """A storage tier failed to answer."""


class TierUnavailable(TierError):
    """A storage tier cannot be reached, or what it needs is not installed."""


class TierNotMade(TierUnavailable):
    """A storage tier on a disk was opened for reading only, and is not there: the first that opens it for writing makes it."""


class PolicyError(HpsError, ValueError):
    """A cache policy is unknown, or breaks the contract of a policy."""


class TraceError(HpsError, OSError):
    """A trace of keys cannot be read: it is missing, damaged, or in an unknown format."""


class ReentryError(HpsError, RuntimeError):
    """A call came from inside another call of the same thread, by a signal handler, ``__del__`` or a callback, and would change
    what that one is working on. Nothing was changed; call again when the other has ended."""


class VersionError(UnknownModelError):
    """Another version of the model is in force than the one that a lookup asked for."""


class ClosedError(HpsError, RuntimeError):
    """The server was closed; it answers no more calls."""
