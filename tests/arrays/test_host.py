"""Any array in, the same kind out (checklist N02, N03, C10): keys, outputs, protocols and devices.

The real frameworks are in test_interop_frameworks.py, capsules in test_dlpack.py.
"""

from __future__ import annotations

import array
import contextlib
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.steps import steps_of

from hps_numba.arrays.host import NUMPY, ArrayKind, as_keys, as_rows
from hps_numba.arrays.host_outputs import as_output, new_output, wrap_output
from hps_numba.errors import ArrayError, DeviceError, HpsError, KeyDtypeError

INTEGERS = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]


def naive_key(value: int, itemsize: int, key_bits: int) -> int:
    """Contracts, 'Keys and dtypes', for one value."""
    if key_bits == 64:
        return value - 2**64 if value >= 2**63 else value
    return value if itemsize == 8 else value % 2**32


class OnlyDlpack:
    """An array that knows DLPack and nothing else; ``old`` producers take no max_version."""

    def __init__(self, memory: np.ndarray, *, old: bool = False) -> None:
        self.memory, self.old = memory, old

    def __dlpack__(self, **options: Any) -> Any:
        if self.old and options:
            raise TypeError("unexpected keyword")
        return self.memory.__dlpack__(**options)


class OnlyInterface:
    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory
        self.__array_interface__ = memory.__array_interface__


class OnlyArray:
    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.memory.copy()


class OnGpu(OnlyDlpack):
    """Says that it is on a GPU; ``dlpack`` tells whether it can be copied to the host by DLPack."""

    def __init__(self, memory: np.ndarray, *, dlpack: bool = True) -> None:
        super().__init__(memory)
        self.dlpack = dlpack
        self.asked: dict[str, Any] = {}

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 3

    def __dlpack__(self, **options: Any) -> Any:
        self.asked = options
        if not self.dlpack:
            raise BufferError("this producer cannot copy to another device")
        return super().__dlpack__(**options)


class OnGpuWithGet(OnGpu):
    def get(self) -> np.ndarray:
        return self.memory.copy()


class OnlyCudaInterface:
    """``__cuda_array_interface__`` over host memory: good for metadata, not to be read."""

    def __init__(self, memory: np.ndarray) -> None:
        self.__cuda_array_interface__ = {**memory.__array_interface__, "version": 3}


def read_only(a: np.ndarray) -> np.ndarray:
    a.flags.writeable = False
    return a


# ---- keys: dtypes, shapes, strides ---------------------------------------------------------------------------------------


def unaligned(a: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"\0" + a.tobytes(), a.dtype, offset=1).reshape(a.shape)


LAYOUTS = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.T,
    "reversed": lambda a: a[..., ::-1] if a.ndim else a,
    "every_second": lambda a: a[::2] if a.ndim else a,
    "broadcast": lambda a: np.broadcast_to(a, (2, *a.shape)),
    "unaligned": lambda a: unaligned(a) if a.size else a,
}


@given(data=st.data(), dtype=st.sampled_from(INTEGERS), order=st.sampled_from("<>"), key_bits=st.sampled_from([64, 32]))
def test_keys_of_every_dtype_shape_and_stride(data: st.DataObject, dtype: str, order: str, key_bits: int) -> None:
    fitting = st.integers(0, 2**32 - 1) if dtype[1] == "8" and key_bits == 32 else None
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    base = data.draw(hnp.arrays(np.dtype(order + dtype), shapes, elements=fitting))
    keys = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](base)
    batch = as_keys(keys, key_bits=key_bits)
    assert batch.flat.tolist() == [naive_key(int(k), keys.itemsize, key_bits) for k in keys.flat]
    assert batch.flat.dtype == np.int64 and batch.flat.dtype.isnative and batch.flat.ndim == 1
    assert batch.flat.flags.c_contiguous and batch.flat.flags.aligned
    assert batch.shape == keys.shape and batch.kind == NUMPY


