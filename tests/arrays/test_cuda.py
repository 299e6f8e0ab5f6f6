"""Arrays in CUDA memory seen as addresses (checklist N02, N03): by stand-ins, and on a GPU by the marker.

The stand-ins hold host memory and say that it is on a GPU: what lies at an address can then be read here. Torch is the real
one, with a tensor class that lies about its device; CuPy, and Torch's streams, are made up.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.capsules import Forged, drop
from support.steps import steps_of

from hps_numba.arrays.cuda import DeviceKeys, as_device_keys, device_of_array
from hps_numba.arrays.cuda_memory import CudaOrigin
from hps_numba.arrays.cuda_outputs import as_device_output, new_device_output
from hps_numba.arrays.dlpack import cuda_device_of, cuda_memory_of
from hps_numba.arrays.host import NUMPY, ArrayKind
from hps_numba.arrays.streams import stream_handle
from hps_numba.device import driver as devices
from hps_numba.errors import ArrayError, CapacityError, DeviceError, HpsError, KeyDtypeError

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
READ_AS = {"int64": np.int64, "checked32_in_int64": np.int64, "int32": np.int32, "uint32": np.uint32}
LAYOUTS = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.T,
    "reversed": lambda a: a[..., ::-1] if a.ndim else a,
    "every_second": lambda a: a[::2] if a.ndim else a,
    "broadcast": lambda a: np.broadcast_to(a, (2, *a.shape)),
}


def naive_key(value: int, dtype: str, key_bits: int) -> int:
    """What the kernel is to see: contracts, 'Keys and dtypes', for one value."""
    if key_bits == 64 or dtype in ("int64", "uint64"):
        return value - 2**64 if value >= 2**63 else value
    return value % 2**32


def memory_at(address: int, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None) -> np.ndarray:
    """Host memory at an address, as an array that can be written."""
    interface = {"data": (address, False), "shape": shape, "typestr": np.dtype(dtype).str, "strides": strides, "version": 3}
    return np.asarray(types.SimpleNamespace(__array_interface__=interface)) if 0 not in shape else np.empty(shape, dtype)


def values(keys: DeviceKeys) -> list[int]:
    """The keys as a kernel would read them by ``address``, ``n`` and ``form``."""
    return [int(k) for k in memory_at(keys.address, (keys.n,), READ_AS[keys.form])]


# ---- stand-ins -----------------------------------------------------------------------------------------------------------


class FakeCupyArray:
    """``cupy.ndarray`` over host memory, as far as it is asked here."""

    device_id = 0

    def __init__(self, shape: Any, dtype: Any = None, memptr: Any = None, strides: Any = None) -> None:
        self.memory = shape if memptr is None else memory_at(memptr.ptr, shape, dtype, strides)
        self.keep = memptr

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self.memory.ctypes.data if self.size else 0, device_id=self.device_id)

    @property
    def flags(self) -> Any:
        return types.SimpleNamespace(c_contiguous=self.memory.flags.c_contiguous)

    def __getattr__(self, name: str) -> Any:
        if name not in ("shape", "dtype", "size", "strides", "itemsize"):
            raise AttributeError(name)
        return getattr(self.memory, name)

    def astype(self, dtype: Any, order: str) -> FakeCupyArray:
        FakeCupy.note("astype")
        return FakeCupyArray(self.memory.astype(dtype, order=order))

    def __setitem__(self, where: Any, rows: FakeCupyArray) -> None:
        FakeCupy.note("copy")
        self.memory[where] = rows.memory


class FakeCupy(types.ModuleType):
    """``cupy`` with two devices; ``log`` has what was asked, with the current device and stream."""

    ndarray, int32 = FakeCupyArray, np.int32
    current: ClassVar[list[tuple[int, int]]] = [(0, 77)]
    log: ClassVar[list[tuple[str, int, int]]] = []

    @classmethod
    def note(cls, what: str) -> None:
        cls.log.append((what, *cls.current[-1]))

    @classmethod
    @contextlib.contextmanager
    def place(cls, device: int, stream: int) -> Iterator[None]:
        cls.current.append((device, stream))
        yield
        cls.current.pop()

    def __init__(self) -> None:
        super().__init__("cupy")
        fake = type(self)

        class Device:
            def __init__(self, number: int) -> None:
                self.id, self.within = number, fake.place(number, 77 + number)

            def __enter__(self) -> None:
                self.within.__enter__()

            def __exit__(self, *_: Any) -> None:
                self.within.__exit__(None, None, None)

            def __str__(self) -> str:
                return f"<CUDA Device {self.id}>"

        self.cuda = types.SimpleNamespace(
            Device=Device,
            ExternalStream=lambda handle: fake.place(fake.current[-1][0], handle),
            get_current_stream=lambda device: types.SimpleNamespace(ptr=77 + device),
            runtime=types.SimpleNamespace(getDevice=lambda: fake.current[-1][0]),
            UnownedMemory=lambda address, size, owner, device: types.SimpleNamespace(ptr=address, owner=owner),
            MemoryPointer=lambda chunk, offset: chunk,
        )

    def empty(self, shape: Any, dtype: Any) -> FakeCupyArray:
        self.note("empty")
        array = FakeCupyArray(np.zeros(shape, dtype))
        array.device_id = self.current[-1][0]
        return array

    def ascontiguousarray(self, array: FakeCupyArray) -> FakeCupyArray:
        self.note("ascontiguousarray")
        return FakeCupyArray(np.array(array.memory, order="C"))


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    module = FakeCupy()
    FakeCupy.log.clear()
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(FakeCupyArray, "device_id", 0)
    return module


@pytest.fixture
def no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)


class Interface:
    """``__cuda_array_interface__`` over host memory."""

    def __init__(self, memory: np.ndarray, **more: Any) -> None:
        self.memory = memory
        whole = {"data": (memory.ctypes.data, not memory.flags.writeable), "version": 3}
        self.__cuda_array_interface__ = {**memory.__array_interface__, **whole, **more}


class Placed(Interface):
    """The same, with a device."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 1


