"""Where an HDF5 dataset keeps its bytes, checked before HDF5 reads any of them.

Problem: libhdf5 trusts what a file says about itself. A chunk of 0 bytes under a checksum filter, or a filter with other
parameters than its writer gave it, ends the process; a chunk that is missing, or data in another file that is gone, reads as
zeros; and opening what a link or a virtual dataset points to may wait for a FIFO. Choice: links are followed here, one by one;
layout, filters, and address and size of every chunk are compared with the dataset's shape and the file's size. Turned down: a
helper process for each file, which costs every user a copy of the table for damage that these checks find.

The library comes as an argument: ``hdf5.py`` is the one place that imports it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from hps_numba.errors import ModelFileError
from hps_numba.storage.urls import Place

__all__ = ["check_storage", "chunk_counts", "find_dataset"]

_MAX_LINKS = 64
_SHUFFLE, _FLETCHER32 = 2, 3
_SAME_SIZE = {_SHUFFLE, _FLETCHER32}  # beside its checksum
_CHECKSUM_BYTES = 4
_UNSAFE = {4: "szip", 5: "nbit", 6: "scaleoffset"}  # their decoders trust what a chunk says: damaged bytes end the process


class _Chunk(NamedTuple):
    """One chunk as the file describes it; the fields of ``h5py``'s StoreInfo."""

    offset: tuple[int, ...]
    mask: int
    address: int | None
    size: int


def find_dataset(h5py: ModuleType, file: Any, path: Place, name: str) -> tuple[Any, bytes] | None:
    """Group and name of the dataset of this name in this very file, or None; no other file is opened on the way.

    Raises:
        ModelFileError: it is something else, or its data are in another file.
    """
    found = _follow(h5py, file, path, name)
    if found is None:
        return None
    group, entry = found
    kind = h5py.h5o.get_info(group, entry).type
    if kind != h5py.h5o.TYPE_DATASET:
        got = {h5py.h5o.TYPE_GROUP: "a Group", h5py.h5o.TYPE_NAMED_DATATYPE: "a Datatype"}.get(kind, "another object")
        raise ModelFileError(f"{path}: {name}: expected a dataset of numbers, got {got} without a shape")
    plist = h5py.h5d.open(group, entry).get_create_plist()
    if plist.get_layout() == h5py.h5d.VIRTUAL or plist.get_external_count():
        raise ModelFileError(f"{path}: {name}: expected data in this file, got data in another one")
    return found


def _follow(h5py: ModuleType, file: Any, path: Place, name: str) -> tuple[Any, bytes] | None:
    """Group and name of the hard link that a name leads to, through soft links; None if it leads nowhere."""
    root = h5py.h5g.open(file.id, b"/")
    group, pending = root, [name.encode()]
    for _ in range(_MAX_LINKS):
        part = pending.pop()
        if not group.links.exists(part):
            if part == name.encode() and group == root:
                return None
            raise ModelFileError(
                f"{path}: {name}: expected a dataset, got a link to {part.decode(errors='replace')!r}, which is missing"
            )
        kind = group.links.get_info(part).type
        if kind == h5py.h5l.TYPE_SOFT:
            target = group.links.get_val(part)
            group = root if target.startswith(b"/") else group
            pending += [piece for piece in reversed(target.split(b"/")) if piece not in (b"", b".")]
        elif kind != h5py.h5l.TYPE_HARD:
            raise ModelFileError(f"{path}: {name}: expected data in this file, got data in another one")
        elif not pending:
            return group, part
        else:
            group = h5py.h5g.open(group, part)
        if not pending:
            break
    raise ModelFileError(f"{path}: {name}: expected a dataset, got links that lead to none")


def chunk_counts(dataset: Any) -> list[int]:
    """Chunks along each dimension."""
    return [-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks, strict=True)]


def check_storage(h5py: ModuleType, path: Place, name: str, dataset: Any, file_bytes: int) -> None:
    """Compare the bytes that a dataset has in its file with what its shape and its filters need.

    Raises:
        ModelFileError: bytes are missing (HDF5 would give the fill value, usually zeros), lie beyond the end of the file, or
            are of a size that they cannot have.
    """
    if not dataset.size:
        return
    where = f"{path}: {name}"
    layout = dataset.id.get_create_plist().get_layout()
    if layout == h5py.h5d.CHUNKED:
        _check_chunks(where, dataset, _check_filters(where, dataset), file_bytes)
        return
    found = dataset.id.get_storage_size()
    if found < dataset.nbytes:
        raise ModelFileError(f"{where} has {found} of {dataset.nbytes} bytes; its writer did not finish")
    if layout == h5py.h5d.CONTIGUOUS:
        _check_span(where, dataset.id.get_offset(), dataset.nbytes, file_bytes)