@given(keys=hnp.arrays(st.sampled_from([np.int64, np.uint64]), hnp.array_shapes(max_dims=3, max_side=4)))
def test_wide_values_in_32_bit_mode_fit_or_raise(keys: np.ndarray) -> None:
    bad = [(index, value) for index, value in np.ndenumerate(keys) if not 0 <= int(value) < 2**32]
    if not bad:
        assert as_keys(keys, key_bits=32).flat.tolist() == keys.ravel().tolist()
        return
    index, value = bad[0]
    with pytest.raises(KeyDtypeError, match=r"^ids\[") as error:
        as_keys(keys, key_bits=32, place="ids")
    assert str(error.value) == f"ids[{', '.join(map(str, index))}]: expected 32-bit keys in 0..4294967295, got {value}"


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("key_bits", [64, 32])
def test_keys_in_one_strided_dimension(dtype: str, key_bits: int) -> None:
    for keys in (np.arange(9, dtype=dtype)[::2], np.arange(9, dtype=dtype)[::-1], unaligned(np.arange(9, dtype=dtype))):
        flat = as_keys(keys, key_bits=key_bits).flat
        assert flat.tolist() == keys.tolist() and flat.flags.c_contiguous and flat.flags.aligned


def test_extremes_of_each_width() -> None:
    for value in (2**32, 2**63 - 1, -1):
        with pytest.raises(KeyDtypeError, match=rf"keys\[1\]: expected .*, got {value}$"):
            as_keys(np.array([2**32 - 1, value]), key_bits=32)
    assert as_keys(np.array([-1], np.int32), key_bits=32).flat.tolist() == [2**32 - 1]
    assert as_keys(np.array([-1], np.int8), key_bits=32).flat.tolist() == [2**32 - 1]
    assert as_keys(np.array([-1], np.int32), key_bits=64).flat.tolist() == [-1]
    assert as_keys(np.array([2**32 - 1], np.uint32), key_bits=64).flat.tolist() == [2**32 - 1]
    assert as_keys(np.array([2**64 - 1, 2**63], np.uint64), key_bits=64).flat.tolist() == [-1, -(2**63)]


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (0,), ()])
def test_contiguous_64_bit_keys_are_not_copied(dtype: type, shape: tuple[int, ...]) -> None:
    keys = np.zeros(shape, dtype)
    keys.flags.writeable = False
    for key_bits in (64, 32):
        batch = as_keys(keys, key_bits=key_bits)
        assert batch.flat.ctypes.data == keys.ctypes.data and batch.flat.size == keys.size


def test_scalar_keys_have_rank_0() -> None:
    for key in (7, np.int64(7), np.array(7), np.uint8(7)):
        batch = as_keys(key, key_bits=64)
        assert batch.flat.tolist() == [7] and batch.shape == ()


# ---- keys: lists ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "flat", "shape"),
    [
        ([], [], (0,)),
        ([[], []], [], (2, 0)),
        ((1, 2, 3), [1, 2, 3], (3,)),
        ([[1, 2], (3, 4)], [1, 2, 3, 4], (2, 2)),
        (range(3), [0, 1, 2], (3,)),
        ([-(2**63), 2**63 - 1], [-(2**63), 2**63 - 1], (2,)),
        ([2**63], [-(2**63)], (1,)),
        ([1, 2**63], [1, -(2**63)], (2,)),  # NumPy makes this float64, which would round
        ([[2**64 - 1], [2**53 + 1]], [-1, 2**53 + 1], (2, 1)),
        ([np.uint64(5), np.int64(2**53 + 1)], [5, 2**53 + 1], (2,)),
        ([np.int32(-1)], [-1], (1,)),
        (array.array("q", [4, 5]), [4, 5], (2,)),
    ],
)
def test_lists_in_64_bit_mode(keys: Any, flat: list[int], shape: tuple[int, ...]) -> None:
    batch = as_keys(keys, key_bits=64)
    assert (batch.flat.tolist(), batch.shape, batch.kind) == (flat, shape, NUMPY)


