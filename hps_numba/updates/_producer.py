"""What an update producer promises: rows and deletions go to a bus in HugeCTR's form, in the order in which they were given.

A producer stands in the file of its bus, beside the source (``UpdateSource.Producer``). The base encodes, partitions and
buffers; a bus only takes whole messages. Keys go to one of 8 partitions by HugeCTR's hash, so that all changes of a key are in
one partition and stay in order.

Nothing is lost silently: what the bus does not take stays here, and the next call raises; ``flush`` returns when everything is
delivered.
"""

from __future__ import annotations

import abc
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from hps_numba import plugins
from hps_numba.config.enums import UPDATE_SOURCES
from hps_numba.errors import ArrayError, ClosedError, ConfigError, KeyDtypeError, TierError, TierUnavailable
from hps_numba.kernels.host.resp import group_by_partition
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.timer import Timer
from hps_numba.server.manifest import Manifest
from hps_numba.updates._manifests import manifest_headers
from hps_numba.updates._outgoing import Buffer, Outgoing, tag_of
from hps_numba.updates._update import now_ms
from hps_numba.updates._wire.codec import encode_keys, encode_pairs
from hps_numba.updates._wire.messages import HEADER_BYTES, start_of

__all__ = ["Outgoing", "ProducerOptions", "UpdateProducer", "open_producer", "producer_of"]

_PARTITIONS = 8  # of keys, as HugeCTR's producer has
_SOURCES = "hps_numba.updates"


@dataclass(frozen=True, kw_only=True)
class ProducerOptions:
    """Keys of every producer.

    Attributes:
        key_bits: of the servers that read, 64 or 32 (``supportlonglong``).
        send_buffer_size: bytes of a message at most.
        num_send_buffers: messages that may wait for the bus; from then on calls wait for it too.
        linger_ms: after so many milliseconds, what was given is sent even if it fills no message; 0: only by ``flush``.
    """

    key_bits: int = 64
    send_buffer_size: int = 262_144
    num_send_buffers: int = 1024
    linger_ms: float = 100.0