class Capsule(Forged):
    """A DLPack capsule that says that its memory is on a CUDA device."""

    def __init__(self, memory: np.ndarray, device: int = 0, *, versioned: bool = False, code: int | None = None) -> None:
        super().__init__(versioned=versioned)
        self.memory = memory
        self.tensor.data = memory.ctypes.data if memory.size else None
        self.shape(memory.shape, tuple(stride // memory.itemsize for stride in memory.strides))
        self.tensor.device.type, self.tensor.device.id = 2, device
        self.tensor.dtype.bits = 8 * memory.itemsize
        self.tensor.dtype.code = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}[memory.dtype.kind] if code is None else code


_MADE: list[Capsule] = []


def capsule_of(*args: Any, **fields: Any) -> Any:
    """The capsule alone; its struct lives to the end of the tests."""
    _MADE.append(Capsule(*args, **fields))
    return _MADE[-1].capsule


class OnlyDlpack:
    """A producer of CUDA capsules that writes down for which stream."""

    def __init__(self, memory: np.ndarray, device: int = 1) -> None:
        self.forged, self.asked = Capsule(memory, device), []

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.forged.tensor.device.id

    def __dlpack__(self, **options: Any) -> Any:
        self.asked.append(options["stream"])
        return self.forged.capsule


class Driver(types.ModuleType):
    """``cuda.bindings.driver``: memory of this process is on device 1, the current device is 2."""

    status = 0

    def cuPointerGetAttribute(self, place: Any, attribute: Any, address: Any) -> int:
        """As the library itself has it: ``cuda.bindings`` gives 0 for every device."""
        assert attribute.value == 9 and address.value
        place._obj.value = 1
        return self.status

    def cuCtxGetDevice(self) -> tuple[int, int]:
        return self.status, 2


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    module = Driver("cuda.bindings.driver")
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", module)
    monkeypatch.setattr(devices, "driver_library", lambda: module)
    return module


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


# ---- device_of_array -----------------------------------------------------------------------------------------------------


def test_host_memory_has_no_device() -> None:
    class Mine(np.ndarray):
        pass

    torch = pytest.importorskip("torch")
    for array in (np.arange(3), np.arange(3).view(Mine), [1], (1,), 3, None, "a", {1}, np.int64(3), np.arange(3).__dlpack__()):
        assert device_of_array(array) is None
    for array in (torch.arange(3), torch.empty(3, device="meta"), torch.Size([1]), torch.float32):
        assert device_of_array(array) is None


def test_devices(cupy: FakeCupy, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, unknown = np.arange(3), Forged(name="something")
    assert device_of_array(FakeCupyArray(memory)) == 0
    assert device_of_array(Placed(memory)) == 1
    assert device_of_array(Interface(memory)) == 1
    assert device_of_array(Interface(memory, data=(0, False))) == 2
    assert device_of_array(OnlyDlpack(memory, 3)) == 3
    assert device_of_array(capsule_of(memory, 5)) == device_of_array(capsule_of(memory, 5, versioned=True)) == 5
    assert device_of_array(unknown.capsule) is None
    driver.status = 1
    assert device_of_array(Interface(memory)) is None
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    assert device_of_array(Interface(memory)) is None


@pytest.mark.parametrize("kind", [1, 3, 10, 13])
def test_memory_that_no_kernel_of_ours_needs_to_read_has_no_device(kind: int) -> None:
    class There:
        def __dlpack_device__(self) -> tuple[int, int]:
            return kind, 0

    forged = Capsule(np.arange(3))
    forged.tensor.device.type = kind
    assert device_of_array(There()) is None and device_of_array(forged.capsule) is None


def test_private_frameworks_are_left_to_the_host_path() -> None:
    for module in ("jaxlib._jax", "tensorflow.python.framework.ops"):
        array = type("Array", (OnlyDlpack,), {"__module__": module})(np.arange(3))
        assert device_of_array(array) is None
        name = module.partition(".")[0]
        with pytest.raises(DeviceError, match=f"^ids: {name} arrays cannot be served in CUDA memory"):
            as_device_keys(array, key_bits=64, place="ids")
        with pytest.raises(ArrayError, match=f"^out: {name} arrays cannot be written"):
            as_device_output(array, (3,), "float32", 0)


# ---- Torch: the real one, with tensors that lie --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_cuda() -> Any:
    """Makes a Torch tensor say that it is on cuda:1."""
    torch = pytest.importorskip("torch")

    class OnCuda(torch.Tensor):
        is_cuda = property(lambda self: True)

        def get_device(self) -> int:
            return 1

    return lambda tensor: tensor.as_subclass(OnCuda)


KEY_BITS = st.sampled_from([64, 32])
TORCH_LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.permute(tuple(reversed(range(t.ndim)))),
    "every_second": lambda t: t[::2] if t.ndim else t,
    "broadcast": lambda t: t.expand(2, *t.shape),
}


@given(
    data=st.data(),
    dtype=st.sampled_from(INTEGERS),
    key_bits=KEY_BITS,
    layout=st.sampled_from(sorted(TORCH_LAYOUTS)),
)
def test_torch_keys_of_every_dtype_shape_and_stride(on_cuda: Any, data: Any, dtype: str, key_bits: int, layout: str) -> None:
    import torch

    base = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)))
    keys, expected = TORCH_LAYOUTS[layout](torch.from_numpy(base)), LAYOUTS[layout](base)
    got = as_device_keys(on_cuda(keys), key_bits=key_bits)
    assert values(got) == [naive_key(int(k), dtype, key_bits) for k in expected.flat]
    assert type(got.shape) is tuple and (got.shape, got.n, got.device) == (expected.shape, expected.size, 1)
    assert got.kind == ArrayKind("torch", torch.device("cuda", 1))
    if dtype[-2:] in ("32", "64") and keys.is_contiguous():
        assert got.address == keys.data_ptr()


@pytest.mark.parametrize(
    ("dtype", "key_bits", "form"),
    [
        ("int64", 64, "int64"),
        ("uint64", 64, "int64"),
        ("int32", 64, "int32"),
        ("uint32", 64, "uint32"),
        ("int8", 64, "int32"),
        ("uint16", 64, "int32"),
        ("int64", 32, "checked32_in_int64"),
        ("uint64", 32, "checked32_in_int64"),
        ("int32", 32, "uint32"),
        ("uint32", 32, "uint32"),
        ("int16", 32, "uint32"),
        ("uint8", 32, "uint32"),
    ],
)
def test_forms(cupy: FakeCupy, on_cuda: Any, dtype: str, key_bits: int, form: str) -> None:
    import torch

    memory = np.zeros(3, dtype)
    for keys in (on_cuda(torch.from_numpy(memory)), FakeCupyArray(memory), Placed(memory), capsule_of(memory)):
        assert as_device_keys(keys, key_bits=key_bits).form == form


