"""A server's lookups with arrays of any kind: the kind of the keys comes back, and DLPack capsules are read and written."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.oracles import EXTREME_32, assert_same_bits, rows_of

import hps_numba
from hps_numba.arrays.dlpack import capsule_of
from hps_numba.errors import ArrayError, KeyDtypeError, UnknownModelError

DIM = 3
INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


@pytest.fixture
def server(workshop: Workshop) -> hps_numba.HPS:
    return workshop.open(workshop.model((range(9), DIM)))


@pytest.fixture
def narrow(workshop: Workshop) -> hps_numba.HPS:
    return workshop.open(workshop.model((EXTREME_32, DIM)), supportlonglong=False)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("step", [1, 2, -1])
def test_numpy_keys_of_every_integer_type_and_stride(server: hps_numba.HPS, dtype: str, step: int) -> None:  # N03
    keys = np.array([[8, 0, 3, 3], [1, 2, 7, 5]], dtype)[:, ::step]
    assert_same_bits(server.lookup(keys, "m", 0), rows_of(keys, DIM))
    assert_same_bits(server.lookup(keys.T, "m", 0), rows_of(keys.T, DIM))
    assert_same_bits(server.lookup(keys.astype(keys.dtype.newbyteorder()), "m", 0), rows_of(keys, DIM))


INT64, INT32 = array.array("q", [1, 8]), array.array("i", [1, 8])


@pytest.mark.parametrize("keys", [[1, 8], (1, 8), range(1, 9, 7), INT64, memoryview(INT32)])
def test_python_sequences_are_keys(server: hps_numba.HPS, keys: Any) -> None:  # N02
    assert_same_bits(server.lookup(keys, "m", 0), rows_of([1, 8], DIM))


@pytest.mark.parametrize("keys", [[1.0], ["1"], [None], [[1], [2, 3]], np.array([True]), object()])
def test_keys_that_are_not_integers_are_refused(server: hps_numba.HPS, keys: Any) -> None:
    for call in (
        lambda: server.lookup(keys, "m", 0),
        lambda: server.lookup_fromdlpack(keys, np.empty((2, DIM), np.float32), "m", 0),
        lambda: server.erase(keys, "m", 0),
        lambda: server.contains(keys, "m", 0),
    ):
        with pytest.raises(KeyDtypeError, match="keys"):
            call()


def test_the_caller_may_write_to_the_returned_rows(server: hps_numba.HPS) -> None:
    rows = server.lookup([1, 2], "m", 0)
    rows[:] = 0
    assert_same_bits(server.lookup([1, 2], "m", 0), rows_of([1, 2], DIM))


# --- torch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "int16"])
def test_torch_keys_give_torch_rows(server: hps_numba.HPS, dtype: str) -> None:  # N03, P09 (server side)
    torch = pytest.importorskip("torch")
    keys = torch.tensor([[8, 0], [3, 99]], dtype=getattr(torch, dtype))
    rows = server.lookup(keys, "m", 0)
    assert isinstance(rows, torch.Tensor)
    assert (rows.dtype, tuple(rows.shape), rows.device.type) == (torch.float32, (2, 2, DIM), "cpu")
    assert_same_bits(rows.numpy()[0], rows_of([8, 0], DIM))
    assert (rows[1, 1] == -7.5).all()
    assert_same_bits(server.lookup(keys.t(), "m", 0).numpy(), rows.numpy().transpose(1, 0, 2))
    out = torch.full((2, 2, DIM), torch.nan)
    assert server.lookup(keys, "m", 0, out=out) is out
    assert torch.equal(out, rows)


def test_torch_rows_can_be_written(server: hps_numba.HPS) -> None:
    torch = pytest.importorskip("torch")
    rows = torch.from_numpy(rows_of([1, 50], DIM, 1))
    assert server.insert(torch.tensor([1, 50]), rows, "m", 0) == 1
    assert torch.equal(server.lookup(torch.tensor([1, 50]), "m", 0), rows)


def test_torch_keys_of_a_32_bit_server(narrow: hps_numba.HPS) -> None:  # C10, N03
    torch = pytest.importorskip("torch")
    keys = np.array(EXTREME_32, np.uint32)
    expected = rows_of(EXTREME_32, DIM)
    assert_same_bits(narrow.lookup(torch.from_numpy(keys.view(np.int32)), "m", 0).numpy(), expected)
    assert_same_bits(narrow.lookup(torch.from_numpy(keys.astype(np.int64)), "m", 0).numpy(), expected)


# --- DLPack -----------------------------------------------------------------------------------------------------------


def test_capsules_of_numpy_are_not_consumed(server: hps_numba.HPS) -> None:  # N03
    keys, out = np.array([8, 0, 99]), np.full((3, DIM), np.nan, np.float32)
    key_capsule, out_capsule = capsule_of(keys), capsule_of(out)
    for stamp in range(3):
        server.insert([0], rows_of([0], DIM, stamp), "m", 0)
        server.lookup_fromdlpack(key_capsule, out_capsule, "m", 0)
        assert_same_bits(out[:2], np.concatenate([rows_of([8], DIM), rows_of([0], DIM, stamp)]))
        assert (out[2] == -7.5).all()
        keys[2] = 98 - stamp  # the capsule shares the memory
    assert '"dltensor' in repr(key_capsule)  # a consumer would have named it "used_dltensor"


def test_capsules_of_torch_are_not_consumed(server: hps_numba.HPS) -> None:  # N03
    torch = pytest.importorskip("torch")
    keys, out = torch.tensor([[8, 0], [3, 99]]), torch.zeros(2, 2, DIM)
    key_capsule, out_capsule = torch.utils.dlpack.to_dlpack(keys), torch.utils.dlpack.to_dlpack(out)
    for _ in range(2):
        out.zero_()
        server.lookup_fromdlpack(key_capsule, out_capsule, "m", "sparse_embedding0")
        assert torch.equal(out, server.lookup(keys, "m", 0))
    assert torch.equal(torch.utils.dlpack.from_dlpack(out_capsule), out)  # still to be had by whoever it was made for


def test_capsules_with_strides_and_an_offset(server: hps_numba.HPS) -> None:  # N03
    keys = np.array([0, 8, 1, 7, 2, 6])[1::2]
    memory = np.full((5, 2 * DIM), np.nan, np.float32)
    server.lookup_fromdlpack(capsule_of(keys), capsule_of(memory[1:4, ::2]), "m", 0)
    assert_same_bits(memory[1:4, ::2], rows_of([8, 7, 6], DIM))
    assert np.isnan(memory[[0, 4]]).all()
    assert np.isnan(memory[:, 1::2]).all()


@pytest.mark.parametrize("shape", [(2 * DIM,), (3, DIM), (DIM, 2), (2, DIM + 2)])
def test_an_output_may_have_any_shape_with_room(server: hps_numba.HPS, shape: tuple[int, ...]) -> None:  # N03
    out = np.full(shape, np.nan, np.float32)
    server.lookup_fromdlpack(capsule_of(np.array([4, 5])), capsule_of(out), "m", 0)
    assert_same_bits(out.reshape(-1)[: 2 * DIM], rows_of([4, 5], DIM).reshape(-1))
    assert np.isnan(out.reshape(-1)[2 * DIM :]).all()


def test_capsules_of_int32_keys_in_32_bit_mode(narrow: hps_numba.HPS) -> None:  # C10, N03
    keys = np.array(EXTREME_32, np.uint32)
    for same in (keys, keys.view(np.int32), keys.astype(np.int64)):
        out = np.full((len(keys), DIM), np.nan, np.float32)
        narrow.lookup_fromdlpack(capsule_of(same), capsule_of(out), "m", 0)
        assert_same_bits(out, rows_of(keys, DIM))


def test_outputs_that_cannot_take_the_rows_are_refused(server: hps_numba.HPS) -> None:  # N03
    keys = capsule_of(np.array([1, 2]))
    frozen = np.zeros((2, DIM), np.float32)
    frozen.flags.writeable = False
    for out in (np.empty(2 * DIM - 1, np.float32), np.empty((2, DIM)), np.empty((2, DIM), np.int32), frozen, [[0.0] * DIM] * 2):
        with pytest.raises(ArrayError, match="out_tensor"):
            server.lookup_fromdlpack(keys, out if out is frozen or isinstance(out, list) else capsule_of(out), "m", 0)
    with pytest.raises(UnknownModelError):
        server.lookup_fromdlpack(keys, capsule_of(np.empty((2, DIM), np.float32)), "m", 1)


def test_dlpack_lookup_without_keys_writes_nothing(server: hps_numba.HPS) -> None:  # N03
    out = np.full((2, DIM), np.nan, np.float32)
    server.lookup_fromdlpack(capsule_of(np.empty(0, np.int64)), capsule_of(out), "m", 0)
    assert np.isnan(out).all()