def _check_filters(where: str, dataset: Any) -> list[int]:
    """Codes of the filters, in the order in which they were applied.

    Raises:
        ModelFileError: one of them cannot be used safely, or has other parameters than its writer gave it.
    """
    plist = dataset.id.get_create_plist()
    codes = []
    for index in range(plist.get_nfilters()):
        code, _, values, _ = plist.get_filter(index)
        if code in _UNSAFE:
            expected = "expected gzip, lzf, shuffle, fletcher32 or no filter"
            how = "write it again without: h5repack -f NONE OLD NEW"
            raise ModelFileError(
                f"{where}: {expected}, got {_UNSAFE[code]}, which ends the process if a byte is damaged; {how}"
            )
        if code == _SHUFFLE and tuple(values[:1]) != (dataset.dtype.itemsize,):
            raise ModelFileError(f"{where}: shuffle: expected elements of {dataset.dtype.itemsize} bytes, got {values}")
        codes.append(code)
    return codes


def _check_chunks(where: str, dataset: Any, codes: list[int], file_bytes: int) -> None:
    expected, found = math.prod(chunk_counts(dataset)), dataset.id.get_num_chunks()
    if found < expected:
        raise ModelFileError(f"{where} has {found} of {expected} chunks; its writer did not finish")
    if found > expected:
        raise ModelFileError(f"{where}: expected {expected} chunks, got {found}")
    chunk_bytes = math.prod(dataset.chunks) * dataset.dtype.itemsize
    spans = np.empty((found, 2), np.int64)
    seen = set()
    for number, chunk in enumerate(_chunks(dataset)):
        if number == found:
            raise ModelFileError(f"{where}: expected {found} chunks, got more")
        _check_chunk(where, dataset, chunk, codes, chunk_bytes)
        _check_span(f"{where}: chunk at {list(chunk.offset)}", chunk.address, chunk.size, file_bytes)
        spans[number] = chunk.address, chunk.size
        seen.add(chunk.offset)
    if len(seen) != found:
        raise ModelFileError(f"{where}: expected {found} chunks, got {len(seen)}")
    spans = spans[np.argsort(spans[:, 0])]
    if (spans[:-1].sum(axis=1) > spans[1:, 0]).any():
        raise ModelFileError(f"{where}: two chunks lie at the same address")


def _check_chunk(where: str, dataset: Any, chunk: _Chunk, codes: list[int], chunk_bytes: int) -> None:
    place = f"{where}: chunk at {list(chunk.offset)}"
    if any(
        start % step or start >= length for start, step, length in zip(chunk.offset, dataset.chunks, dataset.shape, strict=True)
    ):
        raise ModelFileError(f"{place}: expected the corner of a chunk within {list(dataset.shape)}")
    applied = [code for index, code in enumerate(codes) if not chunk.mask >> index & 1]
    if chunk.mask >> len(codes) or applied.count(_FLETCHER32) != codes.count(_FLETCHER32):
        raise ModelFileError(f"{place}: expected a mask of optional filters, got {chunk.mask:#x}")
    checksums = _CHECKSUM_BYTES * applied.count(_FLETCHER32)
    if not _SAME_SIZE.issuperset(applied):
        if not checksums < chunk.size:
            raise ModelFileError(f"{place}: expected more than {checksums} bytes, got {chunk.size}")
    elif chunk.size != chunk_bytes + checksums:
        raise ModelFileError(f"{place}: expected {chunk_bytes + checksums} bytes, got {chunk.size}")


def _check_span(place: str, address: int | None, size: int, file_bytes: int) -> None:
    if address is None or address < 0 or size < 0 or address + size > file_bytes:
        raise ModelFileError(f"{place}: expected {size} bytes within the file of {file_bytes}, got them at {address}")


def _chunks(dataset: Any) -> Iterable[_Chunk]:
    """All chunks: in one pass where HDF5 can, as asking for them by number takes a pass each."""
    found: list[_Chunk] = []
    number = dataset.id.get_num_chunks()

    def note(info: Any) -> bool | None:
        found.append(_chunk(info))
        return True if len(found) > number else None  # a damaged index may lead in circles

    if hasattr(dataset.id, "chunk_iter"):
        dataset.id.chunk_iter(note)
        return found
    return _by_number(dataset, number)


def _by_number(dataset: Any, number: int) -> Iterator[_Chunk]:
    for index in range(number):
        yield _chunk(dataset.id.get_chunk_info(index))


def _chunk(info: Any) -> _Chunk:
    return _Chunk(tuple(info.chunk_offset), info.filter_mask, info.byte_offset, info.size)
