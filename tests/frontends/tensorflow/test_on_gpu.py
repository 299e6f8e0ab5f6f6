"""Eager TensorFlow ids on a GPU, with NumPy in the place of CuPy and of the memory of the GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.framework_rig import DIM, ROWS, Rig, rig_of, tensorflow

import hps_numba
from hps_numba.server.direct_access import DirectAccess
from hps_numba.server.registry import SERVERS

tf, _, hps = tensorflow()
from hps_numba.frontends.tensorflow import on_gpu  # noqa: E402


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    yield rig_of(tmp_path)
    SERVERS.close()


class FakeCupy:
    """As much of CuPy as is used; it tells what was asked for."""

    def __init__(self) -> None:
        self.done: list[str] = []
        stream = SimpleNamespace(synchronize=lambda: self.done.append("wait"))
        self.cuda = SimpleNamespace(Device=lambda device: nullcontext(), get_current_stream=lambda: stream)

    def from_dlpack(self, array: Any) -> np.ndarray:
        assert array.__dlpack_device__() == (2, 0)
        self.done.append("ids")
        return np.asarray(array.__dlpack__(stream=1))


@pytest.fixture
def gpu(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    cupy = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(on_gpu, "_gpu_of", lambda tensor: 0)
    monkeypatch.setattr(DirectAccess, "cache_on", lambda *args: object())
    monkeypatch.setattr(tf.experimental.dlpack, "to_dlpack", lambda tensor: tensor.numpy())
    return cupy


def test_ids_and_rows_are_handed_over(rig: Rig, gpu: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def lookup(server: Any, keys: np.ndarray, model: str, table: Any) -> Any:
        given.append((keys, model, table))
        rows = rig.rows[keys]
        return SimpleNamespace(__dlpack__=lambda: rows)

    monkeypatch.setattr(hps_numba.HPS, "lookup", lookup)
    monkeypatch.setattr(tf.experimental.dlpack, "from_dlpack", lambda capsule: ("handed over", capsule))
    table = hps.Table("m", 0, DIM, rig.path)
    ids = tf.constant([[1, 2], [3, 4]], tf.int64)
    ((what, rows),) = on_gpu.rows_on_gpu(table.query(table.rows), [ids])
    assert what == "handed over" and np.array_equal(rows, rig.rows[[[1, 2], [3, 4]]])
    assert gpu.done == ["ids", "wait"]  # rows are complete before TensorFlow sees them
    assert [(model, number) for _, model, number in given] == [("m", 0)]


@pytest.mark.parametrize("why", ["no cache there", "not deployed there", "no CuPy", "pooled", "elsewhere"])
def test_otherwise_they_go_through_the_host(rig: Rig, gpu: FakeCupy, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    def not_there(*args: Any) -> None:
        raise hps_numba.DeviceError("device_id: not there")

    if why == "no cache there":
        monkeypatch.setattr(DirectAccess, "cache_on", lambda *args: None)
    elif why == "not deployed there":
        monkeypatch.setattr(DirectAccess, "cache_on", not_there)
    elif why == "no CuPy":
        monkeypatch.setitem(sys.modules, "cupy", None)
    elif why == "elsewhere":
        monkeypatch.setattr(on_gpu, "_gpu_of", lambda tensor: None)
    ids = np.random.default_rng(0).integers(0, ROWS, 9)
    table = hps.Table("m", 0, DIM, rig.path)
    if why == "pooled":
        sparse = tf.sparse.from_dense(ids[None] + 1)
        rows = hps.embedding_lookup_sparse(table, sparse, None, combiner="sum")
        assert rows.shape == (1, DIM)
    else:
        assert np.array_equal(hps.embedding_lookup(table, ids), rig.rows[ids])
    assert not gpu.done


def test_tensors_of_the_host_are_not_on_a_gpu() -> None:
    assert on_gpu._gpu_of(tf.constant([1])) is None
    assert on_gpu._gpu_of(object()) is None
    tensor = SimpleNamespace(backing_device="/job:localhost/replica:0/task:0/device:GPU:3")
    assert on_gpu._gpu_of(tensor) == 3
