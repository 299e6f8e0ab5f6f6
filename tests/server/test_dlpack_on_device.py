"""``lookup_fromdlpack`` with keys and output on the host or a GPU each: played capsules on the CPU, real ones on GPUs (N03)."""

from __future__ import annotations

import ctypes
import itertools
import sys
import types
from typing import Any

import numpy as np
import pytest
from support.capsules import OnDevice
from support.factories import Workshop
from support.oracles import EXTREME_32, assert_same_bits, rows_of
from support.played_driver import PlayedDriver, play

import hps_numba
from hps_numba.arrays.dlpack import capsule_of
from hps_numba.arrays.dlpack_moves import MovedBatch, keys_on_host
from hps_numba.errors import ArrayError, DeviceError, KeyDtypeError

DIM = 3
KNOWN = np.array([[8, 0], [3, 99]])
PLACES = ["cpu", "cuda:0", "cuda:1"]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> PlayedDriver:
    return play(monkeypatch, PlayedDriver(2))


_HELD: list[OnDevice] = []


def played(memory: np.ndarray, device: int = 0) -> Any:
    """A capsule of memory on a played GPU; its struct lives to the end of the tests."""
    _HELD.append(OnDevice(memory, device))
    return _HELD[-1].capsule


def expected(keys: np.ndarray, dim: int = DIM) -> np.ndarray:
    rows = rows_of(keys, dim)
    rows[keys == 99] = -7.5
    return rows


# -- played: a GPU without a cache of the table, whose memory is that of the process -----------------------------------------


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize(("keys_on", "out_on"), [(None, 1), (1, None), (0, 1), (1, 1)])
def test_capsules_anywhere_are_answered_and_not_consumed(
    workshop: Workshop, driver: PlayedDriver, keys_on: int | None, out_on: int | None, versioned: bool
) -> None:
    server = workshop.open(workshop.model((range(9), DIM)))
    memory, out = KNOWN.copy(), np.full((2, 2, DIM), np.nan, np.float32)
    held = [OnDevice(memory, keys_on or 0, versioned=versioned), OnDevice(out, out_on or 0, versioned=versioned)]
    keys = capsule_of(memory) if keys_on is None else held[0].capsule
    target = capsule_of(out) if out_on is None else held[1].capsule
    for key in (0, 5):
        memory[0, 1] = key
        out[:] = np.nan
        server.lookup_fromdlpack(keys, target, "m", 0)
        assert_same_bits(out, expected(memory))
    assert "used" not in repr(keys) and "used" not in repr(target)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint64, np.uint32, np.int8])
@pytest.mark.parametrize("layout", [lambda a: a, lambda a: a.T[::-1], lambda a: a[:, ::2], lambda a: a[:0]])
def test_strides_offsets_and_integers_of_capsules(workshop: Workshop, driver: PlayedDriver, dtype: Any, layout: Any) -> None:
    server = workshop.open(workshop.model((range(9), DIM)))
    keys = layout(np.arange(8, dtype=dtype).reshape(2, 4))
    played = OnDevice(keys)
    played.tensor.byte_offset = 8
    if keys.size:
        played.tensor.data = keys.ctypes.data - 8
    out = np.full((*keys.shape, DIM), np.nan, np.float32)
    server.lookup_fromdlpack(played.capsule, capsule_of(out), "m", 0)
    assert_same_bits(out, expected(keys.astype(np.int64)))


def test_capsules_of_32_bit_keys(workshop: Workshop, driver: PlayedDriver) -> None:
    server = workshop.open(workshop.model((EXTREME_32, DIM)), supportlonglong=False)
    for keys in (np.array(EXTREME_32, np.uint32), np.array(EXTREME_32, np.uint32).view(np.int32), np.array(EXTREME_32)):
        out = np.full((len(keys), DIM), np.nan, np.float32)
        server.lookup_fromdlpack(played(keys), played(out, 1), "m", 0)
        assert_same_bits(out, rows_of(np.array(EXTREME_32), DIM))


def test_a_larger_output_keeps_its_tail(workshop: Workshop, driver: PlayedDriver) -> None:
    server = workshop.open(workshop.model((range(9), DIM)))
    out = np.full((3, 2 * DIM), np.nan, np.float32)
    server.lookup_fromdlpack(capsule_of(np.arange(2)), played(out), "m", 0)
    assert_same_bits(out[0], rows_of(np.arange(2), DIM).reshape(-1))
    assert np.isnan(out[1:]).all()