def test_torch_keys_that_are_refused(on_cuda: Any) -> None:
    import torch

    for keys, error, message in (
        (
            on_cuda(torch.ones(2)),
            KeyDtypeError,
            "expected integers (int64, int32, uint64, ...), got OnCuda of dtype float32",
        ),
        (on_cuda(torch.ones(2, dtype=torch.bool)), KeyDtypeError, "got OnCuda of dtype bool"),
        (on_cuda(torch.ones(2, dtype=torch.bfloat16)), KeyDtypeError, "got OnCuda of dtype bfloat16"),
        (
            on_cuda(torch.empty(2, dtype=torch.int64, device="meta")),
            DeviceError,
            "expected memory aligned to 8 bytes, got OnCuda at address 0x0",
        ),
        (torch.arange(2), DeviceError, "expected an array in CUDA memory, got Tensor in host memory"),
    ):
        with pytest.raises(error, match=r"^ids: ") as raised:
            as_device_keys(keys, key_bits=64, place="ids")
        assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_outputs(on_cuda: Any, dtype: str) -> None:
    import torch

    rows, address = new_device_output(ArrayKind("torch", torch.device("cpu")), (2, 3), dtype)
    assert (tuple(rows.shape), rows.dtype, rows.data_ptr()) == ((2, 3), getattr(torch, dtype), address)
    for base, layout in (((2, 3), "contiguous"), ((3, 2), "transposed"), ((4, 6), "strided")):
        plain = torch.zeros(base, dtype=getattr(torch, dtype))
        out = {"contiguous": plain, "transposed": plain.T, "strided": plain[::2, ::2]}[layout]
        address, finish, keep = as_device_output(on_cuda(out), (2, 3), dtype, 1)
        assert keep is not None and (address == out.data_ptr()) == (layout == "contiguous")
        memory_at(address, (2, 3), f"u{out.element_size()}")[...] = [[1, 2, 3], [4, 5, 6]]
        finish()
        bits = torch.int32 if dtype == "float32" else torch.int16
        assert out.contiguous().view(bits).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_larger_torch_outputs_keep_their_tail(on_cuda: Any) -> None:
    import torch

    for plain in (torch.full((20,), 7.0), torch.full((4, 5), 7.0), torch.full((40,), 7.0)[::2]):
        address, finish, _ = as_device_output(on_cuda(plain), (3, 2), "float32", 1, larger=True)
        memory_at(address, (3, 2), np.float32)[...] = [[0, 1], [2, 3], [4, 5]]
        finish()
        assert plain.flatten().tolist() == [0, 1, 2, 3, 4, 5, *[7] * 14]
    with pytest.raises(ArrayError, match=r"expected shape \(30, 2\) or more elements, got \(20,\)"):
        as_device_output(on_cuda(torch.zeros(20)), (30, 2), "float32", 1, larger=True)


def test_a_negated_view_is_written_through_a_temporary(on_cuda: Any) -> None:
    import torch

    whole = torch.zeros(1, dtype=torch.complex64)
    out = whole.conj().imag  # one element: contiguous, but negated when it is read
    assert out.is_contiguous() and out.is_neg()
    address, finish, _ = as_device_output(on_cuda(out), (1,), "float32", 1)
    memory_at(address, (1,), np.float32)[0] = 5
    finish()
    assert out.item() == 5 and whole.imag.item() == -5


def test_torch_outputs_that_are_refused(on_cuda: Any) -> None:
    import torch

    for out, error, message in (
        (on_cuda(torch.zeros(2, 3, requires_grad=True)), ArrayError, "expected a tensor that does not require grad"),
        (torch.zeros(2, 3), DeviceError, "got Tensor in host memory"),
        (on_cuda(torch.zeros(2, 3, dtype=torch.float64)), ArrayError, "expected dtype float32, got float64"),
        (on_cuda(torch.zeros(3, 2)), ArrayError, "expected shape (2, 3), got (3, 2)"),
        (on_cuda(torch.zeros(4, 3)), ArrayError, "expected shape (2, 3), got (4, 3)"),
        (on_cuda(torch.zeros(1, 3).expand(2, 3)), ArrayError, "got strides (0, 4): the array overlaps itself"),
        (on_cuda(torch.zeros(9).as_strided((2, 3), (2, 1))), ArrayError, "got strides (8, 4): the array overlaps itself"),
        (on_cuda(torch.zeros(2, 3, device="meta")), ArrayError, "got an array at address 0x0"),
    ):
        with pytest.raises(error, match=r"^answer: ") as raised:
            as_device_output(out, (2, 3), "float32", 1, place="answer")
        assert message in str(raised.value)
    with pytest.raises(DeviceError, match=r"^out: expected an array on cuda:0, as the keys, got one on cuda:1"):
        as_device_output(on_cuda(torch.zeros(2, 3)), (2, 3), "float32", 0)


def test_an_output_that_shares_memory_with_what_is_read_is_written_at_the_end(on_cuda: Any) -> None:
    import torch

    whole = torch.zeros(12)
    out = on_cuda(whole[2:8].view(2, 3))
    first = out.data_ptr()
    for read in ([(first - 8, 8)], [(first + 24, 100)], [(first, 0)], []):
        assert as_device_output(out, (2, 3), "float32", 1, read=read)[0] == first
    for read in ([(first - 8, 9)], [(first + 23, 1)], [(0, 4), (first - 100, 1000)]):
        address, finish, _ = as_device_output(out, (2, 3), "float32", 1, read=read)
        assert not first <= address < first + 24
        memory_at(address, (2, 3), np.float32)[...] = [[1, 2, 3], [4, 5, 6]]
        assert not whole.any()
        finish()
        assert whole.tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0]
        whole.zero_()


def test_cupy_outputs_that_share_memory_with_what_is_read(cupy: FakeCupy) -> None:
    memory = np.zeros((2, 3), np.float32)
    out = FakeCupyArray(memory)
    first = out.data.ptr
    assert as_device_output(out, (2, 3), "float32", 0, read=[(first - 8, 8)])[0] == first
    address, finish, _ = as_device_output(out, (2, 3), "float32", 0, read=[(first + 20, 8)])
    assert address != first
    memory_at(address, (2, 3), np.float32)[...] = 7
    finish()
    assert (memory == 7).all()