def test_lists_in_32_bit_mode() -> None:
    assert as_keys([0, 2**32 - 1], key_bits=32).flat.tolist() == [0, 2**32 - 1]
    assert as_keys([], key_bits=32).shape == (0,)
    assert as_keys([np.int32(-1)], key_bits=32).flat.tolist() == [2**32 - 1]
    for keys, message in (
        ([3, -1], r"keys\[1\]: expected .*0\.\.4294967295, got -1"),
        ([[0, 1], [2**32, -5]], r"keys\[1, 0\]: .*, got 4294967296"),
        ([1, 2**63], r"keys\[1\]: .*, got 9223372036854775808"),
        (-3, r"keys: .*, got -3"),
    ):
        with pytest.raises(KeyDtypeError, match=message):
            as_keys(keys, key_bits=32)


@pytest.mark.parametrize("key_bits", [64, 32])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([1, 2.5], r"keys\[1\]: expected integers, got 2.5 \(float\)"),
        ([True, None], r"keys\[0\]: expected integers, got True \(bool\)"),
        ([[1, 2], [None, 3]], r"keys\[1, 0\]: expected integers, got None \(NoneType\)"),
        ([1, [2, 3]], r"list cannot be read as an array of integers: ValueError: .*inhomogeneous"),
        ([[1], [2, 3]], "inhomogeneous"),
        ([-1, 2**63], r"keys\[1\]: expected int64 .* beside negative keys, got 9223372036854775808"),
        ([0, 2**64], r"keys\[1\]: expected uint64 .*, got 18446744073709551616"),
        (-(2**63) - 1, r"keys: expected int64 .*, got -9223372036854775809"),
        (["a", "b"], r"list of dtype <U1"),
        ("ab", "str of dtype <U2"),
        (b"ab", "bytes of dtype"),
        (True, "bool of dtype bool"),
        ([True, False], "list of dtype bool"),
        (1.0, "float of dtype float64"),
        (None, "NoneType of dtype object"),
        ({1, 2}, "set of dtype object"),
        (np.zeros(0), "numpy array of dtype float64"),
        (np.zeros(2, np.float32), "got numpy array of dtype float32"),
        (np.zeros(2, bool), "dtype bool"),
        (np.zeros(2, complex), "dtype complex128"),
        (np.array([1, 2], object), "dtype object"),
        (np.zeros(2, "datetime64[s]"), "dtype datetime64"),
        (np.zeros(2, [("key", np.int64)]), "dtype .*key"),
        (np.ma.masked_array([1, 2], [False, True]), "masked keys"),
        (np.float64(1), "float64 of dtype float64"),
    ],
)
def test_objects_that_are_not_keys_are_refused(keys: Any, message: str, key_bits: int) -> None:
    with pytest.raises(KeyDtypeError, match=message) as error:
        as_keys(keys, key_bits=key_bits)
    assert "\n" not in str(error.value) and isinstance(error.value, TypeError)


# ---- keys: protocols and devices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OnlyDlpack, OnlyInterface, OnlyArray, memoryview, np.ma.masked_array])
def test_protocols(kind: Any) -> None:
    memory = np.arange(12).reshape(3, 4)
    batch = as_keys(kind(memory), key_bits=64)
    assert (batch.flat.tolist(), batch.shape, batch.kind) == (list(range(12)), (3, 4), NUMPY)
    assert np.shares_memory(batch.flat, memory) == (kind is not OnlyArray)


def test_protocols_with_strides_and_old_producers() -> None:
    memory = np.arange(12, dtype=np.int32).reshape(3, 4)[::2, ::-1]
    for keys in (OnlyDlpack(memory), OnlyDlpack(memory, old=True), OnlyInterface(memory)):
        assert as_keys(keys, key_bits=64).flat.tolist() == memory.ravel().tolist()


