"""Records the requested keys of a table as a trace for the simulator: a sample of bounded size, at bounded cost.

The trace is an ``.npy`` file of int64 keys that can be read at any time. A JSON file next to it contains the sampled share of
the keys and the number of requests, by which the simulator scales cache sizes. Keys are chosen by a hash, each with all its
requests, as in a sampled simulation (``simulate.sampling``).

A recording starts in a new file that is renamed to the path, and only grows from then on: whoever reads an older recording of
that name, even by a memory map, reads on undisturbed.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import stat
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from hps_numba.device import memory as device_memory
from hps_numba.errors import ConfigError, TraceError
from hps_numba.kernels.dtypes import KEY_DTYPES
from hps_numba.kernels.host.numbering import sample_keys
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.paths import checked_path
from hps_numba.runtime.replacing import check_target, file_judge

__all__ = ["TraceRecording", "metadata_path"]

log = logging.getLogger(__name__)
_BUFFER = 1 << 17  # keys that are buffered before they are written
_HEADER = 128
_HASH_BITS = 24


def metadata_path(path: Path) -> Path:
    """The JSON file with the metadata of a recorded trace."""
    return path.with_name(f"{path.name}.json")


_judge = file_judge("a trace", lambda head: head.startswith(_header(0)[:30]))

_judge_metadata = file_judge("the metadata of a trace", lambda head: head.startswith(b'{\n "table": '))


class TraceRecording:
    """A recording of the keys of one table, started by ``HPS.record_trace``. A context manager: it ends with the block.

    Attributes:
        path: of the trace.   keys: recorded so far.   requests: keys in the selected calls, whether recorded or not.
        calls: so far, selected or not.   done: it has ended, at its limit or by ``close``.

    Thread safety: all methods may be called by several threads.
    """

    def __init__(
        self, path: str | Path, *, table: str, rate: float, every: int, limit: int, on_done: Callable[[TraceRecording], None]
    ) -> None:
        self.path = checked_path(path, "record_trace: path", error=TraceError).expanduser()
        if self.path.suffix != ".npy":
            raise ConfigError(f"record_trace: expected a file name that ends in .npy, got {self.path}")
        if not 0 < rate <= 1:
            raise ConfigError(f"record_trace: rate: expected a share of the keys above 0 and up to 1, got {rate}")
        for name, value in (("every", every), ("limit", limit)):
            if value < 1:
                raise ConfigError(f"record_trace: {name}: expected 1 or more, got {value}")
        self._table, self._every, self._limit, self._on_done = table, every, limit, on_done
        self._threshold = max(1, round(rate * (1 << _HASH_BITS)))
        self.keys = self.requests = self.calls = 0
        self.done = False
        self._buffer, self._buffered, self._written = np.empty(_BUFFER, np.int64), 0, 0
        self.reset_after_fork()
        self._file = self._new_file()
        register_fork_reset(self)
        self._write()

    def _new_file(self) -> BinaryIO:
        """An empty file at the path, in the place of an older recording."""
        target = self.path.resolve()
        if target.exists() and not target.is_file():
            raise TraceError(f"record_trace: {self.path}: expected a new file or an older trace, got {_kind_of(target)}")
        if os.path.lexists(target):
            check_target(self.path, target, overwrite=True, judge=_judge, error=TraceError)
        beside = metadata_path(self.path)
        if os.path.lexists(beside):
            check_target(beside, beside, overwrite=True, judge=_judge_metadata, error=TraceError)
        aside = _aside(target)
        try:
            file = aside.open("xb")
            try:
                aside.replace(target)
            except BaseException:
                file.close()
                aside.unlink(missing_ok=True)
                raise
        except OSError as problem:
            raise TraceError(f"record_trace: {self.path}: {problem.strerror}") from None
        return file

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
        """Record a call with these keys, int64 ``[n]``."""
        if self._is_selected():
            self._keep(keys)

    def saw_on_device(self, address: int, n: int, key_form: str, stream: int) -> None:
        """Record a call with keys in the memory of the current device; waits for the stream if the call is selected."""
        if self._is_selected():
            keys = np.empty(n, KEY_DTYPES[key_form])
            device_memory.to_host(keys, address, stream)
            self._keep(keys.astype(np.int64, copy=False))

    def _is_selected(self) -> bool:
        if self.done:
            return False
        with self._lock:
            self.calls += 1
            return (self.calls - 1) % self._every == 0

    def _keep(self, keys: np.ndarray) -> None:
        kept = np.ascontiguousarray(keys)
        if self._threshold < 1 << _HASH_BITS:
            sampled = np.empty(len(keys), np.int64)
            kept = sampled[: sample_keys(kept, sampled, 0, self._threshold)]
        with self._lock:
            if self.done:
                return
            kept = kept[: self._limit - self.keys]
            self.requests += len(keys)
            self.keys += len(kept)
            while len(kept):
                some = kept[: _BUFFER - self._buffered]
                self._buffer[self._buffered : self._buffered + len(some)] = some
                self._buffered += len(some)
                kept = kept[len(some) :]
                if self._buffered == _BUFFER and not self._try_write():
                    break
            if self.keys < self._limit and not self.done:
                return
            self._finish()
        self._on_done(self)

    def _finish(self) -> None:
        """End the recording, with the lock held."""
        if not self.done:
            self.done = True
            if self._try_write():
                self._file.close()

    def _try_write(self) -> bool:
        """Write the buffer; an error of the disk ends the recording, not the lookup that filled the buffer."""
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
        """Write the rest and end the recording. A second call does nothing."""
        with self._lock:
            if self.done:
                return
            self._finish()
        self._on_done(self)

    def _write(self) -> None:
        """Write the buffer to the file, and the metadata next to it."""
        self._file.seek(0, 2)
        if self._file.tell() == 0:
            self._file.write(_header(0))
        self._file.write(self._buffer[: self._buffered].tobytes())
        self._written += self._buffered
        self._buffered = 0
        self._file.seek(0)
        self._file.write(_header(self._written))
        self._file.flush()
        metadata: dict[str, Any] = {
            "table": self._table,
            "rate": self._threshold / (1 << _HASH_BITS),
            "requests": self.requests,
        }
        metadata |= {"keys": self._written, "calls": self.calls, "every": self._every}
        target = metadata_path(self.path)
        aside = _aside(target)
        aside.write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
        aside.replace(target)


def _header(count: int) -> bytes:
    """The header of an ``.npy`` file of int64 ``[count]``; its length does not depend on ``count``."""
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({count},), }}"
    size = _HEADER - 10
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", size) + text.ljust(size - 1).encode() + b"\n"


def _aside(target: Path) -> Path:
    """A name next to ``target`` for a file that will be renamed to it."""
    return target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.part")


def _kind_of(path: Path) -> str:
    kinds = {stat.S_ISDIR: "a directory", stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket"}
    mode = path.stat().st_mode
    return next((kind for test, kind in kinds.items() if test(mode)), "a device")
