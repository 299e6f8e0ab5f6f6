"""Any array in, the same kind out (checklist N02, N03): the real frameworks, on the CPU and on a GPU."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import pytest

from hps_numba.arrays.host import NUMPY, ArrayKind, as_keys, kind_of
from hps_numba.arrays.host_outputs import as_output, new_output, wrap_output
from hps_numba.errors import ArrayError, DeviceError, KeyDtypeError

# ---- Torch, TensorFlow, JAX ----------------------------------------------------------------------------------------------


def test_torch_keys_and_rows_are_not_copied() -> None:
    torch = pytest.importorskip("torch")
    keys = torch.arange(6).reshape(2, 3)
    batch = as_keys(keys, key_bits=64)
    assert batch.flat.ctypes.data == keys.data_ptr() and batch.shape == (2, 3)
    rows = new_output(batch.kind, (2, 3, 4))
    rows[...] = 3
    answer = wrap_output(rows, batch.kind)
    assert isinstance(answer, torch.Tensor) and answer.dtype == torch.float32 and answer.data_ptr() == rows.ctypes.data
    assert wrap_output(new_output(batch.kind, (0, 4)), batch.kind).shape == (0, 4)


@pytest.mark.parametrize("key_bits", [64, 32])
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_torch_dtypes_and_strides(dtype: str, key_bits: int) -> None:
    torch = pytest.importorskip("torch")
    values = np.array([[0, 1, 2], [100, 101, 127]]) - (100 if dtype in ("int8", "int16", "int32") else 0)
    keys = torch.from_numpy(values.astype(dtype)).T
    expected = [int(k) if key_bits == 64 or int(k) >= 0 else int(k) + 2**32 for k in values.T.ravel()]
    assert as_keys(keys, key_bits=key_bits).flat.tolist() == expected


def test_torch_kinds() -> None:
    torch = pytest.importorskip("torch")

    class Mine(torch.Tensor):
        pass

    assert as_keys(torch.tensor(5), key_bits=64).shape == ()
    assert kind_of(torch.zeros(1).as_subclass(Mine)) == ArrayKind("torch", torch.device("cpu"))
    assert as_keys(torch.nn.Parameter(torch.arange(2), requires_grad=False), key_bits=64).kind.framework == "torch"
    assert as_keys(torch.Size([2, 3]), key_bits=64).kind == NUMPY
    assert as_keys([torch.tensor(1), torch.tensor(2)], key_bits=64).flat.tolist() == [1, 2]


def test_torch_keys_that_are_refused() -> None:
    torch = pytest.importorskip("torch")
    for keys, message in (
        (torch.ones(2), "Tensor of dtype float32"),
        (torch.ones(2, dtype=torch.bfloat16), "Tensor of dtype torch.bfloat16"),
        (torch.ones(2, dtype=torch.bool), "Tensor of dtype bool"),
        (torch.ones(2, requires_grad=True), "requires grad"),
        (torch.eye(2, dtype=torch.int64).to_sparse(), "cannot be read as an array of integers: TypeError"),
        (torch.empty(2, dtype=torch.int64, device="meta"), "cannot be read as an array of integers"),
    ):
        with pytest.raises(KeyDtypeError, match=message):
            as_keys(keys, key_bits=64)


def test_torch_outputs() -> None:
    torch = pytest.importorskip("torch")
    for out in (torch.zeros(2, 3), torch.zeros(3, 2).T, torch.zeros(4, 6)[::2, ::2]):
        rows, finish = as_output(out, (2, 3))
        rows[...] = [[1, 2, 3], [4, 5, 6]]
        assert (rows.ctypes.data == out.data_ptr()) == out.is_contiguous()
        finish()
        assert out.tolist() == [[1, 2, 3], [4, 5, 6]]
    for out, message in (
        (torch.zeros(2, 3, requires_grad=True), "does not require grad"),
        (torch.zeros(1, 3).expand(2, 3), "overlaps itself"),
        (torch.zeros(9).as_strided((2, 3), (2, 1)), "overlaps itself"),
        (torch.zeros(2, 3, dtype=torch.float64), "expected dtype float32, got float64"),
        (torch.zeros(2, 3, dtype=torch.bfloat16), "cannot be written"),
        (torch.zeros(2, 3, device="meta"), "cannot be written"),
        (torch.zeros(2, 4), "shape"),
    ):
        with pytest.raises(ArrayError, match=message):
            as_output(out, (2, 3))


@pytest.fixture(scope="module")
def tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports warn
        return pytest.importorskip("tensorflow")


def test_tensorflow_round_trip(tensorflow: Any) -> None:
    tf = tensorflow
    for keys in (tf.constant([[1, 2], [3, 4]], tf.int64), tf.Variable([[1, 2], [3, 4]], dtype=tf.int64)):
        batch = as_keys(keys, key_bits=64)
        assert (batch.flat.tolist(), batch.shape, batch.kind.framework) == ([1, 2, 3, 4], (2, 2), "tensorflow")
        rows = new_output(batch.kind, (2, 2, 3))
        rows[...] = 2
        answer = wrap_output(rows, batch.kind)
        assert tf.is_tensor(answer) and answer.dtype == tf.float32 and np.asarray(answer).ctypes.data == rows.ctypes.data
        assert float(tf.reduce_sum(answer + answer)) == 48
    assert as_keys(tf.constant([-1], tf.int32), key_bits=32).flat.tolist() == [2**32 - 1]
    assert wrap_output(new_output(batch.kind, (0, 3)), batch.kind).shape == (0, 3)


def test_tensorflow_gets_no_unaligned_memory(tensorflow: Any) -> None:
    """A tensor over memory that is not aligned to 64 bytes makes TensorFlow's next op abort the process."""
    kind = kind_of(tensorflow.constant([1]))
    rows = new_output(kind, (33,))[1:]
    rows[...] = 1
    answer = wrap_output(rows, kind)
    assert float(tensorflow.reduce_sum(answer * 2 + answer)) == 96