def test_an_array_that_fails_is_a_key_dtype_error() -> None:
    class Failing:
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            raise ZeroDivisionError("two\nlines")

    with pytest.raises(KeyDtypeError, match=r"ids: Failing cannot be read .*: ZeroDivisionError: two lines"):
        as_keys(Failing(), key_bits=64, place="ids")


def test_gpu_keys_are_copied_by_dlpack() -> None:
    keys = OnGpu(np.arange(4).reshape(2, 2))
    batch = as_keys(keys, key_bits=64)
    assert (batch.flat.tolist(), batch.shape, batch.kind) == ([0, 1, 2, 3], (2, 2), NUMPY)
    assert keys.asked["dl_device"] == (1, 0) and keys.asked["copy"] is True


def test_gpu_keys_fall_back_on_their_own_method() -> None:
    assert as_keys(OnGpuWithGet(np.arange(3), dlpack=False), key_bits=64).flat.tolist() == [0, 1, 2]


def test_gpu_keys_that_cannot_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba.cuda", None)  # else a machine with a GPU would read the made-up address
    with pytest.raises(DeviceError, match=r"ids: OnGpu is on cuda:3 and cannot be copied .*cannot copy to another device"):
        as_keys(OnGpu(np.arange(3), dlpack=False), key_bits=64, place="ids")
    with pytest.raises(DeviceError, match="OnlyCudaInterface is on cuda and cannot be copied"):
        as_keys(OnlyCudaInterface(np.arange(3)), key_bits=64)


def test_gpu_outputs_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba.cuda", None)
    rows = np.zeros((2, 3), np.float32)
    with pytest.raises(DeviceError, match="out: OnGpu on cuda:3 cannot be written"):
        as_output(OnGpu(rows), (2, 3))
    with pytest.raises(DeviceError, match="out: OnlyCudaInterface on cuda cannot be written"):
        as_output(OnlyCudaInterface(rows), (2, 3))


class StandIn(OnGpu):
    """Stands in for a GPU array of CuPy (below) or of numba: what this package asks of either, over host memory."""

    def __init__(self, memory: np.ndarray, device: int = 3) -> None:
        super().__init__(memory, dlpack=False)
        self.device = contextlib.nullcontext(device)
        self.shape, self.dtype = memory.shape, memory.dtype
        self.__cuda_array_interface__ = {"data": (memory.ctypes.data, not memory.flags.writeable)}

    def get(self) -> np.ndarray:
        return self.memory.copy()

    def copy_to_device(self, rows: np.ndarray) -> None:
        self.memory[...] = rows

    def is_c_contiguous(self) -> bool:
        return self.memory.flags.c_contiguous

    def __setitem__(self, where: Any, rows: StandIn) -> None:
        self.copy_to_device(rows.memory)


class CupyArray(StandIn):
    __module__ = "cupy"


def test_a_framework_on_a_gpu_without_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(asarray=lambda rows: CupyArray(rows.copy())))
    keys = CupyArray(np.arange(4, dtype=np.int32).reshape(2, 2))
    batch = as_keys(keys, key_bits=64)
    assert (batch.flat.tolist(), batch.shape) == ([0, 1, 2, 3], (2, 2))
    assert batch.kind == ArrayKind("cupy", keys.device)
    answer = wrap_output(np.ones((2, 2, 3), np.float32), batch.kind)
    assert type(answer) is CupyArray and (answer.memory == 1).all()
    out = CupyArray(np.zeros((3, 2), np.float32).T)
    rows, finish = as_output(out, (2, 3))
    rows[...] = [[1, 2, 3], [4, 5, 6]]
    finish()
    assert out.memory.tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(ArrayError, match="out: expected dtype float32, got float64"):
        as_output(CupyArray(np.zeros((2, 3))), (2, 3))