def test_a_copy_back_that_fails_is_an_output_error(on_cuda: Any) -> None:
    import torch

    with torch.inference_mode():
        out = torch.zeros(3, 2).T
    _, finish, _ = as_device_output(on_cuda(out), (2, 3), "float32", 1)
    with pytest.raises(ArrayError, match=r"^out: OnCuda cannot be written from here: RuntimeError: .*inference"):
        finish()


# ---- Torch's streams -----------------------------------------------------------------------------------------------------


class FakeTensor:
    """A Torch tensor on cuda:1 of which only the strides matter."""

    is_cuda, requires_grad, dtype, shape, device = True, False, "torch.float32", (2, 3), "cuda:1"

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)
        self.memory = np.zeros((2, 3), np.float32)

    def contiguous(self) -> FakeTensor:
        FakeTorch.note("contiguous")
        return FakeTensor()

    def to(self, dtype: Any, memory_format: Any) -> FakeTensor:
        FakeTorch.note("to")
        return FakeTensor()

    def copy_(self, rows: FakeTensor) -> None:
        FakeTorch.note("copy_")

    get_device = staticmethod(lambda: 1)
    is_contiguous = is_neg = staticmethod(lambda: False)
    stride = staticmethod(lambda: (1, 2))
    numel, element_size = staticmethod(lambda: 6), staticmethod(lambda: 4)

    def data_ptr(self) -> int:
        return self.memory.ctypes.data


class FakeTorch(types.ModuleType):
    """Torch's streams; ``log`` has what was asked, and on which stream. ``raw``: the cheap question is there."""

    Tensor, int32, contiguous_format = FakeTensor, "int32", "C"
    float32 = float16 = "a dtype"
    current: ClassVar[list[int]] = [77]
    log: ClassVar[list[tuple[str, int]]] = []

    @classmethod
    def note(cls, what: str) -> None:
        cls.log.append((what, cls.current[-1]))

    @classmethod
    @contextlib.contextmanager
    def stream(cls, handle: int) -> Iterator[None]:
        cls.current.append(handle)
        yield
        cls.current.pop()

    def __init__(self, raw: bool) -> None:
        super().__init__("torch")
        self.cuda = types.SimpleNamespace(
            is_initialized=lambda: True,
            current_stream=lambda device: types.SimpleNamespace(cuda_stream=self.current[-1] + device),
            default_stream=lambda device: 1000 + device,
            ExternalStream=lambda handle, device: handle,
            stream=self.stream,
        )
        self._C = types.SimpleNamespace(**({"_cuda_getCurrentRawStream": lambda d: self.current[-1] + d} if raw else {}))

    def device(self, kind: str, index: int) -> Any:
        return types.SimpleNamespace(type=kind, index=index)

    def empty(self, *_: Any, **__: Any) -> FakeTensor:
        self.note("empty")
        return FakeTensor()


@pytest.fixture
def torch_streams(monkeypatch: pytest.MonkeyPatch) -> FakeTorch:
    module = FakeTorch(raw=True)
    FakeTorch.log.clear()
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


@pytest.mark.parametrize("raw", [True, False])
def test_current_stream_of_torch(monkeypatch: pytest.MonkeyPatch, raw: bool) -> None:
    monkeypatch.setitem(sys.modules, "torch", FakeTorch(raw))
    assert stream_handle(None, ArrayKind("torch"), 3) == 80
    assert stream_handle(None, NUMPY, 2) == 79  # of no framework: Torch's


@pytest.mark.parametrize(("stream", "order"), [(None, 77), (78, 77), (5, 5), (0, 1001), (1, 1001)])
def test_torch_works_in_the_order_of_the_stream(torch_streams: FakeTorch, stream: int | None, order: int) -> None:
    """78 is the current stream of device 1: nothing to change."""
    kind = ArrayKind("torch", torch_streams.device("cuda", 1))
    as_device_keys(FakeTensor(dtype="torch.int64"), key_bits=64, stream=stream)
    as_device_keys(FakeTensor(dtype="torch.int8"), key_bits=64, stream=stream)
    new_device_output(kind, (2, 3), "float32", stream=stream)
    _, finish, _ = as_device_output(FakeTensor(), (2, 3), "float32", 1, stream=stream)
    finish()
    _, finish, _ = as_device_output(FakeTensor(), (3,), "float32", 1, stream=stream, larger=True)
    assert torch_streams.log == [(name, order) for name in ("contiguous", "to", "empty", "empty", "copy_", "empty", "copy_")]


def test_torch_has_no_per_thread_stream(torch_streams: FakeTorch) -> None:
    with pytest.raises(DeviceError, match=r"got the per-thread default stream \(2\)"):
        as_device_keys(FakeTensor(dtype="torch.int64"), key_bits=64, stream=2)


# ---- CuPy ----------------------------------------------------------------------------------------------------------------


