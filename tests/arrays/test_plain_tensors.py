"""Plain tensors, played by tensors of the CPU: what is looked up for them, and which calls are left to others."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from hps_numba.errors import ClosedError, DeviceError

torch = pytest.importorskip("torch")

from hps_numba.arrays.plain_tensors import PlainHostTensors, PlainTensors, is_tensor  # noqa: E402

DIM = 4


class Table:
    """Looks up as a cache does, and notes the calls: the row of a key has its value in all columns."""

    def __init__(self, output_type: str = "float32", key_bits: int = 64) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.closed = False
        self.plain = PlainTensors(self.look_up, DIM, output_type, key_bits, 1)
        self.plain._device, self.plain._stream_on = torch.device("cpu"), lambda ordinal: 70 + ordinal

    def look_up(self, keys: int, n: int, out: int, stream: int, form: str, output_type: str) -> None:
        if self.closed:
            raise ClosedError("closed")
        self.calls.append((n, stream, form, output_type))
        if output_type == "float32":
            kind = ctypes.c_int64 if form == "int64" else ctypes.c_int32
            some = np.array((kind * n).from_address(keys)[:])
            np.frombuffer((ctypes.c_float * (n * DIM)).from_address(out), np.float32).reshape(n, DIM)[:] = some[:, None]


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 1, 1), ()])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_of_plain_keys(table: Table, shape: tuple[int, ...], given: bool, dtype: Any) -> None:
    keys = torch.arange(5, 5 + int(np.prod(shape)), dtype=dtype).reshape(shape)
    out = torch.zeros(*shape, DIM) if given else None
    rows = table.plain(keys, out, None)
    assert rows.shape == (*shape, DIM) and rows.dtype == torch.float32 and (out is None or rows is out)
    assert torch.equal(rows, keys[..., None].expand(rows.shape).float())
    assert table.calls == [(keys.numel(), 71, str(dtype).removeprefix("torch."), "float32")]


def test_rows_of_other_types() -> None:
    table = Table("bfloat16", 32)
    rows = table.plain(torch.tensor([1, 2]), None, None)
    assert rows.dtype == torch.bfloat16 and table.calls == [(2, 71, "checked32_in_int64", "bfloat16")]
    assert table.plain(torch.tensor([1, 2]), torch.zeros(2, DIM), None) is None
    assert table.plain(torch.tensor([1, 2]), torch.zeros(2, DIM, dtype=torch.bfloat16), None) is not None


def test_calls_that_are_not_plain_are_left_alone(table: Table) -> None:
    keys, out = torch.arange(4), torch.zeros(4, DIM)
    shared = torch.zeros(4 * DIM)
    for some, to, stream in (
        (keys, out, 5),
        (keys.to(torch.int16), out, None),
        (keys.float(), out, None),
        (torch.arange(8)[::2], out, None),
        (keys[:0], None, None),
        (keys, out[:3], None),
        (keys, torch.zeros(4, DIM + 1), None),
        (keys, torch.zeros(4 * DIM), None),
        (keys, out.double(), None),
        (keys, torch.zeros(DIM, 4).t(), None),
        (keys, torch.zeros(4, DIM, requires_grad=True), None),
        (keys, torch.zeros(4, DIM, dtype=torch.complex64).conj().imag, None),  # negated when it is read
        (keys, torch.zeros(4, DIM, device="meta"), None),
        (keys, out.numpy(), None),
        (keys, torch.nn.Parameter(out, requires_grad=False), None),
        (shared[:8].view(torch.int64), shared.view(4, DIM), None),
        (np.arange(4), out, None),
    ):
        assert table.plain(some, to, stream) is None
    assert not table.calls and not out.any()


def test_keys_at_odd_addresses_are_left_alone(table: Table) -> None:
    memory = np.zeros(41, np.uint8)
    odd = torch.frombuffer(memory[1:].data, dtype=torch.int64)
    assert odd.data_ptr() % 8 and table.plain(odd, None, None) is None


def test_a_table_that_was_closed_is_left_to_who_can_say_so(table: Table) -> None:
    table.closed = True
    assert table.plain(torch.arange(3), None, None) is None


def test_what_a_device_raises_is_raised(table: Table) -> None:
    def fail(*arguments: Any) -> None:
        raise DeviceError("broken")

    table.plain._look_up = fail
    with pytest.raises(DeviceError, match="broken"):
        table.plain(torch.arange(3), None, None)


def test_classes_of_tensors() -> None:
    assert is_tensor(torch.Tensor) and not is_tensor(torch.nn.Parameter) and not is_tensor(np.ndarray)


# -- in host memory --------------------------------------------------------------------------------------------------------


def look_up(keys: np.ndarray, out: np.ndarray | None, stream: None) -> np.ndarray | None:
    """As ``PlainLookups`` does."""
    if keys.dtype != np.int64 or not len(keys):
        return None
    rows = np.zeros((len(keys), DIM), np.float32) if out is None else out
    if rows.shape != (len(keys), DIM) or rows.dtype != np.float32:
        return None
    rows[:] = keys[:, None]
    return rows


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 1, 1), ()])
@pytest.mark.parametrize("given", [False, True])
def test_rows_of_plain_keys_in_host_memory(shape: tuple[int, ...], given: bool) -> None:
    keys = torch.arange(5, 5 + int(np.prod(shape))).reshape(shape)
    out = torch.zeros(*shape, DIM) if given else None
    rows = PlainHostTensors(look_up)(keys, out, None)
    assert rows.shape == (*shape, DIM) and (out is None or rows is out)
    assert torch.equal(rows, keys[..., None].expand(rows.shape).float())
    turned = keys.reshape(-1, 1).expand(-1, 2).t()
    assert torch.equal(PlainHostTensors(look_up)(turned, None, None), turned[..., None].expand(*turned.shape, DIM).float())


def test_calls_in_host_memory_that_are_not_plain_are_left_alone() -> None:
    keys, out = torch.arange(4), torch.zeros(4, DIM)
    for some, to in (
        (keys.int(), out),
        (keys[:0], None),
        (keys.to("meta"), None),
        (keys, out[:3]),
        (keys, torch.zeros(2, 2, DIM)),
        (keys, torch.zeros(4, DIM + 1)),
        (keys.view(2, 2), torch.zeros(4, DIM)),
        (keys, out.double()),
        (keys, torch.zeros(DIM, 4).t()),
        (keys, torch.zeros(4, DIM, requires_grad=True)),
        (keys, torch.zeros(4, DIM, dtype=torch.complex64).conj().imag),
        (keys, out.to("meta")),
        (keys, out.numpy()),
        (keys, torch.nn.Parameter(out, requires_grad=False)),
    ):
        assert PlainHostTensors(look_up)(some, to, None) is None
    assert not out.any()