class UpdateProducer(abc.ABC):
    """Publishes changed rows.

    Class attributes:
        Options: dataclass of the producer's keys, derived from ``ProducerOptions``.

    It is a context manager, which ends with ``close``.

    Thread safety: every method; changes of a key that two threads publish are in the order of their calls.
    """

    Options: ClassVar[type[ProducerOptions]] = ProducerOptions

    def __init__(self, options: Any = None) -> None:
        """
        Args:
            options: instance of ``Options``; by default one with its defaults.

        Raises:
            ConfigError: an option is out of range.   TierUnavailable: what the bus needs is not installed, or it is not there.
        """
        self.options: Any = self.Options() if options is None else options
        options = self.options
        if options.key_bits not in (32, 64):
            raise ConfigError(f"key_bits: expected 32 or 64, got {options.key_bits}")
        for name, least in (("send_buffer_size", HEADER_BYTES), ("num_send_buffers", 1), ("linger_ms", 0)):
            if getattr(options, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(options, name)}")
        self._key_bytes = options.key_bits // 8
        self._buffers: dict[tuple[str, int], Buffer] = {}
        self._starts: dict[str, bytes] = {}
        self._outbox: deque[Outgoing] = deque()
        self._problem: BaseException | None = None
        self._issued_ms = -1
        self._closed = False
        self._timer = Timer("updates_linger")
        self.reset_after_fork()
        register_fork_reset(self)
        if options.linger_ms:
            self._timer.add("linger", self._send_old, delay=0.0, interval=options.linger_ms / 2000)

    def reset_after_fork(self) -> None:
        """A forked child has its own copy of what waits, which its parent sends: it drops that, and opens one of its own."""
        self._lock = threading.RLock()
        self._buffers.clear()
        self._outbox.clear()

    @classmethod
    def from_options(cls, **keys: Any) -> Self:
        """Open a producer with these ``Options``.

        Raises:
            ConfigError: a key is unknown, or its value is not valid.   Otherwise as the class.
        """
        from hps_numba.config import checked_options, source_config

        section = source_config({"type": f"{cls.__module__}:{cls.__name__}", **keys})
        return cls(checked_options(section, cls.Options, (), strict=True).options)

    # -- what users call ---------------------------------------------------------------------

    def update(
        self, model: str, table: str, keys: Any, rows: Any, *, event_time_ms: int | None = None, version: int | None = None
    ) -> None:
        """Publish rows, soon: they are sent when a message is full, after ``linger_ms``, or by ``flush``.

        Args:
            model, table: names.   keys: integers ``[n]``; of equal keys the last wins.   rows: float32 ``[n, dim]``.
            event_time_ms: when they changed, in ms since 1970; by default now.
            version: of the model that they belong to.

        Raises:
            KeyDtypeError, ArrayError: keys or rows are not as above.   ConfigError: a message has no room for one row.
            TierError: the bus does not take what was published; that is kept, and the next call tries again. To publish the
                same once more does no harm.
        """
        keys = self._checked_keys(keys)
        values = np.ascontiguousarray(rows)
        if values.dtype != np.float32 or values.ndim != 2 or len(values) != len(keys):
            raise ArrayError(f"rows: expected float32[{len(keys)}, dim], got {values.dtype}{list(values.shape)}")
        pair = self._key_bytes + 4 * values.shape[1]
        if HEADER_BYTES + pair > self.options.send_buffer_size:
            raise ConfigError(
                f"send_buffer_size: expected at least {HEADER_BYTES + pair} for a row, got {self.options.send_buffer_size}"
            )
        tag = tag_of(model, table)
        with self._lock:
            self._check()
            self._send_all()  # if that raises, nothing of this call was taken, so that what waits is bounded
            self._starts[tag] = start_of(values.shape[1])
            self._fill(tag, keys, values.view(np.uint8), event_time_ms, version)
            self._send_all()

    def erase(self, model: str, table: str, keys: Any, *, event_time_ms: int | None = None, version: int | None = None) -> None:
        """Publish that the rows of integer ``[n]`` keys are to be deleted; otherwise as ``update``."""
        keys = self._checked_keys(keys)
        tag = tag_of(model, table)
        with self._lock:
            self._check()
            self._send_all()  # if that raises, nothing of this call was taken, so that what waits is bounded
            self._fill(tag, keys, None, event_time_ms, version)
            self._send_all()

    def announce_snapshot(self, model: str, version: int, tables: Iterable[str]) -> int:
        """Say that the rows of a model are being written to files, as a version to come; call it before they are read.

        Updates go on meanwhile. What is published from now on is newer than the files: servers keep it when they take them.

        Args:
            tables: names of all tables of the model.

        Returns:
            Since when updates are newer, for ``replace_model``.

        Raises:
            As ``update``; ConfigError: ``version`` is not an integer of at least 0, or there is no table.
        """
        with self._lock:
            since_ms = now_ms() + 1
            self._publish(Manifest(model=model, version=version, since_ms=since_ms, issued_ms=self._issue()), tables)
            while now_ms() < since_ms:  # so that no update of before has the time of one after
                time.sleep(0.0005)
            return since_ms

    def replace_model(
        self, model: str, version: int, files: Mapping[str, str], *, dense: str | None = None, since_ms: int | None = None
    ) -> None:
        """Let servers load a version of a model and switch to it; it is in their order of updates.

        Updates that name another version are not applied from then on; ``update`` and ``erase`` name one by ``version``.

        Args:
            version: larger than that in force.   files: path or URL of the sparse model of each table, by table name, as the
                servers see it.
            dense: path or URL of the dense part, for those who asked to be told (``HPS.on_version``).
            since_ms: what ``announce_snapshot`` returned, if updates went on while the files were written; None: the files have
                everything that was published before this call.

        Raises:
            As ``update``; ConfigError: a value is not as above.
        """
        with self._lock:
            manifest = Manifest(
                model=model, version=version, tables=files, dense=dense, since_ms=since_ms, issued_ms=self._issue()
            )
            self._publish(manifest, files)

    def roll_back_model(self, model: str, version: int, tables: Iterable[str]) -> None:
        """Let servers go back to the version before that in force, which is number ``version``.

        Raises:
            As ``replace_model``.
        """
        with self._lock:
            self._publish(Manifest(model=model, version=version, roll_back=True, issued_ms=self._issue()), tables)

    def flush(self, seconds: float = 30.0) -> None:
        """Send everything, and wait until the bus has it.

        Raises:
            TierError: it does not take it, or not within so many seconds; what it has not taken is kept for the next time.
        """
        with self._lock:
            if self._closed:
                raise ClosedError("the producer is closed")
            self._problem = None
            self._seal_all()
            self._send_all()
            self._settle(seconds)

    def close(self, seconds: float = 30.0) -> None:
        """``flush``, and release everything, whatever ``flush`` raises. A second call does nothing."""
        self._timer.close()  # not inside the lock, for which its call may wait
        with self._lock:
            if self._closed:
                return
            try:
                self.flush(seconds)
            finally:
                self._closed = True
                self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- to be written ---------------------------------------------------------------------

    @abc.abstractmethod
    def _send(self, messages: Sequence[Outgoing]) -> int:
        """Give messages to the bus, in order; returns how many of the first ones it took, at least one.

        Raises:
            TierError: it takes none now.
        """

    def _settle(self, seconds: float) -> None:
        """Wait until the bus has what it took.

        Raises:
            TierError: it was not delivered, or not in time.
        """

    def _close(self) -> None:
        """Release everything."""

    # -- buffers ---------------------------------------------------------------------

    def _check(self) -> None:
        if self._closed:
            raise ClosedError("the producer is closed")
        problem, self._problem = self._problem, None
        if problem is not None:
            raise TierError(f"an update published before was not sent yet: {problem}") from problem

    def _checked_keys(self, keys: Any) -> np.ndarray:
        array = np.asarray(keys)
        if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
            raise KeyDtypeError(f"keys: expected integers [n], got {array.dtype}{list(array.shape)}")
        wide: np.ndarray = np.ascontiguousarray(array).astype(np.int64, copy=False)
        if self._key_bytes == 4 and len(wide) and not 0 <= wide.min() <= wide.max() < 2**32:
            raise KeyDtypeError("keys: expected keys of 32 bits, got a wider one")
        return wide

    def _issue(self) -> int:
        """The time now, in ms; later than that of the manifest before."""
        self._issued_ms = max(now_ms(), self._issued_ms + 1)
        return self._issued_ms

    def _publish(self, manifest: Manifest, tables: Iterable[str]) -> None:
        """Send a manifest in every partition of every table, so that it is in the order of the updates of each key."""
        names = list(tables)
        if not names:
            raise ConfigError("tables: expected all tables of the model, got none")
        tags = [tag_of(manifest.model, name) for name in names]
        self._check()
        self._send_all()
        self._seal_all()
        headers = manifest_headers(manifest)
        for tag in tags:
            self._outbox.extend(Outgoing(tag, partition, None, headers) for partition in range(_PARTITIONS))
        self._send_all()

    def _fill(self, tag: str, keys: np.ndarray, rows: np.ndarray | None, time_ms: int | None, version: int | None) -> None:
        """Put writes into the buffers of their partitions, and full ones into the outbox."""
        order, ends = np.empty(len(keys), np.int64), np.zeros(_PARTITIONS, np.int64)
        group_by_partition(keys.ctypes.data, len(keys), _PARTITIONS, order, ends)
        event_ms = now_ms() if time_ms is None else int(time_ms)
        size = self._key_bytes + (0 if rows is None else rows.shape[1])
        start = 0
        for partition in range(_PARTITIONS):
            stop = int(ends[partition])
            while start < stop:
                buffer = self._buffer_for(tag, partition, rows is None, version, size)
                part = min(stop, start + (len(buffer.data) - buffer.at) // size)
                if rows is None:
                    buffer.at = encode_keys(keys, order, start, part, self._key_bytes, buffer.data, buffer.at)
                else:
                    buffer.at = encode_pairs(keys, rows, order, start, part, self._key_bytes, buffer.data, buffer.at)
                buffer.event_ms = event_ms if buffer.event_ms is None else min(event_ms, buffer.event_ms)
                if buffer.at + size > len(buffer.data):
                    self._seal(tag, partition)
                start = part

    def _buffer_for(self, tag: str, partition: int, erases: bool, version: int | None, size: int) -> Buffer:
        """A buffer with room for ``size`` bytes; what was in another one comes before it."""
        start = self._starts.get(tag, b"")
        buffer = self._buffers.get((tag, partition))
        if buffer is not None:
            same = (buffer.erases, buffer.version, buffer.start) == (erases, version, start)
            if same and buffer.at + size <= len(buffer.data):
                return buffer
            self._seal(tag, partition)
        made = self._buffers[tag, partition] = Buffer(start, self.options.send_buffer_size, erases, version)
        return made

    def _seal(self, tag: str, partition: int) -> None:
        buffer = self._buffers.pop((tag, partition))
        self._outbox.append(buffer.sealed(tag, partition))

    def _seal_all(self) -> None:
        for tag, partition in list(self._buffers):
            self._seal(tag, partition)

    def _send_all(self) -> None:
        while self._outbox:
            for _ in range(self._send(list(self._outbox)[: self.options.num_send_buffers])):
                self._outbox.popleft()

    def _send_old(self) -> None:
        """What the timer calls: messages that have waited for ``linger_ms``. A problem is raised by the next call of a user."""
        until = time.monotonic() - self.options.linger_ms / 1000
        with self._lock:
            if self._closed:
                return
            for (tag, partition), buffer in list(self._buffers.items()):
                if buffer.began <= until:
                    self._seal(tag, partition)
            try:
                self._send_all()
            except TierError as problem:
                self._problem = problem


def open_producer(section: Mapping[str, Any], *, allow_code: bool = False) -> UpdateProducer:
    """The producer of a bus.

    Args:
        section: ``type``, as in ``update_source``, and the keys of the producer's ``Options``.
        allow_code: ``type`` may be ``module:NAME`` or ``file.py:NAME`` of a source class.

    Raises:
        ConfigError: a key is unknown or not valid, or updates cannot be published to such a bus.
        TierUnavailable: there is no such bus, or it is not there.
    """
    keys = dict(section)
    return producer_of(keys.pop("type", None), allow_code=allow_code).from_options(**keys)


def producer_of(name: Any, *, allow_code: bool = False) -> type[UpdateProducer]:
    """The class of the producer of a bus.

    Raises:
        ConfigError: updates cannot be published to such a bus.   TierUnavailable: there is no such bus.
    """
    name = next((word for word, others in UPDATE_SOURCES.items() if name in others), name)
    source = plugins.load(_SOURCES, name, allow_code=allow_code, error=TierUnavailable)
    kind = getattr(source, "Producer", None)
    if not (isinstance(kind, type) and issubclass(kind, UpdateProducer)):
        raise ConfigError(f"type: expected a bus with a producer, got {name!r}")
    return kind