def test_an_unknown_gpu_output_without_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba.cuda", types.SimpleNamespace(as_cuda_array=lambda array: array))
    out = StandIn(np.full((4, 3), 7, np.float32))
    rows, finish = as_output(out, (2, 3), larger=True)
    rows[...] = 1
    assert (out.memory == 7).all()
    finish()
    assert out.memory.tolist() == [[1] * 3] * 2 + [[7] * 3] * 2
    for memory in (np.zeros((3, 2), np.float32).T, read_only(np.zeros((2, 3), np.float32))):
        with pytest.raises(ArrayError, match="expected a writable and contiguous GPU array, got a read-only"):
            as_output(StandIn(memory), (2, 3))
    with pytest.raises(ArrayError, match=r"expected shape \(2, 3\), got \(4, 3\)"):
        as_output(out, (2, 3))


# ---- outputs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [[1, 2], (1,), 5, np.arange(3), np.int32(3), OnlyDlpack(np.arange(2)), OnGpu(np.arange(2))])
def test_output_of_numpy_kind_is_the_rows_themselves(keys: Any) -> None:
    kind = as_keys(keys, key_bits=64).kind
    rows = new_output(kind, (2, 3))
    assert type(rows) is np.ndarray and rows.dtype == np.float32 and rows.shape == (2, 3)
    assert wrap_output(rows, kind) is rows
    assert new_output(kind, (2, 0), np.float16).dtype == np.float16


@pytest.mark.parametrize("framework", ["tensorflow", "jax"])
@pytest.mark.parametrize("shape", [(), (0, 4), (3, 5), (2, 0, 3)])
def test_memory_for_frameworks_that_want_it_aligned(framework: str, shape: tuple[int, ...]) -> None:
    rows = new_output(ArrayKind(framework, "CPU:0"), shape)
    rows[...] = 1
    assert (rows.size == 0 or rows.ctypes.data % 64 == 0) and rows.shape == shape and rows.flags.carray


@given(data=st.data(), layout=st.sampled_from(["contiguous", "transposed", "reversed", "every_second", "unaligned"]))
def test_out_gets_every_row(data: st.DataObject, layout: str) -> None:
    base_shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4))
    memory = bytearray(4 * int(np.prod(base_shape)) + 1)
    base = np.frombuffer(memory, np.float32, offset=layout == "unaligned", count=int(np.prod(base_shape))).reshape(base_shape)
    out = base if layout == "unaligned" else LAYOUTS[layout](base)
    rows, finish = as_output(out, out.shape)
    assert rows.flags.carray and rows.shape == out.shape
    rows[...] = np.arange(1, out.size + 1).reshape(out.shape)
    if out.flags.carray and out.size:
        assert np.shares_memory(rows, out)
    finish()
    assert out.ravel().tolist() == list(range(1, out.size + 1))


@pytest.mark.parametrize("step", [1, 2])
def test_larger_out_keeps_its_tail(step: int) -> None:
    out = np.full(20, 7, np.float32)[::step]
    rows, finish = as_output(out, (3, 2), larger=True)
    rows[...] = [[0, 1], [2, 3], [4, 5]]
    finish()
    assert out.tolist() == [0, 1, 2, 3, 4, 5, *[7] * (len(out) - 6)]
    with pytest.raises(ArrayError, match=r"expected shape \(30, 2\) or more elements, got \(\d+,\)"):
        as_output(out, (30, 2), larger=True)


