"""What was learned of ways to bring missed rows (``cache.shares``), kept on disk for the next process.

One small JSON file, ``miss_rates.json`` in the folder of the kernel cache, which is trusted by the same rules: it and the
folders above it belong to the user, and no other may write them. A file that is damaged is as one that is not there. It is read
when the first cache opens that may use it, and written by a thread of its own at most once a minute, when a cache closes, and
at the end of the process, if something has changed by then; never in a lookup, and no failure reaches a caller.

A file appears atomically. Of two processes that write in the same moment, what one has learned may be lost: it learns again.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hps_numba.cache.shares import Learned
from hps_numba.device.identity import DeviceIdentity
from hps_numba.errors import HpsError
from hps_numba.kernels.compiler import disk_cache
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.replacing import file_judge, replacing
from hps_numba.runtime.timer import Timer

__all__ = ["KeptRates", "RateKey", "kept_rates", "rate_key", "span_of"]

log = logging.getLogger(__name__)
_NAME = "miss_rates.json"
_FORMAT, _VERSION = "hps_numba_miss_rates", 1
_MAX_BYTES = 1 << 20  # of the file
_MAX_ENTRIES = 256  # of it; the oldest go first
_SECONDS = 60.0  # between two writings, at least
_GIB = 1 << 30
_NOT_OURS = stat.S_IWGRP | stat.S_IWOTH


class RateKey(NamedTuple):
    """What rates depend on: the machine, the kernels, and the shape of batch and table.

    Attributes:
        gpu, driver, machine: as ``DeviceIdentity``.   version: of this package and of its kernels.
        row_bytes: of a row in host memory.   key_bits: of the number of keys of a batch.   span_gib: as ``span_of``.
    """

    gpu: str
    driver: str
    machine: str
    version: str
    row_bytes: int
    key_bits: int
    span_gib: int


def span_of(size: int) -> int:
    """The class of a table with rows of so many bytes: about 1, 4, or 16 GiB and more."""
    return 1 if size <= 2 * _GIB else 4 if size <= 8 * _GIB else 16


def rate_key(device: DeviceIdentity, row_bytes: int, key_bits: int, span_gib: int) -> RateKey:
    """The key of what is learned now on a device."""
    from hps_numba import __version__  # the package imports this module

    version = f"{__version__} {disk_cache.source_digest()}"
    return RateKey(device.gpu, device.driver, device.machine, version, row_bytes, key_bits, span_gib)


class _Kept(NamedTuple):
    learned: Learned
    written: float  # seconds since 1970


class KeptRates:
    """What this process and those before it have learned.

    Args:
        file: where it is kept; None: nowhere.

    Thread safety: all methods. ``of`` takes no lock and reads no file after ``open``.
    """

    def __init__(self, file: Callable[[], Path | None]) -> None:
        self._file = file
        self._used: dict[RateKey, Learned] = {}
        self._found: dict[RateKey, _Kept] | None = None
        self._written: dict[RateKey, Learned] = {}  # what the file has of those used
        self._timer = Timer("keeping_rates")
        self._warned = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """A new lock, as a forked child needs it."""
        self._writing = threading.RLock()

    def open(self) -> None:
        """Read what there is, and write what is learned from now on, at most once a minute; again does nothing."""
        with self._writing:
            if self._found is None:
                self._found = self._read()
        try:
            self._timer.add("miss rates", self.keep, delay=_SECONDS, interval=_SECONDS)
        except HpsError as problem:  # no thread: it is written when a cache closes
            log.debug("%s", problem)

    def of(self, key: RateKey) -> Learned:
        """What is known, which all caches with this key learn from now on."""
        learned = self._used.get(key)
        if learned is not None:
            return learned
        kept = (self._found or {}).get(key)
        if kept is None:
            return self._used.setdefault(key, Learned())
        self._written[key] = kept.learned
        return self._used.setdefault(key, kept.learned.copy())

    @property
    def used(self) -> dict[RateKey, Learned]:
        """What this process has used."""
        return dict(self._used)

    def read(self) -> dict[RateKey, Learned]:
        """What the file has now."""
        return {key: kept.learned for key, kept in self._read().items()}

    @property
    def file(self) -> Path | None:
        """The file, which need not exist; None: there is no folder for it."""
        return self._file()

    def keep(self) -> None:
        """Write what was learned, if it is news; a failure is one WARNING a process."""
        with self._writing:
            news = {key: some for key, some in self.used.items() if some.is_news(self._written.get(key))}
            file = self._file() if news else None
            if file is None:
                return
            now = time.time()
            kept = {key: _Kept(learned.copy(), now) for key, learned in news.items()}
            try:
                _write(file, self._read() | kept)
            except (OSError, HpsError) as problem:
                self._warn(f"rates of missed rows are not kept: {problem}")
            # also after a failure: it is tried again when there are other news
            self._written |= {key: some.learned for key, some in kept.items()}

    def close(self) -> None:
        """Write for the last time."""
        self._timer.close()
        self.keep()

    def _read(self) -> dict[RateKey, _Kept]:
        file = self._file()
        if file is None:
            return {}
        try:
            return _entries(_content(file))
        except FileNotFoundError:
            return {}
        except (OSError, ArithmeticError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as problem:
            what = f"{type(problem).__name__}: {problem}"
            self._warn(f"{file}: expected rates of missed rows, got {what}; they are measured again")
            return {}

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s", text)


def _content(file: Path) -> bytes:
    """The bytes of a file of this user's own."""
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        foreign = hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & _NOT_OURS)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES or foreign:
            raise PermissionError(f"one that others may write, or none of at most {_MAX_BYTES} bytes")
        with os.fdopen(descriptor, "rb", closefd=False) as opened:
            return opened.read()
    finally:
        os.close(descriptor)


