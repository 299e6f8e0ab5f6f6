"""A dump of NVIDIA's dynamicemb for TorchRec (``DynamicEmbDump``): raw files by table and rank in the folder of a collection.

``<table>_emb_keys.rank_<r>.world_size_<w>`` holds int64 keys, ``<table>_emb_values.rank_<r>.world_size_<w>`` float32 rows, and
``<table>_emb_scores...``, which tables that evict by another rule than LRU have, int64 scores; these are ``meta`` here. All
ranks are one table; a missing one is an error. The width comes from the sizes. ``_opt_values`` and ``_opt_args.json`` are not
read.

Source: https://github.com/NVIDIA/recsys-examples, ``corelib/dynamicemb/dynamicemb/dump_load.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import ExitStack

import numpy as np

from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._format import FormatOfTables
from hps_numba.storage.formats._pairs import open_shards
from hps_numba.storage.formats._raw import RawArrayReader, names_in
from hps_numba.storage.formats._shards import check_complete
from hps_numba.storage.formats._tables import pick_table
from hps_numba.storage.urls import Place

__all__ = ["PLUGIN", "DynamicembFormat"]

_KEYS = re.compile(r"(?P<table>.+)_emb_keys\.rank_(?P<rank>\d+)\.world_size_(?P<size>\d+)")
_DTYPES = np.dtype("<i8"), np.dtype("<f4")


class DynamicembFormat(FormatOfTables):
    """A folder of raw files, two or three a rank."""

    name = "dynamicemb"
    suffixes = (".dynamicemb",)
    reads_urls = True

    def detect(self, path: Place) -> bool:
        return path.is_dir() and any(_KEYS.fullmatch(name) for name in names_in(path))

    def _open_table(self, path: Place, dim: int | None, table: str | None) -> RawArrayReader:
        if not path.is_dir():
            raise ModelFileError(f"{path}: expected a directory holding <table>_emb_keys.rank_0.world_size_1, got a file")
        names = names_in(path)
        name, ranks = pick_table(path, _tables(names), table)
        ordered = check_complete(path, name, ranks)
        kinds = ["keys", "values", "scores"]
        endings = [key.removeprefix(f"{name}_emb_keys") for key in ordered]
        if not any(f"{name}_emb_scores{ending}" in names for ending in endings):
            kinds.remove("scores")
        files = [[f"{name}_emb_{kind}{ending}" for kind in kinds] for ending in endings]
        with ExitStack() as handles:
            return RawArrayReader(path, dim, open_shards(path, files, _DTYPES, dim, handles), handles, is_model=False)


def _tables(names: Iterable[str]) -> dict[str, tuple[str, dict[tuple[int, int, int, int], str]]]:
    """Table -> itself and its files of keys by (rank, ranks, 0, 1)."""
    found: dict[str, tuple[str, dict[tuple[int, int, int, int], str]]] = {}
    for name in names:
        if match := _KEYS.fullmatch(name):
            table = match["table"]
            found.setdefault(table, (table, {}))[1][int(match["rank"]), int(match["size"]), 0, 1] = name
    return found


PLUGIN = DynamicembFormat()