@pytest.mark.parametrize("kind", [OnlyInterface, memoryview, OnlyDlpack, lambda a: a.__dlpack__(), np.ma.masked_array])
def test_out_of_other_kinds_shares_memory(kind: Any) -> None:
    memory = np.zeros((2, 3), np.float32)
    rows, finish = as_output(kind(memory), (2, 3))
    rows[...] = 5
    finish()
    assert (memory == 5).all()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((2, 3)), "expected dtype float32, got float64"),
        (np.zeros((2, 3), ">f4"), "expected dtype float32, got >f4"),
        (np.zeros((3, 2), np.float32), r"expected shape \(2, 3\), got \(3, 2\)"),
        (np.zeros((4, 3), np.float32), r"got \(4, 3\)"),
        (read_only(np.zeros((2, 3), np.float32)), "read-only"),
        (OnlyDlpack(read_only(np.zeros((2, 3), np.float32))), "read-only"),
        (OnlyInterface(read_only(np.zeros((2, 3), np.float32))), "read-only"),
        (np.lib.stride_tricks.as_strided(np.zeros(3, np.float32), (2, 3), (0, 4)), "overlaps itself"),
        (np.lib.stride_tricks.as_strided(np.zeros(9, np.float32), (2, 3), (8, 4)), "overlaps itself"),
        (np.lib.stride_tricks.as_strided(np.zeros(9, np.float32)[8:], (2, 3), (-8, -4)), "overlaps itself"),
        (np.lib.stride_tricks.as_strided(np.zeros(9, np.float32), (2, 3), (12, 6)), "overlaps itself"),
        (OnlyArray(np.zeros((2, 3), np.float32)), "OnlyArray cannot be written from here: TypeError"),
        ([[0.0] * 3] * 2, "list cannot be written from here"),
        (b"0" * 24, "read-only"),
        (None, "NoneType cannot be written"),
    ],
)
def test_what_cannot_be_an_output_is_refused(out: Any, message: str) -> None:
    with pytest.raises(ArrayError, match=f"^answer: .*{message}") as error:
        as_output(out, (2, 3), place="answer")
    assert isinstance(error.value, HpsError) and isinstance(error.value, ValueError)


# ---- the module itself ---------------------------------------------------------------------------------------------------


def test_no_framework_is_imported() -> None:
    code = (
        "import sys, numpy as np\n"
        "from hps_numba.arrays.host import as_keys\n"
        "from hps_numba.arrays.host_outputs import wrap_output\n"
        "wrap_output(np.zeros(2), as_keys([1, 2], key_bits=64).kind)\n"
        "print([name for name in ('torch', 'tensorflow', 'cupy', 'jax', 'numba.cuda') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_contiguous_int64_takes_a_few_steps_of_python() -> None:
    keys = np.arange(64)
    assert 0 < steps_of(lambda: wrap_output(new_output(as_keys(keys, key_bits=64).kind, (64, 4)), NUMPY)) <= 15


# ---- rows of a write -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i4", "u1", ">f4"])
def test_rows_of_every_number_become_float32(dtype: str) -> None:
    rows = np.arange(6).reshape(3, 2).astype(dtype)
    got = as_rows(rows, (3, 2))
    assert got.dtype == np.float32 and got.flags.c_contiguous and got.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert as_rows(rows.tolist(), (3, 2)).tolist() == got.tolist()


def test_rows_that_are_float32_already_are_not_copied() -> None:
    rows = np.ones((3, 2), np.float32)
    assert np.shares_memory(as_rows(rows, (3, 2)), rows)


def test_rows_of_torch() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.nn.Embedding(3, 2).weight  # requires a gradient
    assert np.array_equal(as_rows(weight, (3, 2)), weight.detach().numpy())
    assert as_rows(torch.ones(3, 2, dtype=torch.bfloat16), (3, 2)).tolist() == [[1, 1]] * 3


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (np.ones((2, 3), np.float32), r"expected shape \(3, 2\), got \(2, 3\)"),
        ([[1.0], [2.0, 3.0]], "list cannot be read as float32 rows"),
        ([["a", "b"]] * 3, "expected dtype float32, got <U1"),
        (np.ones((3, 2), complex), "expected dtype float32, got complex128"),
        (object(), "object cannot be read|got object"),
        (np.full((3, 2), 1e300), "out of the range of float32"),
    ],
)
def test_objects_that_are_not_rows_are_refused(rows: object, said: str) -> None:
    with pytest.raises(ArrayError, match=said):
        as_rows(rows, (3, 2))
