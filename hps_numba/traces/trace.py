"""A trace: the keys that were asked for, one after the other, from a file or an array; read as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hps_numba import plugins
from hps_numba.errors import TraceError
from hps_numba.traces.formats._format import BLOCK, Blocks, TraceFormat, as_int64
from hps_numba.traces.recording import facts_beside

__all__ = ["Trace", "formats", "open_trace"]

_PACKAGE = "hps_numba.traces.formats"


@dataclass(frozen=True)
class Trace:
    """A trace of keys.

    Attributes:
        name: for reports: the name of the file.
        format: ``npy``, ``csv``, ...; ``array`` for one in memory.
        requests: how many, None where only reading tells.
        rate: share of all keys that it has, each with all its requests; below 1 for a recorded sample.
        whole: requests of which it is a sample, None: it is none.
    """

    name: str
    format: str
    requests: int | None
    _blocks: Blocks
    _limit: int | None = None
    rate: float = 1.0
    whole: int | None = None

    def blocks(self) -> Iterator[np.ndarray]:
        """The keys, int64 ``[n]``, at most 2**20 at a time; from the beginning with each call.

        Raises:
            TraceError: the file is damaged, or holds something else than integers.
        """
        left = self._limit
        for block in self._blocks():
            keys = as_int64(block, self.name)
            if left is not None:
                keys = keys[:left]
                left -= len(keys)
            if len(keys):
                yield keys
            if left == 0:
                return

    def keys(self) -> np.ndarray:
        """All keys, int64 ``[requests]``, in memory."""
        return np.concatenate([np.empty(0, np.int64), *self.blocks()])


def formats() -> dict[str, TraceFormat]:
    """The known formats by name."""
    return {name: plugins.load(_PACKAGE, name, error=TraceError) for name in plugins.names(_PACKAGE)}


def open_trace(
    source: Any,
    *,
    format: str | None = None,
    column: str | int | None = None,
    limit: int | None = None,
    name: str | None = None,
) -> Trace:
    """Open a trace.

    Args:
        source: path of a file; an integer array of any shape, in C order; or a ``Trace``, which is returned as it is.
        format: ``npy``, ``csv``, ``parquet``, ``oracle_general`` or ``text``; by default by the ending of the name.
        column: of a CSV or Parquet file: name, or for CSV a number from 0. By default ``key`` and the like.
        limit: only so many requests, from the beginning.
        name: for reports, instead of that of the file.

    Raises:
        TraceError: no such file, it is damaged, or its form is unknown. Some damage is seen only while blocks are read.
    """
    if isinstance(source, Trace):
        return source
    if limit is not None and limit < 1:
        raise TraceError(f"limit: {limit} requests, wanted 1 or more")
    if not isinstance(source, (str, Path)):
        return _of_array(np.asarray(source), name or "array", limit)
    path = Path(source).expanduser()
    if not path.is_file():
        raise TraceError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}, wanted a trace")
    chosen, part = _format_of(path, format)
    requests, blocks = part.open(path, None if column is None else str(column))
    rate, whole = _sample_of(path, requests)
    if requests is not None and limit is not None and limit < requests:
        whole = None if whole is None else round(whole * limit / requests)
        requests = limit
    return Trace(name or path.name, chosen, requests, blocks, limit, rate, whole)


def _sample_of(path: Path, requests: int | None) -> tuple[float, int | None]:
    """``(rate, whole)`` of a trace that was recorded from a server; (1.0, None) of others."""
    beside = facts_beside(path)
    if not beside.is_file():
        return 1.0, None
    try:
        facts = json.loads(beside.read_text(encoding="utf-8"))
        rate, whole, keys = float(facts["rate"]), int(facts["requests"]), int(facts["keys"])
    except (ValueError, KeyError, TypeError) as problem:
        raise TraceError(f"{beside}: not the facts about a recorded trace: {type(problem).__name__}: {problem}") from None
    if not 0 < rate <= 1 or not 0 <= keys <= whole or (requests is not None and keys != requests):
        raise TraceError(f"{beside}: {keys:,} keys of {whole:,} requests at rate {rate}, but {path.name} has {requests:,} keys")
    return (rate, whole) if rate < 1 else (1.0, None)


def _format_of(path: Path, name: str | None) -> tuple[str, TraceFormat]:
    known = formats()
    if name is not None:
        if name not in known:
            raise TraceError(f"format: {name!r} is unknown, known are {', '.join(known)}")
        return name, known[name]
    text = path.name.lower()
    for name, part in known.items():
        if text.endswith(part.endings):
            return name, part
    endings = ", ".join(ending for part in known.values() for ending in part.endings)
    raise TraceError(f"{path}: its ending is none of {endings} (--format names one of {', '.join(known)})")


def _of_array(array: np.ndarray, name: str, limit: int | None) -> Trace:
    if array.dtype.kind not in "iu":
        raise TraceError(f"{name}: keys are {array.dtype}, wanted integers")
    flat = array.reshape(-1)[:limit]

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(flat), BLOCK):
            yield flat[start : start + BLOCK]

    return Trace(name, "array", len(flat), blocks)
