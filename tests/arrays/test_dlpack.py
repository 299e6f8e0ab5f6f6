"""DLPack capsules are read without being consumed (checklist N03): structs good and malformed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.capsules import Forged, drop, new_capsule

from hps_numba.arrays.dlpack import device_of, is_capsule, view_of_capsule
from hps_numba.arrays.host import as_keys
from hps_numba.arrays.host_outputs import as_output
from hps_numba.errors import ArrayError, DeviceError, KeyDtypeError


@pytest.mark.parametrize("versioned", [False, True])
@given(data=st.data(), dtype=st.sampled_from([np.int64, np.int32, np.uint64, np.uint32, np.float32, np.bool]))
def test_view_has_shape_strides_and_memory(versioned: bool, data: st.DataObject, dtype: Any) -> None:
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
    if array.ndim and data.draw(st.booleans()):
        array = array.T[::-2]
    capsule = array.__dlpack__(max_version=(1, 0) if versioned else None)
    for _ in range(2):  # not consumed: as often as one likes
        view = view_of_capsule(capsule)
        assert view.dtype == array.dtype and view.shape == array.shape
        assert np.array_equal(view, array, equal_nan=dtype is np.float32)
        assert view.size == 0 or (view.ctypes.data == array.ctypes.data and view.strides == array.strides)
        assert view.size == 0 or not view.flags.writeable
    assert ('"dltensor_versioned"' if versioned else '"dltensor"') in repr(capsule)


@pytest.mark.parametrize("versioned", [False, True])
def test_writable_view_writes_through(versioned: bool) -> None:
    array = np.zeros((2, 3), np.float32)
    view_of_capsule(array.__dlpack__(max_version=(1, 0) if versioned else None), writable=True)[...] = 4
    assert (array == 4).all()


def test_read_only_and_copied_memory_is_not_written() -> None:
    forged = Forged(versioned=True)
    for flags, message in ((1, "read-only"), (2, "a copy made for the export"), (3, "read-only")):
        forged.struct.flags = flags
        assert view_of_capsule(forged.capsule).tolist() == [0, 1, 2, 3, 4, 5]
        with pytest.raises(ArrayError, match=f"^out: .*{message}"):
            view_of_capsule(forged.capsule, writable=True, place="out", error=ArrayError)


def test_view_keeps_the_memory_alive() -> None:
    class Owner(np.ndarray):
        pass

    owner = np.arange(5).view(Owner)
    gone = weakref.ref(owner)
    view = view_of_capsule(owner.__dlpack__())
    del owner
    gc.collect()
    assert gone() is not None and view.tolist() == [0, 1, 2, 3, 4]
    del view
    gc.collect()
    assert gone() is None  # and lets it go: no leak


def test_strides_and_byte_offset() -> None:
    forged = Forged()
    forged.tensor.byte_offset = 8
    forged.shape((2, 2), (1, 3))
    assert view_of_capsule(forged.capsule).tolist() == [[1, 4], [2, 5]]
    forged.tensor.byte_offset = 40
    forged.shape((6,), (-1,))
    assert view_of_capsule(forged.capsule).tolist() == [5, 4, 3, 2, 1, 0]
    forged.tensor.byte_offset = 4
    forged.shape((5,), (1,))
    assert as_keys(forged.capsule, key_bits=64).flat.flags.aligned  # a copy: the view is not


def test_null_pointers_that_are_legal() -> None:
    forged = Forged()
    drop(forged.tensor, ndim=0, shape=None, strides=None)
    assert view_of_capsule(forged.capsule).tolist() == 0
    forged.shape((2, 3))  # no strides: C order
    assert view_of_capsule(forged.capsule).tolist() == [[0, 1, 2], [3, 4, 5]]
    forged.shape((3, 0))
    forged.tensor.data = None
    assert view_of_capsule(forged.capsule).shape == (3, 0)


@pytest.mark.parametrize("device", [1, 3, 11, 13])
def test_memory_that_the_cpu_can_read(device: int) -> None:
    forged = Forged()
    forged.tensor.device.type = device
    assert view_of_capsule(forged.capsule).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("device", "name"), [(2, "cuda:3"), (10, "rocm:3"), (8, "metal:3"), (99, "DLPack device type 99:3")])
def test_memory_elsewhere_is_a_device_error(device: int, name: str) -> None:
    forged = Forged()
    forged.tensor.device.type, forged.tensor.device.id = device, 3
    with pytest.raises(DeviceError, match=f"ids: expected memory that the CPU can read, got a capsule on {name}"):
        view_of_capsule(forged.capsule, place="ids")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ndim": -1}, "0 to 64 dimensions, got a capsule of -1"),
        ({"ndim": 65}, "0 to 64 dimensions, got a capsule of 65"),
        ({"shape": None}, "no shape pointer"),
        ({"data": None}, "no data pointer"),
    ],
)
def test_malformed_structs(fields: dict[str, Any], message: str) -> None:
    forged = Forged()
    drop(forged.tensor, **fields)
    with pytest.raises(KeyDtypeError, match=f"keys: .*{message}"):
        view_of_capsule(forged.capsule)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((-1,), "expected sizes of 0 or more"),
        ((0, -1), "expected sizes of 0 or more"),
        ((2**62, 2**62), "the capsule .* malformed"),
        ((0, 2**62, 2**62), "the capsule .* malformed"),
    ],
)
def test_malformed_shapes(shape: tuple[int, ...], message: str) -> None:
    forged = Forged()
    forged.shape(shape)
    with pytest.raises(KeyDtypeError, match=f"keys: .*{message}"):
        view_of_capsule(forged.capsule)


@pytest.mark.parametrize(
    ("code", "bits", "lanes"), [(0, 64, 2), (0, 64, 0), (0, 4, 1), (0, 128, 1), (4, 16, 1), (2, 8, 1), (200, 64, 1), (6, 64, 1)]
)
def test_dtypes_that_numpy_has_not(code: int, bits: int, lanes: int) -> None:
    forged = Forged()
    drop(forged.tensor.dtype, code=code, bits=bits, lanes=lanes)
    with pytest.raises(KeyDtypeError, match=r"NumPy has no|expected a dtype of NumPy, got DLPack dtype code"):
        view_of_capsule(forged.capsule)


def test_consumed_and_foreign_capsules() -> None:
    array = np.arange(3)
    capsule = array.__dlpack__()
    Taken = type("Taken", (), {"__dlpack__": lambda self, **_: capsule, "__dlpack_device__": lambda self: (1, 0)})
    assert np.from_dlpack(Taken()).tolist() == [0, 1, 2]
    with pytest.raises(
        KeyDtypeError,
        match=r"keys: expected .* owns its memory, got one that was consumed already \(used_dltensor\)",
    ):
        view_of_capsule(capsule)
    with pytest.raises(KeyDtypeError, match="expected 'dltensor' or 'dltensor_versioned', got a capsule named 'something'"):
        view_of_capsule(Forged(name="something").capsule)
    with pytest.raises(KeyDtypeError, match="expected 'dltensor' or 'dltensor_versioned', got a capsule named ''"):
        view_of_capsule(new_capsule(1, None, None))
    future = Forged(versioned=True)
    future.struct.major = 2
    with pytest.raises(KeyDtypeError, match=r"expected a capsule of DLPack 0\.x or 1\.x, got 2\.0"):
        view_of_capsule(future.capsule)


def test_objects_in_place_of_capsules() -> None:
    assert view_of_capsule(np.arange(3)).tolist() == [0, 1, 2]
    with pytest.raises(KeyDtypeError, match="keys: expected a DLPack capsule or an object with __dlpack__, got list"):
        view_of_capsule([1, 2])
    with pytest.raises(KeyDtypeError, match="keys: ndarray cannot be exported by DLPack"):
        view_of_capsule(np.array(["a"]))
    with pytest.raises(KeyDtypeError, match="__dlpack__ of Wrong: expected a capsule, got int"):
        view_of_capsule(type("Wrong", (), {"__dlpack__": lambda self, **_: 5})())


def test_is_capsule_and_device_of() -> None:
    assert is_capsule(np.arange(2).__dlpack__()) and not is_capsule(np.arange(2)) and not is_capsule("dltensor")
    assert device_of(np.arange(2)) is None and device_of(object()) is None
    assert device_of(type("There", (), {"__dlpack_device__": lambda self: (2, 1)})()) == "cuda:1"


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint64, np.uint32])
@pytest.mark.parametrize("key_bits", [64, 32])
def test_the_way_of_lookup_fromdlpack(dtype: Any, key_bits: int) -> None:
    """Keys and output by capsules, strided, the same ones twice."""
    keys = np.arange(8, dtype=dtype)[::2].__dlpack__()
    memory = np.zeros((3, 4), np.float32)
    out = memory.T.__dlpack__()
    for value in (1, 2):
        batch = as_keys(keys, key_bits=key_bits)
        assert batch.flat.tolist() == [0, 2, 4, 6]
        rows, finish = as_output(out, (4, 3), larger=True)
        rows[...] = value
        finish()
        assert (memory == value).all()
    with pytest.raises(KeyDtypeError, match="got PyCapsule of dtype float32"):
        as_keys(memory.__dlpack__(), key_bits=key_bits)
    with pytest.raises(ArrayError, match="expected dtype float32, got float64"):
        as_output(np.zeros((4, 3)).__dlpack__(), (4, 3))


def test_torch_capsules() -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.dlpack import to_dlpack

    keys, out = torch.arange(6)[::2], torch.zeros(3, 2)
    batch = as_keys(to_dlpack(keys), key_bits=64)
    rows, finish = as_output(to_dlpack(out), (3, 2))
    rows[...] = batch.flat[:, None]
    finish()
    assert out.tolist() == [[0, 0], [2, 2], [4, 4]]