@given(data=st.data(), dtype=st.sampled_from(INTEGERS), key_bits=KEY_BITS, layout=st.sampled_from(sorted(LAYOUTS)))
def test_keys_of_cupy_and_unknown_frameworks(data: Any, dtype: str, key_bits: int, layout: str) -> None:
    base = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)))
    memory = LAYOUTS[layout](base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", FakeCupy())
        for keys in (FakeCupyArray(memory), Placed(memory), OnlyDlpack(memory), capsule_of(memory)):
            got = as_device_keys(keys, key_bits=key_bits)
            assert values(got) == [naive_key(int(k), dtype, key_bits) for k in memory.flat]
            assert (got.shape, got.n) == (memory.shape, memory.size)
            assert got.kind.framework == ("cupy" if isinstance(keys, FakeCupyArray) else "cuda")
            if memory.size and dtype[-2:] in ("32", "64") and memory.flags.c_contiguous:
                assert got.address == memory.ctypes.data


def test_cupy_works_on_the_device_and_stream_of_the_lookup(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCupyArray, "device_id", 1)
    keys, out = FakeCupyArray(np.arange(6)[::2]), FakeCupyArray(np.zeros((3, 2), np.float32).T)
    for stream, order in ((None, 78), (5, 5)):
        cupy.log.clear()
        kind = as_device_keys(keys, key_bits=64, stream=stream).kind
        as_device_keys(FakeCupyArray(np.zeros(2, np.int8)), key_bits=64, stream=stream)
        rows, address = new_device_output(kind, (2, 3), "float16", stream=stream)
        assert (rows.shape, rows.dtype, rows.data.ptr, rows.data.device_id) == ((2, 3), np.float16, address, 1)
        _, finish, _ = as_device_output(out, (2, 3), "float32", 1, stream=stream)
        finish()
        assert cupy.log == [(name, 1, order) for name in ("ascontiguousarray", "astype", "empty", "empty", "copy")]
    assert kind.device.id == 1 and stream_handle(None, kind, 1) == 78
    assert cupy.current == [(0, 77)]


def test_cupy_outputs(cupy: FakeCupy) -> None:
    kind = as_device_keys(FakeCupyArray(np.arange(3)), key_bits=64).kind
    rows, address = new_device_output(kind, (0, 4), "float32")
    assert rows.shape == (0, 4) and address == 0 and cupy.log == [("empty", 0, 77)]
    for memory in (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32).T, np.zeros((4, 6), np.float32)[::-2, ::2]):
        address, finish, _ = as_device_output(FakeCupyArray(memory), (2, 3), "float32", 0)
        assert (address == memory.ctypes.data) == memory.flags.c_contiguous
        memory_at(address, (2, 3), np.float32)[...] = [[1, 2, 3], [4, 5, 6]]
        finish()
        assert memory.tolist() == [[1, 2, 3], [4, 5, 6]]
    tail = np.full(20, 7, np.float32)[::2]
    address, finish, _ = as_device_output(FakeCupyArray(tail), (3, 2), "float32", 0, larger=True)
    memory_at(address, (3, 2), np.float32)[...] = 1
    finish()
    assert tail.tolist() == [1] * 6 + [7] * 4


def test_cupy_keys_and_outputs_that_are_refused(cupy: FakeCupy) -> None:
    bytes_ = FakeCupyArray(np.zeros(17, np.uint8)[1:].view(np.int64))
    assert bytes_.data.ptr % 8
    with pytest.raises(DeviceError, match=r"^ids: expected memory aligned to 8 bytes, got FakeCupyArray at address 0x\w+"):
        as_device_keys(bytes_, key_bits=64, place="ids")
    with pytest.raises(KeyDtypeError, match="got FakeCupyArray of dtype float64"):
        as_device_keys(FakeCupyArray(np.zeros(3)), key_bits=32)
    with pytest.raises(ArrayError, match="expected dtype float32 or float16 for keys of cupy, got bfloat16"):
        new_device_output(ArrayKind("cupy", cupy.cuda.Device(0)), (2, 3), "bfloat16")
    with pytest.raises(ArrayError, match="overlaps itself"):
        as_device_output(FakeCupyArray(np.broadcast_to(np.zeros(3, np.float32), (2, 3))), (2, 3), "float32", 0)
    with pytest.raises(ArrayError, match="expected aligned memory"):
        as_device_output(FakeCupyArray(np.zeros(9, np.uint8)[1:].view(np.float32)), (2,), "float32", 0)


@pytest.mark.parametrize(("name", "error"), [("OutOfMemoryError", CapacityError), ("CUDARuntimeError", DeviceError)])
def test_what_cannot_be_allocated(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, name: str, error: type[HpsError]) -> None:
    def fail(self: Any, shape: Any, dtype: Any) -> Any:
        raise type(name, (Exception,), {})("two\nlines")

    monkeypatch.setattr(FakeCupy, "empty", fail)
    with pytest.raises(
        error, match=rf"^output: float32 rows of shape \(2, 3\) on cuda:1 cannot be allocated: {name}: two lines"
    ):
        new_device_output(ArrayKind("cuda", CudaOrigin(1, 0)), (2, 3), "float32")
    with pytest.raises(error, match="on <CUDA Device 1> cannot be allocated"):
        new_device_output(ArrayKind("cupy", cupy.cuda.Device(1)), (2, 3), "float32")


def test_outputs_of_other_kinds() -> None:
    with pytest.raises(ArrayError, match="expected dtype float32 or float16 or bfloat16 for keys of torch, got float64"):
        new_device_output(ArrayKind("torch"), (2, 3), "float64")
    with pytest.raises(DeviceError, match="got keys of numpy in host memory"):
        new_device_output(NUMPY, (2, 3), "float32")


# ---- unknown frameworks --------------------------------------------------------------------------------------------------


def test_an_unknown_framework_brings_its_stream(cupy: FakeCupy) -> None:
    for keys, stream in ((Placed(np.arange(6)[::2], stream=9), 9), (Placed(np.arange(6)[::2], stream=None), 0)):
        cupy.log.clear()
        got = as_device_keys(keys, key_bits=64)
        assert got.kind == ArrayKind("cuda", CudaOrigin(1, stream)) and stream_handle(None, got.kind, 1) == stream
        rows, _ = new_device_output(got.kind, (3, 2), "float32")
        assert type(rows) is FakeCupyArray
        as_device_keys(keys, key_bits=64, stream=4)
        new_device_output(got.kind, (3, 2), "float32", stream=4)
        names = ("ascontiguousarray", "empty")
        assert cupy.log == [(name, 1, order) for order in (stream, 4) for name in names]


def test_dlpack_is_asked_for_the_stream_of_the_lookup() -> None:
    keys = OnlyDlpack(np.arange(3))
    assert stream_handle(None, as_device_keys(keys, key_bits=64).kind, 1) == 0
    as_device_keys(keys, key_bits=64, stream=0)
    as_device_keys(keys, key_bits=64, stream=5)
    out = OnlyDlpack(np.zeros((2, 3), np.float32))
    as_device_output(out, (2, 3), "float32", 1, stream=6)
    assert (keys.asked, out.asked) == ([1, 1, 5], [6])  # the legacy stream is 1 in DLPack


