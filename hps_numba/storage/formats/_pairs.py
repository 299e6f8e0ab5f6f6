"""A file of keys and a file of rows, raw: the number of rows and their width come from the two sizes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._arrays import Filler
from hps_numba.storage.formats._raw import JoinedArray, RawArray, RawFile, file_size, open_file
from hps_numba.storage.urls import Place

__all__ = ["open_pair", "open_shards"]


def open_pair(
    files: Sequence[RawFile], places: Sequence[Place], dtypes: Sequence[np.dtype[Any]], dim: int | None, *, offset: int = 0
) -> dict[str, RawArray]:
    """``key`` and ``emb_vector`` of a file of keys and a file of rows.

    Args:
        files, places, dtypes: of keys and of rows.   dim: width that rows must have; None takes it from the sizes.
        offset: of the first element in both.

    Raises:
        ModelFileError: the sizes do not fit together.
    """
    keys = _elements(files[0], places[0], dtypes[0], offset)
    values = _elements(files[1], places[1], dtypes[1], offset)
    width = _width(places[1], values, keys, dim, dtypes[1])
    return {
        "key": RawArray(files[0], places[0], "key", offset, (keys,), dtypes[0]),
        "emb_vector": RawArray(files[1], places[1], "emb_vector", offset, (keys, width), dtypes[1]),
    }


def _elements(file: RawFile, place: Place, dtype: np.dtype[Any], offset: int) -> int:
    size = file_size(file) - offset
    if size < 0 or size % dtype.itemsize:
        hint = "; are these int32 keys?" if dtype.kind in "iu" and size > 0 and size % 4 == 0 else ""
        expected = f"{offset} + a multiple of {dtype.itemsize}" if offset else f"a multiple of {dtype.itemsize}"
        raise ModelFileError(f"{place}: expected {expected} bytes ({dtype.name}), got {size + offset}{hint}")
    return size // dtype.itemsize


def _width(place: Place, values: int, keys: int, dim: int | None, dtype: np.dtype[Any]) -> int:
    if not keys and not values:
        if dim is None:
            raise ModelFileError(f"{place}: has no rows, so that their width is unknown; pass dim")
        return dim
    if not keys or not values or values % keys:
        raise ModelFileError(
            f"{place}: expected dim * {keys} {dtype.name} values for {keys} keys and a whole dim, got {values}"
        )
    if dim is not None and values != dim * keys:
        hints = {dim * keys: "", 2 * dim * keys: "; are the keys int32?"}
        if values * 2 == dim * keys:
            hints[values] = "; are these float16 rows?"
        raise ModelFileError(
            f"{place}: emb_vector: expected rows of width {dim}, {dim * keys} values for {keys} keys, "
            f"got {values // keys}, {values} values{hints.get(values, '')}"
        )
    return values // keys


def open_shards(
    path: Place, names: Sequence[Sequence[str]], dtypes: Sequence[np.dtype[Any]], dim: int | None, handles: ExitStack
) -> dict[str, Filler]:
    """``key``, ``emb_vector`` and perhaps ``meta`` of several pairs of files in one folder, one after another.

    Args:
        names: for each shard, those of its files of keys, of rows and, optionally, of int64 meta.
        handles: takes the open files.

    Raises:
        ModelFileError: a file is missing, or sizes do not fit together.
    """
    places = [[path / name for name in shard] for shard in names]
    files = [[handles.enter_context(open_file(place)) for place in shard] for shard in places]
    filled = next((number for number, shard in enumerate(files) if file_size(shard[0])), 0)  # one without rows tells no width
    width = int(open_pair(files[filled], places[filled], dtypes, dim)["emb_vector"].shape[1])
    opened = [open_pair(shard, place, dtypes, width) for shard, place in zip(files, places, strict=True)]
    arrays: dict[str, Filler] = {name: JoinedArray([pair[name] for pair in opened]) for name in ("key", "emb_vector")}
    if len(names[0]) > 2:
        arrays["meta"] = JoinedArray([_meta(shard[2], place[2], pair) for shard, place, pair in zip(files, places, opened)])
    return arrays


def _meta(file: RawFile, place: Place, pair: dict[str, RawArray]) -> RawArray:
    rows = pair["key"].shape[0]
    if file_size(file) != 8 * rows:
        raise ModelFileError(f"{place}: expected 8 * {rows} bytes (int64) for {rows} keys, got {file_size(file)}")
    return RawArray(file, place, "meta", 0, (rows,), np.dtype("<i8"))
