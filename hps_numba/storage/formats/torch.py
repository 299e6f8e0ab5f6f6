"""A checkpoint of PyTorch or TorchRec: a file of ``torch.save`` whose matrices are tables; the row number is the key.

A table is a tensor of two dimensions. TorchRec calls them ``embedding_bags.<table>.weight`` and ``embeddings.<table>.weight``,
with the names of the modules before them; a matrix of another name (``emb.weight``) is a table by its full name only, unless it
is the only matrix of the file.

Problem: ``torch.load`` reads the whole file, or maps it into memory, so that a file that is cut short ends the process; and an
unpickler runs what a file asks for. Choice: the file is a zip archive of stored members, ``data.pkl`` and the bytes of each
storage. The pickle is read here with a list of the few names that plain tensors need, which become descriptions and never
tensors, and rows are read from the archive straight to their place; nothing needs to be installed. Turned down: sharded tensors
(``ShardedTensor``, ``DTensor``) and the folders of ``torch.distributed.checkpoint``, which hold what each rank had: save the
gathered state dict.

Source: https://github.com/pytorch/pytorch, ``torch/serialization.py`` and ``torch/_utils.py``; the names of tables:
https://github.com/pytorch/torchrec, ``torchrec/modules/embedding_modules.py``.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import IO, Any, NamedTuple, cast

import numpy as np

from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._arrays import BFLOAT16
from hps_numba.storage.formats._format import FormatOfTables
from hps_numba.storage.formats._raw import RawArray, RawArrayReader, RawFile, RowNumbers, file_size, open_file, read_exactly
from hps_numba.storage.formats._tables import pick_table
from hps_numba.storage.urls import Place

__all__ = ["PLUGIN", "TorchFormat"]

_MEMBER = b"PK\x03\x04"
_NAME_AT = 30
_PICKLE = "data.pkl"
_PICKLE_LIMIT = 64 << 20
_COLLECTIONS = ("embedding_bags", "embeddings")
_DTYPES: dict[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": BFLOAT16,
    "DoubleStorage": np.dtype("<f8"),
}
_OTHER_STORAGES = ("LongStorage", "IntStorage", "ShortStorage", "CharStorage", "ByteStorage", "BoolStorage")


class _Storage(NamedTuple):
    """Bytes in the archive: the name of their member, and of the dtype."""

    kind: str
    member: str


class _Tensor(NamedTuple):
    """What a tensor says of itself."""

    storage: Any
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFormat(FormatOfTables):
    """A zip archive that ``torch.save`` has written."""

    name = "torch"
    suffixes = (".pt", ".pth")
    reads_urls = True

    def detect(self, path: Place) -> bool:
        if not path.is_file():
            return False
        with open_file(path) as file:
            head = file.read(_NAME_AT + 256)
        name = head[_NAME_AT : _NAME_AT + int.from_bytes(head[26:28], "little")]
        return head.startswith(_MEMBER) and name.endswith(f"/{_PICKLE}".encode())

    def _open_table(self, path: Place, dim: int | None, table: str | None) -> RawArrayReader:
        with ExitStack() as handles:
            file = handles.enter_context(open_file(path))
            archive = handles.enter_context(zipfile.ZipFile(cast(IO[bytes], file)))
            folder = _folder(archive, path)
            matrices = _matrices(_content(archive, folder, path))
            matrix = _picked(path, matrices, table)
            rows = _array(archive, folder, file, path, matrix)
            return RawArrayReader(path, dim, {"key": RowNumbers(rows.shape[0]), "emb_vector": rows}, handles, is_model=False)


def _folder(archive: zipfile.ZipFile, path: Place) -> str:
    """The folder of the archive that everything lies in."""
    found = [name.removesuffix(_PICKLE) for name in archive.namelist() if name.endswith(f"/{_PICKLE}")]
    if len(found) != 1:
        raise ModelFileError(f"{path}: expected one member {_PICKLE}, as torch.save writes it, got {len(found)}")
    if f"{found[0]}byteorder" in archive.namelist() and archive.read(f"{found[0]}byteorder") != b"little":
        raise ModelFileError(f"{path}: expected little-endian tensors, got others")
    return found[0]


def _content(archive: zipfile.ZipFile, folder: str, path: Place) -> Any:
    """What was saved, with descriptions in place of tensors."""
    info = archive.getinfo(f"{folder}{_PICKLE}")
    if info.file_size > _PICKLE_LIMIT:
        raise ModelFileError(f"{path}: {info.filename}: expected {_PICKLE_LIMIT} bytes at most, got {info.file_size}")
    return _Unpickler(archive.read(info), path).load()


class _Unpickler(pickle.Unpickler):
    """Knows the names that plain tensors in dicts and lists need; any other is an error, and none runs code of the file."""

    def __init__(self, data: bytes, path: Place) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return {"_rebuild_tensor_v2": _tensor, "_rebuild_parameter": _parameter}[name]
        if module == "torch" and (name in _DTYPES or name in _OTHER_STORAGES):
            return _StorageType(name)
        if (module, name) == ("torch", "Size"):
            return tuple
        raise ModelFileError(
            f"{self._path}: expected plain tensors in dicts and lists, got a {module}.{name}; save the (gathered) state dict"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) >= 3 and pid[0] == "storage" and isinstance(pid[1], _StorageType)):
            raise ModelFileError(f"{self._path}: expected a reference to a storage, got {pid!r:.100}")
        return _Storage(pid[1].name, str(pid[2]))


class _StorageType:
    """A name such as ``FloatStorage``."""

    def __init__(self, name: str) -> None:
        self.name = name


def _tensor(storage: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _matrices(content: Any) -> dict[str, _Tensor]:
    """Full name -> tensor of two dimensions."""
    return {name: tensor for name, tensor in _named("", content, set()) if len(tensor.shape) == 2}


def _named(prefix: str, content: Any, seen: set[int]) -> Iterator[tuple[str, _Tensor]]:
    """Tensors with their full names; each dict is visited once, as a hostile file may lead in circles."""
    if isinstance(content, _Tensor):
        yield prefix or "tensor", content
    elif isinstance(content, Mapping) and id(content) not in seen:
        seen.add(id(content))
        for name, value in content.items():
            if isinstance(name, str):
                yield from _named(f"{prefix}.{name}" if prefix else name, value, seen)


def _picked(path: Place, matrices: Mapping[str, _Tensor], table: str | None) -> _Tensor:
    """The matrix of this name, full or TorchRec's; without a name the only table, or else the only matrix."""
    if table is not None and table in matrices:
        return matrices[table]
    tables: dict[str, list[str]] = {}
    for name in matrices:
        parts = name.split(".")
        if len(parts) > 2 and parts[-1] == "weight" and parts[-3] in _COLLECTIONS:
            tables.setdefault(parts[-2], []).append(name)
    named = {short: matrices[full[0]] for short, full in tables.items() if len(full) == 1}
    twice = [full for several in tables.values() if len(several) > 1 for full in several]
    if table is None and not tables:
        return pick_table(path, matrices, None)
    if table is None and twice:
        return pick_table(path, {**named, **{full: matrices[full] for full in twice}}, None)
    return pick_table(path, named, table, matrices if table is not None else ())


