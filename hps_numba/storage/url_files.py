"""A file at a URL, read by ranges.

Problem: a table is larger than what host memory can hold twice, an object store has no descriptors, and an object may be
replaced while it is read. Choice: every read is a range request for the bytes that are needed, straight to their place; small
reads share the last four blocks of 1 MiB; a range that comes back short is an error; and whoever reads the last byte of a file
asks once more whether it is still the same object. Turned down: fsspec's buffered files, whose read-ahead fetches the rows
again for every chunk of keys where both lie in one file.
"""

from __future__ import annotations

import io
import os
import tempfile
from typing import Any

from hps_numba.errors import ModelFileError
from hps_numba.storage.urls import UrlPath

__all__ = ["UrlFile", "open_url"]

_VERSION_KEYS = ("ETag", "etag", "generation", "LastModified", "last_modified", "mtime", "created", "modified")
_BLOCK_BYTES = 1 << 20
_BLOCKS = 4
_DIRECT_BYTES = 256 << 10  # a read of so many takes no block


class UrlFile(io.RawIOBase):
    """A file at a URL, read by ranges.

    Attributes:
        size: bytes, when it was opened.

    Raises:
        ModelFileError, in the constructor and in reads: the file is missing, was cut short, or is another one by now.

    **Thread safety:** one thread at a time.
    """

    def __init__(self, path: UrlPath, info: dict[str, Any]) -> None:
        if info.get("size") is None:
            raise ModelFileError(f"{path}: expected a file of a known size, got one without")
        self.path = path
        self.size = int(info["size"])
        self._version = _version(info)
        self._position = 0
        self._blocks: dict[int, bytes] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError(f"{self.path}: expected a position of at least 0, got {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.size - self._position))
        if not count:
            return 0
        if count < _DIRECT_BYTES:
            self._from_blocks(view[:count])
        else:
            view[:count] = self.path.fetch(self._position, self._position + count)
            self._position += count
        if self._position == self.size:
            self._check_version()
        return count

    def _from_blocks(self, view: memoryview) -> None:
        """Fill the view from the position on, and move it."""
        while len(view):
            number, first = divmod(self._position, _BLOCK_BYTES)
            block = self._blocks.pop(number, None)
            if block is None:
                start = number * _BLOCK_BYTES
                block = self.path.fetch(start, min(start + _BLOCK_BYTES, self.size))
            self._blocks[number] = block  # the last one used is the last to go
            if len(self._blocks) > _BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            piece = block[first : first + len(view)]
            view[: len(piece)] = piece
            view = view[len(piece) :]
            self._position += len(piece)

    def _check_version(self) -> None:
        info = self.path.info()
        if info is None or info.get("size") != self.size or _version(info) != self._version:
            raise ModelFileError(f"{self.path}: was replaced or removed while it was read; read it again")


def _version(info: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(info.get(key) for key in _VERSION_KEYS)


def open_url(path: UrlPath) -> UrlFile | io.FileIO:
    """Open a file at a URL for reading; one that cannot be read by ranges is downloaded to a nameless temporary file first.

    Raises:
        ModelFileError: missing, a folder, or unreadable.
    """
    info = path.info()
    if info is None:
        raise ModelFileError(f"{path}: no such file")
    if info["type"] != "file":
        raise ModelFileError(f"{path}: expected a file, got a {info['type']}")
    if path.has_ranges(info):
        return UrlFile(path, info)
    with tempfile.TemporaryFile(buffering=0) as nameless:
        file = io.FileIO(os.dup(nameless.fileno()), "rb+")
    try:
        path.download(file)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file
