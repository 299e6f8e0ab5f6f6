"""A trace: the sequence of requested keys, from a file or an array; read as a stream."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hps_numba import plugins
from hps_numba.config.arguments import as_index
from hps_numba.config.messages import show
from hps_numba.errors import TraceError
from hps_numba.runtime.paths import checked_path, kind_of
from hps_numba.traces.formats._format import Blocks, TraceFormat, as_int64, blocks_of
from hps_numba.traces.recording import metadata_path

__all__ = ["Trace", "formats", "open_trace"]

_PACKAGE = "hps_numba.traces.formats"


@dataclass(frozen=True)
class Trace:
    """A trace of keys.

    Attributes:
        name: of the file, for reports.
        format: ``npy``, ``csv``, ...; ``array`` for an array in memory.
        requests: their number; None if it is not known before the trace is read.
        rate: share of all keys that it contains, each with all its requests; below 1 for a recorded sample.
        whole: number of requests from which it was sampled; None if it is not a sample.
    """

    name: str
    format: str
    requests: int | None
    _blocks: Blocks
    _limit: int | None = None
    rate: float = 1.0
    whole: int | None = None

    def blocks(self) -> Iterator[np.ndarray]:
        """The keys, int64 ``[n]``, at most 2**20 at a time; each call starts at the beginning.

        Raises:
            TraceError: the file is damaged, or does not contain integers.
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
        source: path of a file; an integer array of any shape, read in C order; or a ``Trace``, which is returned unchanged.
        format: ``npy``, ``csv``, ``parquet``, ``oracle_general`` or ``text``; by default, the file name decides.
        column: of a CSV or Parquet file: its name or, for CSV, its number, counted from 0. By default ``key`` or similar names.
        limit: read only this many requests, from the beginning.
        name: for reports, instead of the file name.

    Raises:
        TraceError: there is no such file, it is damaged, or its format is unknown. Some damage is found only when blocks are
            read.
    """
    limit = _checked_limit(limit)
    for what, text in (("format", format), ("name", name)):
        if text is not None and not isinstance(text, str):
            raise TraceError(f"{what}: expected a text or None, got {show(text)}")
    if not (column is None or isinstance(column, str) or as_index(column) is not None):
        raise TraceError(f"column: expected a name or a number, got {show(column)}")
    if isinstance(source, Trace):
        return source
    if not isinstance(source, (str, os.PathLike)):
        return _array_trace(_array(source), name or "array", limit)
    path = _expanded(checked_path(source, "trace", error=TraceError))
    found = _kind(path)
    if found != "a file":
        raise TraceError(f"{path}: expected a trace file, got {found}")
    format_name, opener = _format_of(path, format)
    requests, blocks = opener.open(path, None if column is None else str(column))
    rate, whole = _sample_of(path, requests)
    if requests is not None and limit is not None and limit < requests:
        whole = None if whole is None else round(whole * limit / requests)
        requests = limit
    return Trace(name or path.name, format_name, requests, blocks, limit, rate, whole)


def _checked_limit(limit: Any) -> int | None:
    number = None if limit is None else as_index(limit)
    if limit is not None and (number is None or number < 1):
        raise TraceError(f"limit: expected 1 or more requests, got {show(limit)}")
    return number


def _array(source: Any) -> np.ndarray:
    try:
        return np.asarray(source)
    except Exception as problem:  # ragged lists, or whatever a foreign object raises
        raise TraceError(f"trace: expected a path or an array of integers, got {show(source)}") from problem


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # no such user: then it is a name that begins with a tilde
        return path


def _kind(path: Path) -> str:
    try:
        return kind_of(path.stat().st_mode)
    except FileNotFoundError:
        return "no such file"
    except OSError as problem:
        return f"a path that cannot be looked up: {problem.strerror}"


def _sample_of(path: Path, requests: int | None) -> tuple[float, int | None]:
    """``(rate, whole)`` of a trace that was recorded from a server; (1.0, None) for others."""
    sidecar = metadata_path(path)
    if not sidecar.is_file():
        return 1.0, None
    try:
        metadata = json.loads(sidecar.read_text(encoding="utf-8"))
        rate, whole, keys = float(metadata["rate"]), int(metadata["requests"]), int(metadata["keys"])
    except (ValueError, KeyError, TypeError) as problem:
        what = f"{type(problem).__name__}: {problem}"
        raise TraceError(f"{sidecar}: expected the metadata of a recorded trace, got {what}") from None
    if not 0 < rate <= 1 or not 0 <= keys <= whole or (requests is not None and keys != requests):
        raise TraceError(
            f"{sidecar}: {keys:,} keys of {whole:,} requests at rate {rate}, but {path.name} has {requests:,} keys"
        )
    return (rate, whole) if rate < 1 else (1.0, None)


def _format_of(path: Path, name: str | None) -> tuple[str, TraceFormat]:
    known = formats()
    if name is not None:
        if name not in known:
            raise TraceError(f"format: expected one of {', '.join(known)}, got {name!r}")
        return name, known[name]
    file_name = path.name.lower()
    for name, found in known.items():
        if file_name.endswith(found.endings):
            return name, found
    endings = ", ".join(ending for found in known.values() for ending in found.endings)
    raise TraceError(f"{path}: expected a name ending in {endings}, or format (--format): one of {', '.join(known)}")


def _array_trace(array: np.ndarray, name: str, limit: int | None) -> Trace:
    if array.dtype.kind not in "iu":
        raise TraceError(f"{name}: expected integer keys, got {array.dtype}")
    flat = array.reshape(-1)[:limit]
    return Trace(name, "array", len(flat), blocks_of(flat))
