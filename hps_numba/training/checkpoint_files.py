"""A checkpoint of trained tables: one file with the rows, the optimizer states of the rows, and what the caller adds.

The file is a ``.npz`` archive, so that ``np.load`` reads it: ``checkpoint.json``, and for each table ``N.key``,
``N.emb_vector``, ``N.state_key`` and ``N.state``. One file, because a file can replace another in one step and a folder cannot:
a reader finds either the old one or the new one, complete, whenever a writer is killed. The file is written beside the old one,
flushed to disk, and then renamed (``runtime/replacing.py``); only a checkpoint is ever replaced by another.

Problem: a table that was half replaced when the file turned out to be damaged is worse than the error. Choice: before the first
row is used, every header, size, dtype and checksum is checked, in bounded memory. Members are stored, not compressed, so that
no small file can ask for a large memory.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from hps_numba.errors import HpsError, ModelFileError
from hps_numba.runtime.replacing import file_judge
from hps_numba.storage.formats._npy_header import NpyHeader, read_npy_header
from hps_numba.storage.formats._raw import file_size, open_file
from hps_numba.storage.replacing import head_judge, replacing
from hps_numba.storage.urls import Place

__all__ = ["CheckpointReader", "SavedTable", "open_checkpoint", "write_checkpoint"]

_VERSION = 1
_CHUNK_ROWS = 1 << 16
_ABOUT = "checkpoint.json"  # the first member, by which a checkpoint is known
_MAX_ABOUT_BYTES = 16 << 20
_BUFFER_BYTES = 1 << 20
_MAX_STEPS = 1 << 62
_KEY, _VALUE = np.dtype("<i8"), np.dtype("<f4")


def _is_checkpoint(head: bytes) -> bool:
    return head.startswith(b"PK\x03\x04") and head[30:].startswith(_ABOUT.encode())


_WHAT = "a checkpoint"
_JUDGE, _URL_JUDGE = file_judge(_WHAT, _is_checkpoint), head_judge(_WHAT, _is_checkpoint)
Read = Callable[[np.ndarray], np.ndarray]
"""From int64 keys ``[m]`` to float32 ``[m, width]``."""


@dataclass(frozen=True)
class SavedTable:
    """One table on its way to a file.

    Attributes:
        about: what identifies the table and its optimizer, as JSON values.
        keys: int64 ``[n]``.   dim: elements of a row.   rows: from some of the keys to their rows, float32 ``[m, dim]``.
        state_keys, state_width, states: the same for the optimizer states of rows.
    """

    about: Mapping[str, Any]
    keys: np.ndarray
    dim: int
    rows: Read
    state_keys: np.ndarray
    state_width: int
    states: Read


def write_checkpoint(path: Place, tables: Sequence[SavedTable], extra: Mapping[str, bytes]) -> None:
    """Write a checkpoint, replacing the one at ``path``, if any.

    Args:
        extra: more members of the archive, by names that do not begin with a dot.

    Raises:
        ModelFileError: it cannot be written, or there is something else than a checkpoint, which is left as it was.
    """
    with replacing(path, overwrite=True, judge=_JUDGE, url_judge=_URL_JUDGE) as target:
        try:
            with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                about = {"version": _VERSION, "tables": [dict(table.about) for table in tables]}
                archive.writestr(_ABOUT, json.dumps(about))
                for number, table in enumerate(tables):
                    _write(archive, f"{number}.key", table.keys)
                    _write(archive, f"{number}.emb_vector", table.keys, table.dim, table.rows)
                    _write(archive, f"{number}.state_key", table.state_keys)
                    _write(archive, f"{number}.state", table.state_keys, table.state_width, table.states)
                for name, content in extra.items():
                    archive.writestr(name, content)
        except OSError as problem:
            raise ModelFileError(f"{path}: cannot be written: {problem}") from problem


def _write(archive: zipfile.ZipFile, name: str, keys: np.ndarray, width: int = 0, read: Read | None = None) -> None:
    """Write one array: the keys, or what ``read`` returns for them."""
    shape = (len(keys),) if read is None else (len(keys), width)
    dtype = _KEY if read is None else _VALUE
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for some in _chunks(keys):
            file.write(np.ascontiguousarray(some if read is None else read(some), dtype).tobytes())


def _chunks(keys: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(keys), _CHUNK_ROWS):
        yield keys[start : start + _CHUNK_ROWS]


class CheckpointReader:
    """A complete checkpoint: opening it reads every byte, compares the checksums, and checks that all arrays fit together.

    Attributes:
        path: of the file.
        tables: ``SavedTable.about`` of each table; ``steps`` is an int of at least 0.

    Raises:
        ModelFileError: a member is damaged, missing or of another form, or the file is of another version.
    """

    def __init__(self, path: Place, archive: zipfile.ZipFile, size: int) -> None:
        self.path = path
        self._archive = archive
        self._check_members(size)
        self.tables = self._read_about()
        for number in range(len(self.tables)):
            self._check_table(number)
        damaged = archive.testzip()
        if damaged is not None:
            raise ModelFileError(f"{path}: {damaged} is damaged")

    def _check_members(self, size: int) -> None:
        """No member may be read whose size the file itself does not vouch for."""
        members = self._archive.infolist()
        if len({member.filename for member in members}) != len(members):
            raise ModelFileError(f"{self.path}: not a checkpoint: two members have the same name")
        for member in members:
            encrypted = member.flag_bits & 1
            if encrypted or member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                got = "an encrypted one" if encrypted else "a compressed one"
                raise ModelFileError(f"{self.path}: {member.filename}: expected a stored member, got {got}")
        if (total := sum(member.file_size for member in members)) > size:
            raise ModelFileError(f"{self.path}: expected {total} bytes of members, got a file of {size}")

    def _read_about(self) -> list[dict[str, Any]]:
        size = self._archive.getinfo(_ABOUT).file_size
        if size > _MAX_ABOUT_BYTES:
            raise ModelFileError(f"{self.path}: {_ABOUT}: expected {_MAX_ABOUT_BYTES} bytes at most, got {size}")
        about = json.loads(self._archive.read(_ABOUT))
        if not isinstance(about, dict) or isinstance(about.get("version"), bool) or about.get("version") != _VERSION:
            found = about.get("version") if isinstance(about, dict) else about
            raise ModelFileError(f"{self.path}: expected version {_VERSION}, got {found!r:.100}")
        tables = about.get("tables")
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise ModelFileError(f"{self.path}: {_ABOUT}: tables: expected a list of objects, got {tables!r:.100}")
        for number, table in enumerate(tables):
            steps = table.get("steps")
            if type(steps) is not int or not 0 <= steps <= _MAX_STEPS:
                expected = f"a number of 0 to {_MAX_STEPS}"
                raise ModelFileError(f"{self.path}: {_ABOUT}: tables[{number}].steps: expected {expected}, got {steps!r:.100}")
        return tables

    def _check_table(self, number: int) -> None:
        for keys, values in (("key", "emb_vector"), ("state_key", "state")):
            n = self._check_array(number, keys, _KEY, 1)[0]
            found = self._check_array(number, values, _VALUE, 2)[0]
            if n != found:
                raise ModelFileError(f"{self.path}: {number}.{values}: expected {n} rows, as {number}.{keys} has, got {found}")

    def _check_array(self, number: int, name: str, dtype: np.dtype[Any], rank: int) -> tuple[int, ...]:
        member = f"{number}.{name}.npy"
        with self._array(number, name) as (file, header):
            if header.dtype != dtype or len(header.shape) != rank or min(header.shape) < 0:
                expected = f"{dtype.name} ({dtype.str}) of {rank} dimension{'s' * (rank > 1)}"
                got = f"{header.dtype.name} ({header.dtype.str}) of shape {list(header.shape)}"
                raise ModelFileError(f"{self.path}: {member}: expected {expected}, got {got}")
            size, expected_size = self._archive.getinfo(member).file_size, file.tell() + header.data_bytes
            if size != expected_size:
                raise ModelFileError(f"{self.path}: {member}: expected {expected_size} bytes, as its header says, got {size}")
            return header.shape

    def shape(self, number: int, name: str) -> tuple[int, ...]:
        """Shape of an array of a table: ``key``, ``emb_vector``, ``state_key`` or ``state``."""
        with self._array(number, name) as (_, header):
            return header.shape

    def keys(self, number: int) -> np.ndarray:
        """int64 ``[n]``: the keys of a table.

        Raises:
            ModelFileError: the file was changed since it was opened.
        """
        with self._array(number, "key") as (file, header), _as_file_error(self.path):
            return np.frombuffer(_exactly(file, header.data_bytes), _KEY)

    def rows(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Keys and rows of a table, in chunks: int64 ``[m]``, float32 ``[m, dim]``; raises as :meth:`keys`."""
        return self._pairs(number, "key", "emb_vector")

    def states(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Keys and optimizer states of their rows, in chunks: int64 ``[m]``, float32 ``[m, width]``; raises as :meth:`keys`."""
        return self._pairs(number, "state_key", "state")

    def _pairs(self, number: int, keys: str, values: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with self._array(number, keys) as (first, _), self._array(number, values) as (second, header):
            n, width = header.shape
            for start in range(0, n, _CHUNK_ROWS):
                rows = min(_CHUNK_ROWS, n - start)
                with _as_file_error(self.path):
                    some = np.frombuffer(_exactly(first, 8 * rows), _KEY)
                    part = np.frombuffer(_exactly(second, 4 * width * rows), _VALUE).reshape(rows, width)
                yield some, part

    @contextmanager
    def _array(self, number: int, name: str) -> Iterator[tuple[IO[bytes], NpyHeader]]:
        member = f"{number}.{name}.npy"
        if member not in (names := self._archive.namelist()):
            raise ModelFileError(f"{self.path}: has no member {member}, found {', '.join(names)[:200] or 'none'}")
        with _as_file_error(self.path, f"{member}: "):
            file = self._archive.open(member)
            header = read_npy_header(file, self.path, member)
        with file:
            yield file, header

    def extra(self, name: str) -> bytes | None:
        """What the writer added under this name, or None."""
        with _as_file_error(self.path):
            return self._archive.read(name) if name in self._archive.namelist() else None


def _exactly(file: IO[bytes], size: int) -> bytes:
    content = file.read(size)
    if len(content) != size:
        raise EOFError(f"expected {size} more bytes, got {len(content)}")
    return content


@contextmanager
def _as_file_error(path: Place, member: str = "") -> Iterator[None]:
    """``zipfile`` and ``numpy`` raise about a dozen types about a damaged archive; here it is one."""
    try:
        yield
    except HpsError:
        raise
    except Exception as problem:
        text = " ".join(str(problem).split())[:300]
        raise ModelFileError(
            f"{path}: {member}not a checkpoint, or a damaged one: {type(problem).__name__}: {text}"
        ) from problem


@contextmanager
def open_checkpoint(path: Place) -> Iterator[CheckpointReader]:
    """A checkpoint, checked to be complete.

    Raises:
        ModelFileError: it is missing, damaged, not a regular file, or not a checkpoint.
    """
    with ExitStack() as handles:
        try:
            raw = handles.enter_context(open_file(path))
            file = handles.enter_context(io.BufferedReader(raw, _BUFFER_BYTES))
            archive = handles.enter_context(zipfile.ZipFile(file))
        except Exception as problem:
            text = str(problem).removeprefix(f"{path}: ")
            raise ModelFileError(f"{path}: cannot be read as a checkpoint: {text}") from problem
        with _as_file_error(path):
            reader = CheckpointReader(path, archive, file_size(raw))
        yield reader
