"""System shared memory as the place of tensors: regions that clients on the same machine made and registered.

Problem: a region is a file of the client's. Whoever maps it can be killed by the client, which needs only to truncate it
(SIGBUS), and sees values change after they were checked. Choice: regions are read and written by calls of the system
(``preadv``, ``pwrite``), which copy, tell a file that is too short, and cost little beside a lookup. Turned down: ``mmap``.

What a client names here does reach the file system, so nothing is allowed by default: the operator gives prefixes of names,
and only plain files of ``/dev/shm`` whose names begin with one of them can be registered. Other segments there, such as those
of the tier ``multi_process_hash_map``, must have names of their own.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hps_numba.arrays.buffer_pool import aligned_empty
from hps_numba.config.messages import show
from hps_numba.errors import ConfigError
from hps_numba.frontends.inference.problems import InferenceError

__all__ = ["RegionPart", "RegionStatus", "SharedRegions"]

FOLDER = Path("/dev/shm")
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}")
_NAME, _SIZE, _OFFSET = "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"
_MAX_REGIONS = 1024
_MAX_NAME = 200


@dataclass(frozen=True)
class RegionStatus:
    """A registered region.

    Attributes:
        name: by which requests name it.   key: of the segment.   offset, byte_size: of the region in the segment, in bytes.
    """

    name: str
    key: str
    offset: int
    byte_size: int


@dataclass(frozen=True)
class RegionPart:
    """Where a tensor is.

    Attributes:
        region: its name.   offset, size: bytes of the tensor in the region.
    """

    region: str
    offset: int
    size: int

    @classmethod
    def of(cls, parameters: Mapping[str, Any], place: str) -> RegionPart | None:
        """The place that the parameters of a tensor name; None: they name none.

        Raises:
            InferenceError: 400, they are incomplete or of a wrong type.
        """
        if _NAME not in parameters:
            return None
        name: Any = parameters[_NAME]
        size: Any = parameters.get(_SIZE)
        offset: Any = parameters.get(_OFFSET, 0)
        if not isinstance(name, str):
            raise InferenceError(400, f"{place}.parameters.{_NAME}: expected a name, got {show(name)}")
        for key, value in ((_SIZE, size), (_OFFSET, offset)):
            if type(value) is not int or not 0 <= value < 1 << 62:
                raise InferenceError(400, f"{place}.parameters.{key}: expected a number of bytes, got {show(value)}")
        return cls(name, offset, size)

    def to_parameters(self, size: int) -> dict[str, Any]:
        """The parameters of an answer's tensor that has ``size`` bytes there."""
        return {_NAME: self.region, _SIZE: size, **({_OFFSET: self.offset} if self.offset else {})}


class _Segment:
    """An open file; closed when the last thread that uses it is done."""

    def __init__(self, file: int, writable: bool) -> None:
        self.file, self.writable = file, writable

    def __del__(self) -> None:
        os.close(self.file)