def _array(archive: zipfile.ZipFile, folder: str, file: RawFile, path: Place, matrix: _Tensor) -> RawArray:
    """Where the rows of a matrix lie in the file."""
    storage, shape = matrix.storage, matrix.shape
    if not isinstance(storage, _Storage) or storage.kind not in _DTYPES:
        got = storage.kind.removesuffix("Storage") if isinstance(storage, _Storage) else type(storage).__name__
        raise ModelFileError(f"{path}: expected a tensor of float32, float16, bfloat16 or float64, got {got}")
    numbers = (*shape, *matrix.strides, matrix.offset)
    if len(matrix.strides) != 2 or any(type(number) is not int or number < 0 for number in numbers):
        raise ModelFileError(f"{path}: expected sizes, strides and an offset of 0 or more, got {numbers!r:.200}")
    rows, columns = shape
    if math.prod(shape) and ((rows > 1 and matrix.strides[0] != columns) or (columns > 1 and matrix.strides[1] != 1)):
        raise ModelFileError(f"{path}: expected a contiguous tensor, got strides {list(matrix.strides)} of {list(shape)}")
    dtype = _DTYPES[storage.kind]
    info = archive.getinfo(f"{folder}data/{storage.member}")
    needed = (matrix.offset + math.prod(shape)) * dtype.itemsize
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
        raise ModelFileError(f"{path}: {info.filename}: expected a stored member, as torch.save writes it, got another one")
    if needed > info.file_size:
        raise ModelFileError(f"{path}: {info.filename}: expected {needed} bytes for {list(shape)}, got {info.file_size}")
    start = _data_offset(file, path, info) + matrix.offset * dtype.itemsize
    return RawArray(file, path, "emb_vector", start, (rows, columns), dtype)


def _data_offset(file: RawFile, path: Place, info: zipfile.ZipInfo) -> int:
    """Of the first byte of a stored member: after its local header, whose size differs from that in the directory."""
    head = np.empty(_NAME_AT, np.uint8)
    read_exactly(file, info.header_offset, head, path)
    raw = head.tobytes()
    if not raw.startswith(_MEMBER):
        raise ModelFileError(f"{path}: {info.filename}: expected a member at byte {info.header_offset}, got something else")
    start = info.header_offset + _NAME_AT + int.from_bytes(raw[26:28], "little") + int.from_bytes(raw[28:30], "little")
    if start + info.file_size > file_size(file):
        raise ModelFileError(
            f"{path}: {info.filename}: expected {info.file_size} bytes from byte {start} on, got a shorter file"
        )
    return start


PLUGIN = TorchFormat()