def test_a_capsule_is_taken_for_the_framework_that_is_there(torch_streams: FakeTorch, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_a_capsule() -> int:
        return stream_handle(None, as_device_keys(capsule_of(np.arange(3), 1), key_bits=64).kind, 1)

    monkeypatch.setitem(sys.modules, "cupy", FakeCupy())
    assert of_a_capsule() == 78
    torch_streams.current.append(50)
    assert of_a_capsule() == 51
    torch_streams.current.pop()
    torch_streams.cuda.is_initialized = lambda: False
    assert of_a_capsule() == 78  # CuPy's
    monkeypatch.delitem(sys.modules, "cupy")
    assert of_a_capsule() == 0


@pytest.mark.parametrize("versioned", [True, False])
def test_capsules_of_keys_and_outputs_are_not_consumed(versioned: bool) -> None:
    """The way of ``lookup_fromdlpack``: the same capsules again and again."""
    keys, out = Capsule(np.arange(4), versioned=versioned), Capsule(np.zeros((5, 2), np.float32), versioned=versioned)
    for _ in range(2):
        assert as_device_keys(keys.capsule, key_bits=64).address == keys.memory.ctypes.data
        address, finish, keep = as_device_output(out.capsule, (4, 2), "float32", 0, larger=True)
        assert (address, keep) == (out.memory.ctypes.data, out.capsule)
        finish()
    keys.tensor.byte_offset = 8
    keys.shape((3,))
    assert values(as_device_keys(keys.capsule, key_bits=64)) == [1, 2, 3]


def test_a_capsule_of_bfloat16_is_written(cupy: FakeCupy) -> None:
    out = Capsule(np.zeros((3, 2), np.uint16).T, code=4)
    address, finish, _ = as_device_output(out.capsule, (2, 3), "bfloat16", 0)
    memory_at(address, (2, 3), np.uint16)[...] = [[1, 2, 3], [4, 5, 6]]
    finish()
    assert out.memory.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_capsules_that_are_refused() -> None:
    forged = Capsule(np.arange(3))
    for fields, message in (
        ({"data": None}, r"^ids: the capsule of shape \(3,\) has no data pointer"),
        ({"ndim": -1}, "^ids: expected 0 to 64 dimensions, got a capsule of -1"),
    ):
        bad = Capsule(np.arange(3))
        drop(bad.tensor, **fields)
        with pytest.raises(KeyDtypeError, match=message):
            as_device_keys(bad.capsule, key_bits=64, place="ids")
    forged.tensor.dtype.lanes = 2
    with pytest.raises(KeyDtypeError, match="got DLPack dtype code 0, 64 bits, 2 lanes"):
        as_device_keys(forged.capsule, key_bits=64)
    for kind, where in ((1, "host memory"), (10, "rocm:0")):
        forged.tensor.device.type = kind
        with pytest.raises(DeviceError, match=f"^keys: expected memory on a CUDA device, got a capsule on {where}"):
            as_device_keys(forged.capsule, key_bits=64)
    with pytest.raises(KeyDtypeError, match="got capsule of dtype float32"):
        as_device_keys(capsule_of(np.zeros(3, np.float32)), key_bits=64)
    with pytest.raises(KeyDtypeError, match="got capsule of dtype bool"):
        as_device_keys(capsule_of(np.zeros(3, bool)), key_bits=64)
    locked = Capsule(np.zeros(3, np.float32), versioned=True)
    locked.struct.flags = 1
    with pytest.raises(ArrayError, match=r"^out: expected a writable array"):
        as_device_output(locked.capsule, (3,), "float32", 0)


def test_what_dlpack_tells_of_cuda_memory() -> None:
    memory = np.zeros((2, 3), np.int16).T
    seen = cuda_memory_of(capsule_of(memory, 4), place="keys", error=KeyDtypeError)
    assert seen == (memory.ctypes.data, (3, 2), (2, 6), "int16", 2, 4, False)
    assert cuda_device_of(capsule_of(memory, 4)) == 4 and cuda_device_of(memory) is None and cuda_device_of(5) is None


def test_arrays_of_unknown_frameworks_that_are_refused(no_cupy: None, driver: Driver) -> None:
    big_endian, row = np.zeros(3, ">i8"), np.zeros((2, 3), np.float32)
    for keys, error, message in (
        (np.arange(3), DeviceError, "expected an array in CUDA memory, got ndarray in host memory"),
        ([1, 2], DeviceError, "got list in host memory"),
        (Placed(big_endian), KeyDtypeError, "got Placed of dtype >i8"),
        (Placed(np.arange(3), mask=np.zeros(3)), KeyDtypeError, "got a masked array"),
        (Placed(np.arange(3), data=(0, False)), DeviceError, "got Placed at address 0x0"),
        (Placed(np.arange(3), shape=None), KeyDtypeError, "Placed cannot be read as an array of integers in CUDA memory"),
        (Placed(np.arange(6)[::2]), DeviceError, "needs CuPy here, which does not import: ModuleNotFoundError"),
        (Placed(np.zeros(2, np.int8)), DeviceError, "needs CuPy here"),
    ):
        with pytest.raises(error, match=r"^ids: ") as raised:
            as_device_keys(keys, key_bits=64, place="ids")
        assert message in str(raised.value)
    for out, error, message in (
        (Placed(read_only(row.copy())), ArrayError, "expected a writable array, got a read-only one"),
        (Placed(row, mask=np.zeros(3)), ArrayError, "got a masked array"),
        (Placed(row.reshape(3, 2).T), DeviceError, "needs CuPy here"),
        (row, DeviceError, "got ndarray in host memory"),
        (Placed(row, shape=None), ArrayError, "Placed cannot be written from here: TypeError"),
        (object(), DeviceError, "got object in host memory"),
    ):
        with pytest.raises(error, match=r"^out: ") as raised:
            as_device_output(out, (2, 3), "float32", 1)
        assert message in str(raised.value)
    with pytest.raises(DeviceError, match=r"^output: an array of an unknown framework needs CuPy"):
        new_device_output(ArrayKind("cuda", CudaOrigin(0, 0)), (2, 3), "float32")


def test_arrays_without_a_device_are_looked_up_by_address(driver: Driver) -> None:
    assert as_device_keys(Interface(np.arange(3)), key_bits=64).device == 1
    assert as_device_keys(Interface(np.zeros((0, 2), np.int8), data=(0, False)), key_bits=64)[:3] == (0, 0, (0, 2))
    driver.status = 201
    assert as_device_keys(Interface(np.zeros(0, np.int64), data=(0, False)), key_bits=64).device == 0
    with pytest.raises(DeviceError, match=r"the driver does not know the memory at address 0x\w+: 201"):
        as_device_keys(Interface(np.arange(3)), key_bits=64)


# ---- streams that the caller names ---------------------------------------------------------------------------------------


class Protocol:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __cuda_stream__(self) -> Any:
        return self.answer


def test_streams_that_are_named(cupy: FakeCupy) -> None:
    kind = ArrayKind("cupy")
    assert [stream_handle(handle, kind, 0) for handle in (0, 1, 2, 2**47)] == [0, 1, 2, 2**47]
    assert stream_handle(Protocol((0, 11)), kind, 0) == 11
    assert stream_handle(types.SimpleNamespace(__cuda_stream__=(0, 12)), kind, 0) == 12  # its first form: an attribute
    assert stream_handle(types.SimpleNamespace(cuda_stream=13, device_index=3), kind, 3) == 13
    assert stream_handle(types.SimpleNamespace(ptr=14, device_id=-1), kind, 3) == 14


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ("side", "^stream: expected a handle, a Torch or CuPy stream or an object with __cuda_stream__, got str 'side'"),
        (True, "got bool True"),
        (-1, "got int -1"),
        (1.5, "got float 1.5"),
        (Protocol((1, 11)), "expected version 0 of __cuda_stream__, got 1"),
        (Protocol(None), "got Protocol .*"),
        (types.SimpleNamespace(cuda_stream=13, device_index=1), "expected a stream of cuda:0, got one of cuda:1"),
        (types.SimpleNamespace(ptr=13, device_id=2), "expected a stream of cuda:0, got one of cuda:2"),
    ],
)
def test_objects_that_are_not_streams_are_refused(stream: Any, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        stream_handle(stream, NUMPY, 0)


def test_no_framework_is_imported() -> None:
    code = (
        "import sys, numpy as np\n"
        "from hps_numba.arrays.cuda import device_of_array\n"
        "device_of_array(np.zeros(2)), device_of_array([1]), device_of_array({1: 2})\n"
        "print([name for name in ('torch', 'tensorflow', 'cupy', 'jax', 'numba', 'cuda') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- GPU -----------------------------------------------------------------------------------------------------------------


def torch_with_cuda(devices: int = 1) -> Any:
    torch = pytest.importorskip("torch")
    if torch.cuda.device_count() < devices:
        pytest.skip(f"needs {devices} CUDA devices")
    return torch


def cupy_with_cuda(devices: int = 1) -> Any:
    cupy = pytest.importorskip("cupy")
    if not cupy.cuda.is_available() or cupy.cuda.runtime.getDeviceCount() < devices:
        pytest.skip(f"needs {devices} CUDA devices")
    return cupy


def on_host(cupy: Any, keys: DeviceKeys) -> list[int]:
    """What lies at the address, copied by CuPy."""
    if not keys.n:
        return []
    chunk = cupy.cuda.UnownedMemory(keys.address, 8 * keys.n, keys.keep, keys.device)
    with cupy.cuda.Device(keys.device):
        cupy.cuda.runtime.deviceSynchronize()
        return cupy.ndarray((keys.n,), READ_AS[keys.form], cupy.cuda.MemoryPointer(chunk, 0)).get().tolist()


def write(cupy: Any, address: int, rows: np.ndarray) -> None:
    """What a kernel would do: rows to an address."""
    cupy.cuda.runtime.memcpy(address, rows.ctypes.data, rows.nbytes, cupy.cuda.runtime.memcpyHostToDevice)


class OnlyInterface:
    def __init__(self, owner: Any) -> None:
        self.owner, self.__cuda_array_interface__ = owner, owner.__cuda_array_interface__


@pytest.mark.gpu
@pytest.mark.parametrize("key_bits", [64, 32])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_gpu_keys_of_every_dtype_and_stride(dtype: str, key_bits: int) -> None:
    torch, cupy = torch_with_cuda(), cupy_with_cuda()
    base = np.arange(24).reshape(4, 6) - (11 if dtype.startswith("i") else 0)
    for cut in (lambda a: a, lambda a: a.T, lambda a: a[::2, 1:], lambda a: a[:0], lambda a: a[2, 3]):
        expected = [naive_key(int(k), dtype, key_bits) for k in cut(base).ravel()]
        keys = cut(torch.from_numpy(base.astype(dtype)).cuda())
        others = cut(cupy.asarray(base.astype(dtype)))
        for array in (keys, keys.__dlpack__(), others, others.__dlpack__(), OnlyInterface(others)):
            assert device_of_array(array) == 0
            got = as_device_keys(array, key_bits=key_bits)
            assert on_host(cupy, got) == expected and got.shape == cut(base).shape


@pytest.mark.gpu
def test_gpu_arrays_are_not_copied() -> None:
    torch, cupy = torch_with_cuda(), cupy_with_cuda()
    keys, others = torch.arange(6, device="cuda").reshape(2, 3), cupy.arange(6).reshape(2, 3)
    for array, address in ((keys, keys.data_ptr()), (keys.__dlpack__(), keys.data_ptr()), (others, others.data.ptr)):
        assert as_device_keys(array, key_bits=64).address == address
    out = torch.zeros(2, 3, device="cuda")
    for array in (out, out.__dlpack__(), OnlyInterface(out), cupy.from_dlpack(out)):
        address, finish, _ = as_device_output(array, (2, 3), "float32", 0)
        assert address == out.data_ptr()
        finish()


@pytest.mark.gpu
def test_gpu_arrays_that_are_refused() -> None:
    torch, cupy = torch_with_cuda(), cupy_with_cuda()
    sparse = torch.eye(3, device="cuda").to_sparse()
    for keys in (sparse.to(torch.int64), torch.ones(2, device="cuda"), cupy.ones(2), torch.ones(2, device="cuda").__dlpack__()):
        with pytest.raises(KeyDtypeError, match=r"^ids: "):
            as_device_keys(keys, key_bits=64, place="ids")
    for out in (sparse, torch.zeros(1, 3, device="cuda").expand(3, 3), cupy.zeros((3, 3)), cupy.zeros((3, 4), np.float32)):
        with pytest.raises(ArrayError, match=r"^answer: "):
            as_device_output(out, (3, 3), "float32", 0, place="answer")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gpu_outputs(dtype: str) -> None:
    torch, cupy = torch_with_cuda(), cupy_with_cuda()
    rows, address = new_device_output(as_device_keys(torch.arange(2, device="cuda"), key_bits=64).kind, (2, 3), dtype)
    assert (rows.data_ptr(), rows.dtype, str(rows.device), tuple(rows.shape)) == (
        address,
        getattr(torch, dtype),
        "cuda:0",
        (2, 3),
    )
    kinds = [as_device_keys(array, key_bits=64).kind for array in (cupy.arange(2), OnlyInterface(cupy.arange(2)))]
    for kind in kinds if dtype != "bfloat16" else []:
        rows, address = new_device_output(kind, (2, 3), dtype)
        assert (type(rows), rows.dtype, rows.data.ptr, rows.device.id) == (cupy.ndarray, np.dtype(dtype), address, 0)
    plain = torch.zeros(3, 2, device="cuda", dtype=getattr(torch, dtype))
    answer = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=plain.dtype)
    for out in (plain.T, plain.T.__dlpack__()):
        plain.zero_()
        address, finish, keep = as_device_output(out, (2, 3), dtype, 0)
        torch.cuda.synchronize()
        write(cupy, address, answer.view(torch.uint8).numpy())
        finish()
        torch.cuda.synchronize()
        assert plain.T.tolist() == answer.tolist() and keep is not None


@pytest.mark.gpu
def test_gpu_outputs_of_cupy_with_strides_keep_their_tail() -> None:
    cupy = cupy_with_cuda()
    whole = cupy.full((8, 6), 7, np.float32)
    address, finish, keep = as_device_output(whole[::2, ::2], (2, 3), "float32", 0, larger=True)
    cupy.cuda.runtime.deviceSynchronize()
    write(cupy, address, np.ones((2, 3), np.float32))
    finish()
    assert keep is not None and whole[::2, ::2].get().tolist() == [[1] * 3] * 2 + [[7] * 3] * 2
    assert float(whole[1::2].sum()) == 7 * 24


@pytest.mark.gpu
def test_gpu_streams() -> None:
    torch, cupy = torch_with_cuda(), cupy_with_cuda()
    kind, other = (as_device_keys(a, key_bits=64).kind for a in (torch.arange(2, device="cuda"), cupy.arange(2)))
    assert stream_handle(None, kind, 0) == torch.cuda.current_stream().cuda_stream
    assert stream_handle(None, other, 0) == cupy.cuda.get_current_stream().ptr
    side, others = torch.cuda.Stream(), cupy.cuda.Stream()
    with torch.cuda.stream(side), others:
        assert stream_handle(None, kind, 0) == side.cuda_stream
        assert stream_handle(None, other, 0) == others.ptr
    assert [stream_handle(stream, kind, 0) for stream in (side, others)] == [side.cuda_stream, others.ptr]


@pytest.mark.gpu
def test_gpu_copies_follow_the_stream_and_wait_for_nothing() -> None:
    """Strided keys that a side stream still makes: the call comes back before they are made, the copy after."""
    torch, cupy = torch_with_cuda(), cupy_with_cuda()
    keys, out = torch.zeros(2000, dtype=torch.int64, device="cuda"), torch.zeros(3, 2, device="cuda").T
    side, made = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    # the first time loads kernels and makes memory, which waits; a busy machine may keep this thread from looking in time
    for cycles in (1000, *(500_000_000 << more for more in range(6))):
        with torch.cuda.stream(side):
            torch.cuda._sleep(cycles)
            keys.fill_(cycles)
        made.record(side)
        batch = as_device_keys(keys[::2], key_bits=64, stream=side)
        _, finish, _ = as_device_output(out, (2, 3), "float32", 0, stream=side.cuda_stream)
        finish()
        pending = not made.query()
        assert on_host(cupy, batch) == [cycles] * 1000
        if cycles > 1000 and pending:
            break
    assert pending


@pytest.mark.gpu
def test_gpu_numba_arrays_and_streams() -> None:
    torch_with_cuda()
    cuda, cupy = pytest.importorskip("numba.cuda"), cupy_with_cuda()
    keys = cuda.to_device(np.arange(6, dtype=np.int32))
    batch = as_device_keys(keys, key_bits=64)
    assert (device_of_array(keys), on_host(cupy, batch), batch.form) == (0, list(range(6)), "int32")
    stream = cuda.stream()
    assert stream_handle(stream, batch.kind, 0) == int(stream.__cuda_stream__()[1]) > 0
    assert stream_handle(None, batch.kind, 0) == 0
    bound = as_device_keys(keys.bind(stream), key_bits=64)
    assert stream_handle(None, bound.kind, 0) == stream_handle(stream, bound.kind, 0)


@pytest.mark.gpu
def test_gpu_pinned_memory_is_host_memory() -> None:
    torch = torch_with_cuda()
    assert device_of_array(torch.arange(4).pin_memory()) is None
    assert device_of_array(torch.arange(4).pin_memory().__dlpack__()) is None


@pytest.mark.gpu
def test_gpu_second_device() -> None:
    torch, cupy = torch_with_cuda(2), cupy_with_cuda(2)
    with cupy.cuda.Device(1):
        others = cupy.arange(12).reshape(3, 4)
    for keys in (torch.arange(12, device="cuda:1").reshape(3, 4), others, OnlyInterface(others)):
        batch = as_device_keys(keys, key_bits=64)
        assert device_of_array(keys) == batch.device == 1
        assert on_host(cupy, batch) == list(range(12))
        rows, address = new_device_output(batch.kind, (12, 2), "float32")
        assert device_of_array(rows) == 1 and address
        with pytest.raises(DeviceError, match="on cuda:0, as the keys, got one on cuda:1"):
            as_device_output(rows, (12, 2), "float32", 0)
    with pytest.raises(DeviceError, match="expected a stream of cuda:0, got one of cuda:1"):
        stream_handle(torch.cuda.Stream(device=1), batch.kind, 0)


@pytest.mark.gpu
def test_gpu_calls_take_a_few_steps_of_python() -> None:
    torch, cupy = torch_with_cuda(), cupy_with_cuda()
    for keys in (torch.arange(64, device="cuda"), cupy.arange(64)):
        kind = as_device_keys(keys, key_bits=64).kind
        for call, limit in (
            (lambda keys=keys: device_of_array(keys), 20),
            (lambda keys=keys: as_device_keys(keys, key_bits=64), 50),
            (lambda kind=kind: new_device_output(kind, (64, 4), "float32"), 40),
            (lambda kind=kind: stream_handle(None, kind, 0), 30),
        ):
            assert 0 < steps_of(call) <= limit
