"""A ``.npz`` archive with ``key``, ``emb_vector`` and, optionally, ``meta``, as ``np.savez`` and
``np.savez_compressed`` write it.

Members are unpacked as streams, about 1 MiB at a time. ``np.load`` would unpack a whole array first. The CRC of a member is
checked when its last row is read.
"""

from __future__ import annotations

import zipfile
from contextlib import ExitStack
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._arrays import NAMES, assign, check_arrays, others, piece_rows, row_dtype, with_scales
from hps_numba.storage.formats._format import SparseModelFormat, SparseModelReader
from hps_numba.storage.formats._npy_header import read_npy_header
from hps_numba.storage.formats._raw import open_file
from hps_numba.storage.urls import Place

__all__ = ["PLUGIN", "NpzFormat", "NpzReader"]

_MEMBER, _EMPTY = b"PK\x03\x04", b"PK\x05\x06"
_NAME_AT = 30  # of the first member, whose length is 4 bytes before


class _Member:
    """One array of the archive, unpacked from first to last row."""

    def __init__(self, archive: zipfile.ZipFile, path: Place, name: str, handles: ExitStack) -> None:
        info = archive.getinfo(f"{name}.npy")
        self.path = path
        self.name = name
        self._stream = handles.enter_context(archive.open(info))
        header = read_npy_header(self._stream, path, name)
        self.shape, self.dtype = header
        self._position = 0
        if info.file_size != self._stream.tell() + header.data_bytes:
            expected = f"{self._stream.tell()} + {header.data_bytes} bytes for {header.dtype}{list(header.shape)}"
            raise ModelFileError(f"{path}: {name}.npy: expected {expected}, got {info.file_size}")

    def read_into(self, start: int, out: npt.NDArray[Any]) -> None:
        while self._position < start:
            self._next_piece(start)
        stop, first = start + len(out), 0
        while self._position < stop:
            piece = self._next_piece(stop)
            assign(out[first : first + len(piece)], piece, self.path, self.name)
            first += len(piece)
        if stop == self.shape[0] and self._stream.read(1):  # a read past the last byte also makes zipfile compare the CRC
            raise ModelFileError(f"{self.path}: {self.name}.npy goes on after its {stop} rows")

    def _next_piece(self, stop: int) -> npt.NDArray[Any]:
        row_bytes = self.dtype.itemsize * (self.shape[1] if len(self.shape) > 1 else 1)
        count = min(stop - self._position, piece_rows(row_bytes))
        data = self._stream.read(count * row_bytes)
        if len(data) < count * row_bytes:
            raise ModelFileError(f"{self.path}: {self.name}.npy ends within row {self._position + len(data) // row_bytes}")
        self._position += count
        return np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])


class NpzReader(SparseModelReader):
    """Streams the members of one archive."""

    def __init__(self, path: Place, dim: int | None, members: dict[str, _Member], names: list[str], handles: ExitStack) -> None:
        super().__init__(path, *check_arrays(path, members, dim, names), has_meta="meta" in members)
        self._members = with_scales(path, members)
        self.ignored = others(names, self._members)
        self.row_dtype = row_dtype(members)
        self._handles = handles.pop_all()

    def _fill(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        self._members[name].read_into(start, out)

    def _close(self) -> None:
        self._handles.close()


class NpzFormat(SparseModelFormat):
    """A zip archive of ``.npy`` members."""

    name = "npz"
    suffixes = (".npz",)
    reads_urls = True

    def detect(self, path: Place) -> bool:
        if not path.is_file():
            return False
        with open_file(path) as file:
            head = file.read(_NAME_AT + 256)
        name = head[_NAME_AT : _NAME_AT + int.from_bytes(head[26:28], "little")]
        return head.startswith(_EMPTY) or (head.startswith(_MEMBER) and name.endswith(b".npy"))

    def _open(self, path: Place, dim: int | None) -> NpzReader:
        with ExitStack() as handles:
            file = handles.enter_context(open_file(path))
            archive = handles.enter_context(zipfile.ZipFile(cast(IO[bytes], file)))
            names = archive.namelist()
            found = {name.removesuffix(".npy") for name in names if name.endswith(".npy")}
            members = {name: _Member(archive, path, name, handles) for name in sorted(found.intersection(NAMES))}
            return NpzReader(path, dim, members, [name.removesuffix(".npy") for name in names], handles)


PLUGIN = NpzFormat()
