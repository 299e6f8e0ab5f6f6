"""A call is opened once and its answer handed over once (in CUDA memory: test_pooled_lookups_on_device and others)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hps_numba.arrays.batch import HostBatch, check_rows
from hps_numba.arrays.encodings import KEY_ALIGNMENT, KEY_ENCODINGS, OUTPUT_TYPES, as_key
from hps_numba.errors import ArrayError, KeyDtypeError
from hps_numba.kernels.dtypes import KEY_FORMS


def answered(batch: HostBatch) -> Any:
    batch.rows[:] = batch.keys[:, None] + np.arange(batch.rows.shape[1])
    return batch.result()


def expected(keys: Any, dim: int) -> np.ndarray:
    return np.asarray(keys)[..., None] + np.arange(dim, dtype=np.float32)


@pytest.mark.parametrize("keys", [[1, 2, 3], np.arange(4), np.arange(6).reshape(2, 3), np.arange(0), 7, np.int32([[5]])])
@pytest.mark.parametrize("output_type", ["float32", "float16"])
def test_an_answer_has_the_shape_and_type_that_was_asked_for(keys: Any, output_type: str) -> None:
    rows = answered(HostBatch(keys, 3, output_type, 64))
    assert type(rows) is np.ndarray and rows.dtype == output_type and np.array_equal(rows, expected(keys, 3))


def test_plain_keys_and_rows_are_not_copied() -> None:
    keys, out = np.arange(4), np.empty((4, 3), np.float32)
    batch = HostBatch(keys, 3, "float32", 64, out)
    assert batch.keys is keys and batch.rows is out and batch.result() is out


@pytest.mark.parametrize("output_type", ["float32", "float16"])
@pytest.mark.parametrize("cut", [lambda memory: memory, lambda memory: memory[::2, ::2], lambda memory: memory.T])
def test_an_array_of_the_caller_is_written_in_any_layout(output_type: str, cut: Any) -> None:
    out = cut(np.zeros((4, 4), output_type))
    keys = np.arange(out.shape[0])
    batch = HostBatch(keys, out.shape[1], output_type, 64, out)
    assert batch.rows.dtype == np.float32 and batch.rows.flags.carray
    assert answered(batch) is out and np.array_equal(out, expected(keys, out.shape[1]))


def test_a_larger_array_is_written_at_its_start() -> None:
    out = np.full((3, 5), -1, np.float32)
    assert answered(HostBatch([4, 5], 3, "float32", 64, out, larger=True)) is out
    assert out.ravel()[:6].tolist() == [4, 5, 6, 5, 6, 7] and (out.ravel()[6:] == -1).all()
    with pytest.raises(ArrayError, match=r"out_tensor: expected shape \(2, 3\), got"):
        HostBatch([4, 5], 3, "float32", 64, out, out_name="out_tensor")


def test_an_answer_is_an_array_of_the_framework_of_the_keys() -> None:
    torch = pytest.importorskip("torch")
    rows = answered(HostBatch(torch.arange(6).reshape(2, 3), 4, "float16", 64))
    assert rows.dtype == torch.float16 and np.array_equal(rows.numpy(), expected(np.arange(6).reshape(2, 3), 4))


def test_types_that_numpy_lacks_are_refused() -> None:
    with pytest.raises(ArrayError, match="output_dtype: expected float32 or float16 for keys in host memory, got bfloat16"):
        HostBatch([1], 3, "bfloat16", 64)
    with pytest.raises(KeyDtypeError):
        HostBatch([1.5], 3, "float32", 64)


def test_rows_that_cannot_be_written_in_place_are_refused() -> None:
    check_rows(np.empty((2, 3), np.float32), (2, 3))
    for wrong in (np.empty((2, 3)), np.empty((3, 2), np.float32), np.empty((2, 6), np.float32)[:, ::2]):
        with pytest.raises(ArrayError, match=r"out: expected contiguous writable float32\[2, 3\], got "):
            check_rows(wrong, (2, 3))


def test_key_encodings_are_those_of_the_kernels() -> None:
    used = {encoding for by_dtype in KEY_ENCODINGS.values() for encoding in by_dtype.values()}
    assert used == set(KEY_FORMS) == set(KEY_ALIGNMENT)
    assert OUTPUT_TYPES == ("float32", "float16", "bfloat16")
    assert set(KEY_ENCODINGS[64]) == set(KEY_ENCODINGS[32])


@pytest.mark.parametrize(
    ("number", "bits", "key"),
    [(5, 64, 5), (-1, 64, -1), (2**64 - 1, 64, -1), (2**63, 64, -(2**63)), (-1, 32, 2**32 - 1), (2**32 - 1, 32, 2**32 - 1)],
)
def test_a_number_as_kernels_see_a_key(number: int, bits: int, key: int) -> None:
    assert as_key(number, key_bits=bits) == key
