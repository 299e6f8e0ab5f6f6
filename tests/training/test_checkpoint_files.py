"""Checkpoints at URLs: complete, and only a checkpoint is replaced by another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.url_stores import Store, memory_store

from hps_numba.errors import ModelFileError
from hps_numba.storage.urls import UrlPath
from hps_numba.training.checkpoint_files import SavedTable, open_checkpoint, write_checkpoint

KEYS = np.arange(100) * 3
ABOUT = {"model": "m", "table": "t", "optimizer": "adam", "steps": 4}


@pytest.fixture
def store() -> Iterator[type[Store]]:
    with memory_store() as found:
        yield found


def table(scale: float = 1.0) -> SavedTable:
    def rows(keys: np.ndarray) -> np.ndarray:
        return np.repeat(np.float32(scale) * keys[:, None].astype(np.float32), 4, axis=1)

    return SavedTable(ABOUT, KEYS, 4, rows, KEYS[:10], 4, rows)


@pytest.mark.parametrize("scheme", ["store", "memory"])
def test_a_checkpoint_is_written_replaced_and_read(scheme: str, store: type[Store]) -> None:
    place = UrlPath.of(f"{scheme}://bucket/a.npz")
    for scale in (1.0, 2.0):
        write_checkpoint(place, [table(scale)], {"dense": b"weights"})
        with open_checkpoint(place) as file:
            assert file.tables == [ABOUT] and file.extra("dense") == b"weights"
            assert file.keys(0).tolist() == KEYS.tolist()
            ((keys, rows),) = file.rows(0)
            assert rows.tolist() == table(scale).rows(keys).tolist()
            ((keys, states),) = file.states(0)
            assert states.shape == (10, 4)


def test_what_is_no_checkpoint_is_not_replaced(store: type[Store]) -> None:
    store().pipe_file("store://b/a.npz", b"precious")
    with pytest.raises(ModelFileError, match="is a file, but not a checkpoint; it is not replaced"):
        write_checkpoint(UrlPath.of("store://b/a.npz"), [table()], {})
    assert store().cat("store://b/a.npz") == b"precious"
    with pytest.raises(ModelFileError, match=r"store://b/a\.npz: cannot be read as a checkpoint"), _opened("store://b/a.npz"):
        pass
    with pytest.raises(ModelFileError, match=r"store://b/none\.npz: cannot be read as a checkpoint: no such file"):
        _opened("store://b/none.npz").__enter__()


def _opened(url: str) -> Any:
    return open_checkpoint(UrlPath.of(url))