class SharedRegions:
    """The regions that clients of a server registered.

    Args:
        prefixes: names of segments that may be registered begin with one of them; none: nothing is allowed.
        folder: where segments are.

    Raises:
        ConfigError: a prefix is empty or no part of a name.

    Thread safety: every method.
    """

    def __init__(self, prefixes: Sequence[str] = (), *, folder: Path = FOLDER) -> None:
        for prefix in prefixes:
            if not _KEY.fullmatch(prefix):
                raise ConfigError(f"shared memory: expected the first letters of names in {folder}, got {prefix!r}")
        self.prefixes = tuple(prefixes)
        self._folder = folder
        self._regions: dict[str, tuple[RegionStatus, _Segment]] = {}
        self._lock = threading.Lock()

    @property
    def allowed(self) -> bool:
        """Whether regions can be registered at all."""
        return bool(self.prefixes)

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Make a part of a segment known by a name.

        Args:
            key: name of the segment, with or without the slash at the front that POSIX asks for.

        Raises:
            InferenceError: 403, the operator does not allow it.   400, there is no such segment, or it is smaller.
                409, the name is taken, or there are too many.
        """
        if not self.allowed:
            raise InferenceError(403, "shared memory: not allowed, start the server with a prefix of names that are")
        plain = key.removeprefix("/")
        if not _KEY.fullmatch(plain) or not plain.startswith(self.prefixes):
            raise InferenceError(403, f"key: expected a name that begins with {' or '.join(self.prefixes)}, got {show(key)}")
        if not 0 < len(name) <= _MAX_NAME:
            raise InferenceError(400, f"name: expected 1 to {_MAX_NAME} characters, got {len(name)}")
        if offset < 0 or byte_size <= 0:
            raise InferenceError(400, f"byte_size: expected more than 0 bytes at 0 or more, got {byte_size} at {offset}")
        segment = self._open(plain)
        size = os.fstat(segment.file).st_size
        if offset + byte_size > size:
            raise InferenceError(400, f"byte_size: expected at most {size - offset}, the segment has {size}, got {byte_size}")
        with self._lock:
            if name in self._regions:
                raise InferenceError(409, f"name: expected another one, {show(name)} is registered already")
            if len(self._regions) >= _MAX_REGIONS:
                raise InferenceError(409, f"shared memory: expected at most {_MAX_REGIONS} regions, unregister some")
            self._regions[name] = RegionStatus(name, key, offset, byte_size), segment

    def _open(self, plain: str) -> _Segment:
        flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        for access in (os.O_RDWR, os.O_RDONLY):
            try:
                segment = _Segment(os.open(self._folder / plain, flags | access), access == os.O_RDWR)
            except PermissionError:
                continue
            except OSError as problem:
                raise InferenceError(400, f"key: expected a segment, got {show(plain)}: {problem.strerror}") from None
            if not stat.S_ISREG(os.fstat(segment.file).st_mode):
                raise InferenceError(400, f"key: expected a segment, {show(plain)} is none")
            return segment
        raise InferenceError(400, f"key: expected a segment that this server may read, got {show(plain)}")

    def unregister(self, name: str = "") -> None:
        """Forget a region, if there is one of the name; without a name all of them."""
        with self._lock:
            if name:
                self._regions.pop(name, None)
            else:
                self._regions.clear()

    def status(self, name: str = "") -> list[RegionStatus]:
        """What is registered: a region, or all of them.

        Raises:
            InferenceError: 404, no such region.
        """
        with self._lock:
            if name and name not in self._regions:
                raise InferenceError(404, f"name: no region {show(name)} is registered")
            return [status for status, _ in self._regions.values() if not name or status.name == name]

    def read(self, part: RegionPart, place: str) -> np.ndarray:
        """A copy of the bytes of a tensor.

        Raises:
            InferenceError: 400, no such region, or it has fewer bytes.
        """
        status, segment = self._find(part, place)
        memory = aligned_empty((part.size,), np.dtype(np.uint8))
        done = 0
        while done < part.size:
            count = os.preadv(segment.file, [memory[done:].data], status.offset + part.offset + done)
            if not count:
                raise InferenceError(400, f"{place}: expected {part.size} bytes in region {show(part.region)}, got {done}")
            done += count
        return memory

    def write(self, part: RegionPart, array: np.ndarray, place: str) -> None:
        """Write a tensor there.

        Raises:
            InferenceError: 400, no such region, it may not be written, or the tensor needs more bytes.
        """
        if array.nbytes > part.size:
            raise InferenceError(
                400, f"{place}.parameters.{_SIZE}: expected at least {array.nbytes}, the bytes of the output, got {part.size}"
            )
        status, segment = self._find(part, place)
        if not segment.writable:
            raise InferenceError(400, f"{place}: expected a region that this server may write, got {show(part.region)}")
        start = status.offset + part.offset
        if start + array.nbytes > os.fstat(segment.file).st_size:
            raise InferenceError(
                400, f"{place}: expected {array.nbytes} bytes in region {show(part.region)}, its segment shrank"
            )
        memory = np.ascontiguousarray(array).reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)
        done = 0
        while done < len(memory):
            done += os.pwrite(segment.file, memory[done:].data, start + done)

    def _find(self, part: RegionPart, place: str) -> tuple[RegionStatus, _Segment]:
        with self._lock:
            found = self._regions.get(part.region)
        if found is None:
            raise InferenceError(400, f"{place}.parameters.{_NAME}: expected a registered region, got {show(part.region)}")
        if part.offset + part.size > found[0].byte_size:
            raise InferenceError(
                400,
                f"{place}.parameters.{_SIZE}: expected at most {max(0, found[0].byte_size - part.offset)} bytes at "
                f"{part.offset} of region {show(part.region)}, got {part.size}",
            )
        return found