def _entries(content: bytes) -> dict[RateKey, _Kept]:
    """Raises what Python raises for anything else than what ``_write`` has written."""
    document = json.loads(content)
    if document[_FORMAT] != _VERSION:
        raise ValueError(f"version {document[_FORMAT]}")
    return dict(_entry(entry) for entry in document["entries"])


def _entry(entry: dict[str, Any]) -> tuple[RateKey, _Kept]:
    values = [entry[name] for name in RateKey._fields]
    if not all(type(value) is kind for value, kind in zip(values, [str] * 4 + [int] * 3)):
        raise TypeError(f"key {values}")
    if not 0 < entry["key_bits"] < 64:
        raise ValueError(f"key_bits {entry['key_bits']}")
    host, device = map(float, entry["rates"])
    costs = {name: float(cost) for name, cost in entry["ns_a_row"].items()}
    learned = Learned.remembered(costs, float(entry["host_share"]), (host, device))
    return RateKey(*values), _Kept(learned, float(entry["written"]))


def _figures(kept: _Kept) -> dict[str, Any]:
    known = kept.learned
    return {"ns_a_row": known.costs, "host_share": known.share, "rates": known.rates, "written": kept.written}


def _write(file: Path, entries: dict[RateKey, _Kept]) -> None:
    newest = sorted(entries.items(), key=lambda item: item[1].written, reverse=True)[:_MAX_ENTRIES]
    listed = [key._asdict() | _figures(kept) for key, kept in newest]
    content = json.dumps({_FORMAT: _VERSION, "entries": listed}, indent=1).encode()
    if file.is_symlink():
        raise OSError(f"{file}: expected a file or nothing, got a link, which stays")
    with replacing(file, overwrite=True, judge=file_judge("a file", lambda start: True), error=HpsError) as new:
        new.touch(mode=0o600)
        new.write_bytes(content)


def _default_file() -> Path | None:
    folder = disk_cache.folder(".object")
    return None if folder is None else folder.parent / _NAME


#: those of this process
kept_rates = KeptRates(_default_file)
atexit.register(kept_rates.close)
