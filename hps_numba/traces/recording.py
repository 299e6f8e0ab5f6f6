"""Records the keys that are asked for, as a trace for the simulator: a sample of bounded size, at bounded cost.

The trace is an ``.npy`` file of int64 keys, readable at any time, and beside it a JSON file that says what share of the keys it
has and how many requests there were: the simulator scales cache sizes by it. Keys are chosen by a hash, each with all its
requests, as for a sampled simulation (``simulate.simulation``).
"""

from __future__ import annotations

import json
import logging
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from hps_numba.device import driver
from hps_numba.errors import ConfigError, TraceError
from hps_numba.kernels.host.numbering import sample_keys
from hps_numba.runtime.fork import register_fork_reset

__all__ = ["TraceRecording", "facts_beside"]

log = logging.getLogger(__name__)
_BUFFER = 1 << 17  # keys that wait to be written
_HEADER = 128
_HASH_BITS = 24
_FORMS = {"int64": np.int64, "int32": np.int32, "uint32": np.uint32, "checked32_in_int64": np.int64}


def facts_beside(path: Path) -> Path:
    """Where the facts about a recorded trace stand."""
    return path.with_name(f"{path.name}.json")


class TraceRecording:
    """A recording of the keys of one table; made by ``HPS.record_trace``. A context manager: it ends with the block.

    Attributes:
        path: of the trace.   keys: recorded so far.   requests: seen in the calls that count, whether recorded or not.
        calls: seen so far.   done: it ended, by itself at its limit or by ``close``.

    **Threads:** all methods.
    """

    def __init__(
        self, path: str | Path, *, table: str, rate: float, every: int, limit: int, on_done: Callable[[TraceRecording], None]
    ) -> None:
        self.path = Path(path).expanduser()
        if self.path.suffix != ".npy":
            raise ConfigError(f"record_trace: {self.path} came, wanted a name that ends in .npy")
        if not 0 < rate <= 1:
            raise ConfigError(f"record_trace: rate is {rate}, wanted a share of the keys above 0 and up to 1")
        for name, value in (("every", every), ("limit", limit)):
            if value < 1:
                raise ConfigError(f"record_trace: {name} is {value}, wanted 1 or more")
        self._table, self._every, self._limit, self._on_done = table, every, limit, on_done
        self._threshold = max(1, round(rate * (1 << _HASH_BITS)))
        self.keys = self.requests = self.calls = 0
        self.done = False
        self._buffer, self._waiting, self._written = np.empty(_BUFFER, np.int64), 0, 0
        self.reset_after_fork()
        try:
            self._file: BinaryIO = self.path.open("wb")
        except OSError as problem:
            raise TraceError(f"record_trace: {self.path}: {problem.strerror}") from None
        register_fork_reset(self)
        self._write()

    def reset_after_fork(self) -> None:
        """In a forked child: the file belongs to the parent."""
        self._lock = threading.Lock()
        if self.calls or hasattr(self, "_file"):
            self.done = True

    def __enter__(self) -> TraceRecording:
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "done" if self.done else "recording"
        return f"TraceRecording({str(self.path)!r}, {self._table}: {self.keys:,} keys of {self.requests:,} requests, {state})"

    def saw(self, keys: np.ndarray) -> None:
        """A call asked for these keys, int64 ``[n]``."""
        if self._counts():
            self._keep(keys)

    def saw_on_device(self, address: int, n: int, form: str, stream: int) -> None:
        """A call asked for keys in the memory of the current device; waits for the stream if the call counts."""
        if self._counts():
            keys = np.empty(n, _FORMS[form])
            driver.to_host(keys, address, stream)
            self._keep(keys.astype(np.int64, copy=False))

    def _counts(self) -> bool:
        if self.done:
            return False
        with self._lock:
            self.calls += 1
            return (self.calls - 1) % self._every == 0

    def _keep(self, keys: np.ndarray) -> None:
        kept = np.ascontiguousarray(keys)
        if self._threshold < 1 << _HASH_BITS:
            room = np.empty(len(keys), np.int64)
            kept = room[: sample_keys(kept, room, 0, self._threshold)]
        with self._lock:
            if self.done:
                return
            kept = kept[: self._limit - self.keys]
            self.requests += len(keys)
            self.keys += len(kept)
            while len(kept):
                some = kept[: _BUFFER - self._waiting]
                self._buffer[self._waiting : self._waiting + len(some)] = some
                self._waiting += len(some)
                kept = kept[len(some) :]
                if self._waiting == _BUFFER and not self._written_down():
                    break
            if self.keys < self._limit and not self.done:
                return
            if not self.done:
                self.done = True
                if self._written_down():
                    self._file.close()
        self._on_done(self)

    def _written_down(self) -> bool:
        """Write; a disk that refuses ends the recording and not the lookup that filled the buffer."""
        try:
            self._write()
        except OSError as problem:
            log.warning("recording of %s ends: %s: %s", self._table, self.path, problem.strerror or problem)
            self.done = True
            with suppress(OSError):
                self._file.close()
            return False
        return True

    def close(self) -> None:
        """End it, and write what is left. Again does nothing."""
        with self._lock:
            if self.done:
                return
            self.done = True
            if self._written_down():
                self._file.close()
        self._on_done(self)

    def _write(self) -> None:
        """Put what waits into the file, and the facts beside it."""
        self._file.seek(0, 2)
        if self._file.tell() == 0:
            self._file.write(_header(0))
        self._file.write(self._buffer[: self._waiting].tobytes())
        self._written += self._waiting
        self._waiting = 0
        self._file.seek(0)
        self._file.write(_header(self._written))
        self._file.flush()
        facts: dict[str, Any] = {"table": self._table, "rate": self._threshold / (1 << _HASH_BITS), "requests": self.requests}
        facts |= {"keys": self._written, "calls": self.calls, "every": self._every}
        facts_beside(self.path).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _header(count: int) -> bytes:
    """What an ``.npy`` file of int64 ``[count]`` begins with; as long whatever the count."""
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({count},), }}"
    size = _HEADER - 10
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", size) + text.ljust(size - 1).encode() + b"\n"
