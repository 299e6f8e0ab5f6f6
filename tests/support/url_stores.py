"""File systems of fsspec for tests: memory that counts what is read, and fails as stores do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Store(MemoryFileSystem):
    """``store://``: what fsspec's memory file system does, observed.

    Attributes:
        reads: (path, first byte, end) of every range that was read.
        fail: called with the path before a range is read, and may raise, or answer how many bytes come.
    """

    protocol = "store"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    reads: ClassVar[list[tuple[str, int, int]]] = []
    fail: ClassVar[Any] = None
    fail_write: ClassVar[Any] = None

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        key = self._strip_protocol(path)
        self.reads.append((key, start, end))
        data: bytes = super().cat_file(path, start=start, end=end, **kwargs)
        cut = type(self).fail(key) if type(self).fail is not None else None
        return data if cut is None else data[:cut]

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        if type(self).fail_write is not None:
            type(self).fail_write(self._strip_protocol(rpath))
        self.pipe_file(rpath, Path(lpath).read_bytes())

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        path = path.removeprefix("store://").strip("/")
        return f"/{path}" if path else ""


@contextmanager
def memory_store() -> Iterator[type[Store]]:
    """An empty store at ``store://`` and an empty ``memory://``."""
    fsspec.register_implementation("store", Store, clobber=True)
    memory = fsspec.filesystem("memory")
    for found in (Store, type(memory)):
        found.store.clear()
        found.pseudo_dirs[:] = [""]
    Store.reads.clear()
    Store.fail = Store.fail_write = None
    try:
        yield Store
    finally:
        Store.store.clear()
        memory.store.clear()
