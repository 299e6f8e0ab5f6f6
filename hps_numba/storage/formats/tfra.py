"""A dump of TensorFlow Recommenders Addons (``save_to_file_system``): raw ``<name>-keys`` and ``<name>-values`` in one folder.

``<name>`` is ``<table>_mht_<i>of<n>_rank<r>_size<s>``: a pair of files for each of the n devices of each of the s processes.
Here they are one table, in the order of their numbers, and a missing one is an error. Any other name is a table of its own.

Dtypes and width are not recorded: keys are taken for int64 and values for float32, TFRA's defaults, and the width comes from
the sizes. With the width given, as in a config, the size of another dtype is an error.

Source: https://github.com/tensorflow/recommenders-addons,
``tensorflow_recommenders_addons/dynamic_embedding/core/kernels/cuckoo_hashtable_op.cc`` and
``tensorflow_recommenders_addons/dynamic_embedding/python/ops/dynamic_embedding_variable.py``.
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

__all__ = ["PLUGIN", "TfraFormat"]

_KEYS, _VALUES = "-keys", "-values"
_SHARD = re.compile(r"(?P<table>.+)_mht_(?P<device>\d+)of(?P<devices>\d+)(?:_rank(?P<rank>\d+)_size(?P<size>\d+))?")
_DTYPES = np.dtype("<i8"), np.dtype("<f4")


class TfraFormat(FormatOfTables):
    """A folder of raw files, two a shard."""

    name = "tfra"
    suffixes = (".tfra",)
    reads_urls = True

    def detect(self, path: Place) -> bool:
        return path.is_dir() and any(name != _KEYS and name.endswith(_KEYS) for name in names_in(path))

    def _open_table(self, path: Place, dim: int | None, table: str | None) -> RawArrayReader:
        if not path.is_dir():
            raise ModelFileError(f"{path}: expected a directory holding <name>{_KEYS} and <name>{_VALUES}, got a file")
        name, shards = pick_table(path, _tables(names_in(path)), table)
        ordered = check_complete(path, name, shards)
        with ExitStack() as handles:
            arrays = open_shards(path, [(f"{one}{_KEYS}", f"{one}{_VALUES}") for one in ordered], _DTYPES, dim, handles)
            return RawArrayReader(path, dim, arrays, handles, is_model=False)


def _tables(names: Iterable[str]) -> dict[str, tuple[str, dict[tuple[int, int, int, int], str]]]:
    """Table -> itself and its shards: (rank, processes, device, devices), counted from 0 -> the name without its ending."""
    found: dict[str, tuple[str, dict[tuple[int, int, int, int], str]]] = {}
    for stem in sorted(name.removesuffix(_KEYS) for name in names if name.endswith(_KEYS)):
        match = _SHARD.fullmatch(stem)
        table = match["table"] if match else stem
        place = (0, 1, 0, 1)
        if match:
            place = (int(match["rank"] or 0), int(match["size"] or 1), int(match["device"]) - 1, int(match["devices"]))
        if table:
            found.setdefault(table, (table, {}))[1][place] = stem
    return found


PLUGIN = TfraFormat()