def test_what_cannot_be_answered_is_typed(workshop: Workshop, driver: PlayedDriver) -> None:
    server = workshop.open(workshop.model((range(9), DIM)))
    keys, out = OnDevice(np.arange(2)), OnDevice(np.zeros((2, DIM), np.float32))
    for wrong, message in (
        (OnDevice(np.zeros((1, DIM), np.float32)), "out_tensor: expected shape"),
        (OnDevice(np.zeros((2, DIM))), "out_tensor: expected dtype float32, got float64"),
        (OnDevice(np.broadcast_to(np.zeros(DIM, np.float32), (2, DIM))), "out_tensor: .* overlaps itself"),
    ):
        with pytest.raises(ArrayError, match=message):
            server.lookup_fromdlpack(keys.capsule, wrong.capsule, "m", 0)
    for bad in (np.zeros(2, np.float32), np.zeros(2, bool)):
        with pytest.raises(KeyDtypeError, match="keys: expected integers"):
            server.lookup_fromdlpack(played(bad), out.capsule, "m", 0)
    half = OnDevice(np.zeros(2, np.uint16))
    half.tensor.dtype.code = 4  # bfloat16
    with pytest.raises(KeyDtypeError, match=r"keys: expected integers .*, got capsule of dtype bfloat16"):
        server.lookup_fromdlpack(half.capsule, out.capsule, "m", 0)
    driver.failing["cuMemcpyDtoHAsync"] = 700
    with pytest.raises(DeviceError, match="cuMemcpyDtoHAsync"):
        server.lookup_fromdlpack(keys.capsule, out.capsule, "m", 0)


def test_without_a_driver_capsules_of_a_gpu_are_a_device_error(workshop: Workshop) -> None:
    if hps_numba.device.driver.device_count():
        pytest.skip("there is a driver")
    server = workshop.open(workshop.model((range(9), DIM)))
    out = np.zeros((2, DIM), np.float32)
    with pytest.raises(DeviceError):
        server.lookup_fromdlpack(played(np.arange(2)), capsule_of(out), "m", 0)
    with pytest.raises(DeviceError):
        server.lookup_fromdlpack(capsule_of(np.arange(2)), played(out), "m", 0)


@pytest.mark.parametrize("out_on", [None, 1])
def test_rows_that_a_gpu_has_filled_are_moved(driver: PlayedDriver, out_on: int | None) -> None:
    keys, out = OnDevice(np.arange(4)), np.full((2, 2, DIM), np.nan, np.float32)
    other = OnDevice(out, out_on or 0)
    target = capsule_of(out) if out_on is None else other.capsule
    batch = MovedBatch(keys.capsule, DIM, "float32", 64, target, out_name="out_tensor")
    rows = rows_of(np.arange(4), DIM)
    ctypes.memmove(batch.address, rows.ctypes.data, rows.nbytes)  # the kernel of a lookup
    assert batch.result() is target
    assert_same_bits(out.reshape(4, DIM), rows)
    assert not driver.memory  # freed
    assert len(driver.named("cuStreamSynchronize")) >= 1


def test_arrays_that_are_no_capsules_on_a_gpu_stay_what_they_are() -> None:
    keys = np.arange(3)
    assert keys_on_host(keys) is keys
    capsule = capsule_of(keys)
    assert keys_on_host(capsule) is capsule


def test_with_tensorflow_the_whole_device_is_waited_for(
    workshop: Workshop, driver: PlayedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = workshop.open(workshop.model((range(9), DIM)))
    keys, out = OnDevice(np.arange(2)), OnDevice(np.zeros((2, DIM), np.float32))
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    server.lookup_fromdlpack(keys.capsule, out.capsule, "m", 0)
    assert not driver.named("cuCtxSynchronize")
    monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))
    server.lookup_fromdlpack(keys.capsule, out.capsule, "m", 0)
    assert len(driver.named("cuCtxSynchronize")) == 2  # before the keys are read, and when the rows are written


# -- real GPUs ---------------------------------------------------------------------------------------------------------------


def torch_on(place: str) -> Any:
    torch = pytest.importorskip("torch")
    if place != "cpu" and int(place[-1]) >= torch.cuda.device_count():
        pytest.skip(f"needs {place}")
    return torch


def served(workshop: Workshop, torch: Any, dim: int, **entry: Any) -> hps_numba.HPS:
    devices = list(range(min(2, torch.cuda.device_count())))
    model = workshop.model((range(2000), dim), deployed_device_list=devices, gpucacheper=0.5, **entry)
    return workshop.open(model)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "strided", "offset"])
