"""The settings of a simulation, checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hps_numba.config.arguments import as_count, as_flag, as_number, as_optional, as_word
from hps_numba.errors import ConfigError
from hps_numba.kernels.dtypes import ELEMENT_BYTES

__all__ = ["GEOMETRIES", "Settings", "check_running", "check_settings", "warmup_requests"]

GEOMETRIES = ("both", "gpu", "associative")
MAX_THREADS = 1024


@dataclass(frozen=True)
class Settings:
    """How a cache is simulated.

    Attributes:
        batch: keys of a call.   warmup: requests at the beginning that are not counted.   window: requests of a window.
        dim, row_dtype: of a row, for sizes in bytes.
    """

    batch: int
    warmup: int
    window: int
    dim: int
    row_dtype: str


def check_settings(
    *, geometry: str, batch: int, warmup: float, sample: float, dim: int, row_dtype: str, windows: int = 1
) -> None:
    """Raise ConfigError if one of them is out of range or unknown."""
    as_word(geometry, "geometry", GEOMETRIES)
    as_word(row_dtype, "row_dtype", ELEMENT_BYTES)
    for name, value in (("batch", batch), ("dim", dim), ("windows", windows)):
        if as_count(value, name) < 1:
            raise ConfigError(f"{name}: expected 1 or more, got {value}")
        if value >= 1 << 31:
            raise ConfigError(f"{name}: expected less than 2**31, got {value}")
    if not 0 <= _share(warmup, "warmup") < 1 << 62:
        raise ConfigError(f"warmup: expected a share below 1 or a number of requests, got {warmup}")
    if not 0 < _share(sample, "sample") <= 1:
        raise ConfigError(f"sample: expected a share of the keys above 0 and up to 1, got {sample}")


def check_running(*, threads: int | None, progress: bool | None, **flags: bool) -> int | None:
    """``threads`` as an int.

    Raises:
        ConfigError: ``threads`` or ``progress`` is out of range or of another type, or a flag is none.
    """
    as_optional(progress, as_flag, "progress")
    for name, value in flags.items():
        as_flag(value, name)
    return as_optional(threads, partial(as_count, low=1, high=MAX_THREADS), "threads")


def _share(value: float, name: str) -> float:
    """A number; what is not finite is out of any range."""
    return value if isinstance(value, float) else as_number(value, name)


def warmup_requests(warmup: float, requests: int, batch: int) -> int:
    """How many of ``requests`` are not counted, in whole batches; ``warmup``: below 1 a share, else a number of requests.

    Raises:
        ConfigError: nothing would be counted.
    """
    skip = round(warmup * requests) if warmup < 1 else round(warmup)
    if skip >= requests:
        raise ConfigError(f"warmup: expected fewer than the {requests:,} requests of the trace, got {skip:,}")
    return skip // batch * batch