def test_tensorflow_refusals(tensorflow: Any) -> None:
    tf = tensorflow
    for keys in (tf.constant([1.0]), tf.constant(["a"]), tf.ragged.constant([[1], [2, 3]]), tf.sparse.from_dense([[1]])):
        with pytest.raises(KeyDtypeError):
            as_keys(keys, key_bits=64)
    with pytest.raises(ArrayError, match="tensorflow arrays cannot be written"):
        as_output(tf.zeros((2, 3)), (2, 3))


def test_jax_round_trip() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax = pytest.importorskip("jax")
    keys = jax.numpy.arange(6).reshape(2, 3)
    batch = as_keys(keys, key_bits=64)
    assert (batch.flat.tolist(), batch.shape, batch.kind.framework) == (list(range(6)), (2, 3), "jax")
    rows = new_output(batch.kind, (2, 3, 4))
    rows[...] = 2
    answer = wrap_output(rows, batch.kind)
    assert isinstance(answer, jax.Array) and answer.shape == (2, 3, 4) and float(answer.sum()) == 48
    assert answer.device == keys.device
    with pytest.raises(KeyDtypeError):
        as_keys(keys.astype(np.float32), key_bits=64)
    with pytest.raises(ArrayError, match="jax arrays cannot be written"):
        as_output(answer, (2, 3, 4))


# ---- GPU -----------------------------------------------------------------------------------------------------------------


def torch_with_cuda() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch


def cupy_with_cuda() -> Any:
    cupy = pytest.importorskip("cupy")
    if not cupy.cuda.is_available():
        pytest.skip("no CUDA device")
    return cupy


@pytest.mark.gpu
def test_torch_on_gpu_round_trip() -> None:
    torch = torch_with_cuda()
    keys = torch.arange(6, device="cuda").reshape(2, 3).T
    batch = as_keys(keys, key_bits=64)
    assert (batch.flat.tolist(), batch.shape) == ([0, 3, 1, 4, 2, 5], (3, 2))
    rows = new_output(batch.kind, (3, 2, 4))
    rows[...] = np.arange(24).reshape(3, 2, 4)
    answer = wrap_output(rows, batch.kind)
    assert answer.device == keys.device and answer.flatten().tolist() == list(range(24))