@pytest.mark.parametrize(("keys_on", "out_on"), [(a, b) for a, b in itertools.product(PLACES, PLACES) if not a == b == "cpu"])
def test_gpu_capsules_of_torch_on_any_devices(workshop: Workshop, keys_on: str, out_on: str, layout: str) -> None:
    torch = torch_on(keys_on)
    torch_on(out_on)
    server = served(workshop, torch, 16)
    for dtype in (torch.int64, torch.int32):
        for seed in range(3):
            numbers = torch.randint(0, 2000, (40, 6), generator=torch.Generator().manual_seed(seed)).to(dtype)
            keys, whole = numbers.to(keys_on), torch.full((60, 6, 16), float("nan"), device=out_on)
            out = whole[:40]
            if layout == "strided":
                keys, numbers, out = keys[:, ::2], numbers[:, ::2], whole[:40, ::2]
            elif layout == "offset":
                keys, numbers, out = keys[10:], numbers[10:], whole[30:]
            key_capsule, out_capsule = torch.utils.dlpack.to_dlpack(keys), torch.utils.dlpack.to_dlpack(out)
            for _ in range(2):
                out.zero_()
                server.lookup_fromdlpack(key_capsule, out_capsule, "m", 0)
                assert_same_bits(out.cpu().numpy(), rows_of(numbers.numpy().astype(np.int64), 16))
            assert "used" not in repr(key_capsule) and "used" not in repr(out_capsule)


@pytest.mark.gpu
def test_gpu_capsules_are_ordered_by_the_current_stream(workshop: Workshop) -> None:
    torch = torch_on("cuda:0")
    server = served(workshop, torch, 32)
    stream = torch.cuda.Stream()
    numbers = torch.randint(0, 2000, (20_000,))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # the keys come late
        keys = numbers.cuda(non_blocking=True)
        out = torch.zeros(20_000, 32, device="cuda")
        server.lookup_fromdlpack(torch.utils.dlpack.to_dlpack(keys), torch.utils.dlpack.to_dlpack(out), "m", 0)
        copy = out.clone()
    stream.synchronize()
    assert_same_bits(copy.cpu().numpy(), rows_of(numbers.numpy(), 32))


@pytest.mark.gpu
@pytest.mark.parametrize("out_on_host", [False, True])
def test_gpu_capsules_of_cupy(workshop: Workshop, out_on_host: bool) -> None:
    cupy, torch = pytest.importorskip("cupy"), torch_on("cuda:0")
    server = served(workshop, torch, 8)
    keys = cupy.arange(100)[::3]
    out = np.zeros((len(keys), 8), np.float32) if out_on_host else cupy.zeros((len(keys), 8), cupy.float32)
    target = capsule_of(out) if out_on_host else out.__dlpack__()
    server.lookup_fromdlpack(keys.__dlpack__(), target, "m", 0)
    cupy.cuda.get_current_stream().synchronize()
    assert_same_bits(out if out_on_host else out.get(), rows_of(np.arange(100)[::3], 8))


@pytest.mark.gpu
def test_gpu_capsules_of_tensorflow(workshop: Workshop) -> None:
    tensorflow, torch = pytest.importorskip("tensorflow"), torch_on("cuda:0")
    if not tensorflow.config.list_physical_devices("GPU"):
        pytest.skip("TensorFlow sees no GPU")
    server = served(workshop, torch, 8)
    with tensorflow.device("GPU:0"):
        keys = tensorflow.range(300, dtype=tensorflow.int64) * 2
        keys = keys + tensorflow.zeros_like(keys)
    out = torch.zeros(300, 8, device="cuda")
    server.lookup_fromdlpack(tensorflow.experimental.dlpack.to_dlpack(keys), torch.utils.dlpack.to_dlpack(out), "m", 0)
    assert_same_bits(out.cpu().numpy(), rows_of(np.arange(300) * 2, 8))


@pytest.mark.gpu
def test_gpu_outputs_that_cannot_take_the_rows_are_refused(workshop: Workshop) -> None:
    torch = torch_on("cuda:0")
    server = served(workshop, torch, 8)
    keys = torch.utils.dlpack.to_dlpack(torch.arange(4, device="cuda"))
    for out in (torch.zeros(3, 8), torch.zeros(3, 8, device="cuda"), torch.zeros(4, 8, dtype=torch.float64, device="cuda")):
        with pytest.raises(ArrayError, match="out_tensor"):
            server.lookup_fromdlpack(keys, torch.utils.dlpack.to_dlpack(out), "m", 0)