@pytest.mark.gpu
def test_torch_on_gpu_keys_of_a_side_stream_are_waited_for() -> None:
    torch = torch_with_cuda()
    keys = torch.zeros(1000, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        keys += 7
        assert as_keys(keys, key_bits=64).flat.tolist() == [7] * 1000


@pytest.mark.gpu
def test_torch_on_gpu_outputs() -> None:
    torch = torch_with_cuda()
    for out in (torch.zeros(2, 3, device="cuda"), torch.zeros(3, 2, device="cuda").T):
        rows, finish = as_output(out, (2, 3))
        rows[...] = [[1, 2, 3], [4, 5, 6]]
        finish()
        assert out.tolist() == [[1, 2, 3], [4, 5, 6]]
    tail = torch.full((4, 3), 7.0, device="cuda")
    rows, finish = as_output(tail, (2, 3), larger=True)
    rows[...] = 1
    finish()
    assert tail.tolist() == [[1] * 3] * 2 + [[7] * 3] * 2
    with pytest.raises(ArrayError, match="expected dtype float32, got float16"):
        as_output(torch.zeros(2, 3, dtype=torch.float16, device="cuda"), (2, 3))


@pytest.mark.gpu
def test_torch_pinned_memory_is_host_memory() -> None:
    torch = torch_with_cuda()
    keys = torch.arange(4).pin_memory()
    assert as_keys(keys, key_bits=64).flat.ctypes.data == keys.data_ptr()
    assert as_keys(keys.__dlpack__(), key_bits=64).flat.ctypes.data == keys.data_ptr()


@pytest.mark.gpu
def test_capsules_on_gpu_name_their_device() -> None:
    torch = torch_with_cuda()
    with pytest.raises(DeviceError, match="keys: expected memory that the CPU can read, got a capsule on cuda:0"):
        as_keys(torch.arange(4, device="cuda").__dlpack__(), key_bits=64)
    with pytest.raises(DeviceError, match="out: expected memory that the CPU can read, got a capsule on cuda:0"):
        as_output(torch.zeros(2, 3, device="cuda").__dlpack__(), (2, 3))


@pytest.mark.gpu
def test_cupy_round_trip_and_outputs() -> None:
    cupy = cupy_with_cuda()
    keys = cupy.arange(6, dtype=np.int32).reshape(2, 3)[:, ::-1]
    batch = as_keys(keys, key_bits=64)
    assert (batch.flat.tolist(), batch.shape) == ([2, 1, 0, 5, 4, 3], (2, 3))
    rows = new_output(batch.kind, (2, 3, 4))
    rows[...] = 2
    answer = wrap_output(rows, batch.kind)
    assert isinstance(answer, cupy.ndarray) and answer.device == keys.device and float(answer.sum()) == 48
    out = cupy.zeros((3, 2), np.float32).T
    rows, finish = as_output(out, (2, 3))
    rows[...] = [[1, 2, 3], [4, 5, 6]]
    finish()
    assert out.get().tolist() == [[1, 2, 3], [4, 5, 6]]


class CudaInterfaceOf:
    def __init__(self, owner: Any) -> None:
        self.owner, self.__cuda_array_interface__ = owner, owner.__cuda_array_interface__


@pytest.mark.gpu
def test_arrays_with_only_a_cuda_array_interface_are_read_and_written_by_numba() -> None:
    torch = torch_with_cuda()
    pytest.importorskip("numba.cuda")
    assert as_keys(CudaInterfaceOf(torch.arange(4, device="cuda")), key_bits=64).flat.tolist() == [0, 1, 2, 3]
    out = torch.zeros(2, 3, device="cuda")
    rows, finish = as_output(CudaInterfaceOf(out), (2, 3))
    rows[...] = 5
    finish()
    assert out.tolist() == [[5] * 3] * 2
    with pytest.raises(ArrayError, match="non-contiguous"):
        as_output(CudaInterfaceOf(torch.zeros(3, 2, device="cuda").T), (2, 3))
