"""Kernels started in one step out of Python, with a driver made of Python functions."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from hps_numba.kernels.compiler import launch_native
from hps_numba.kernels.compiler.launch_native import CAPTURED, DRIVER_FUNCTIONS, start_kernels
from hps_numba.kernels.layouts.cache import KEYS_OF_A_BLOCK_AFTER

CONTEXT, OTHER, STREAM, EVENT = 0x7F00_0000_1000, 0x7F00_0000_2000, 0x7F00_0000_3000, 0x7F00_0000_4000
_POINTER = ctypes.c_void_p


class Driver:
    """Does as the driver's functions do, notes the calls, and fails where it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.current, self.capturing, self.failing, self.status = CONTEXT, 0, "", 0
        self._functions = {
            "cuCtxGetCurrent": ctypes.CFUNCTYPE(ctypes.c_int, _POINTER)(self._get),
            "cuCtxSetCurrent": ctypes.CFUNCTYPE(ctypes.c_int, _POINTER)(self._set),
            "cuStreamIsCapturing": ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _POINTER)(self._is_capturing),
            "cuLaunchKernelEx": ctypes.CFUNCTYPE(ctypes.c_int, *[_POINTER] * 4)(self._launch),
            "cuEventRecord": ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _POINTER)(self._record),
        }
        addresses = [ctypes.cast(self._functions[name], _POINTER).value for name in DRIVER_FUNCTIONS]
        self.table = np.array(addresses, np.int64)

    def _done(self, *call: object) -> int:
        self.calls.append(call)
        return self.status if call[0] == self.failing else 0

    def _get(self, place: int) -> int:
        ctypes.c_uint64.from_address(place).value = self.current
        return self._done("get")

    def _set(self, context: int) -> int:
        self.current = context
        return self._done("set", context)

    def _is_capturing(self, stream: int, place: int) -> int:
        ctypes.c_int.from_address(place).value = self.capturing
        return self._done("capturing", stream)

    def _launch(self, config: int, function: int, arguments: int, extra: int | None) -> int:
        assert extra is None
        return self._done("launch", config, function, arguments)

    def _record(self, event: int, stream: int) -> int:
        return self._done("record", event, stream)

    def start(self, kernels: int, event: int = EVENT) -> int:
        work = np.full(launch_native.WORK_WORDS + 3 * kernels, -1, np.int64)
        work[launch_native.WORK_WORDS :] = np.arange(100, 100 + 3 * kernels)
        return start_kernels(self.table.ctypes.data, work.ctypes.data, CONTEXT, STREAM, event, kernels)


@pytest.fixture
def driver() -> Driver:
    return Driver()


ASKED = [("get",), ("capturing", STREAM)]
LAUNCHED = [("launch", 100, 101, 102), ("launch", 103, 104, 105)]


def test_kernels_are_launched_in_order_and_then_the_event_is_recorded(driver):
    assert driver.start(2) == 0
    assert driver.calls == [*ASKED, *LAUNCHED, ("record", EVENT, STREAM)]


def test_without_an_event_none_is_recorded(driver):
    assert driver.start(1, launch_native.NO_EVENT) == 0
    assert driver.calls == [*ASKED, LAUNCHED[0]]


def test_a_stream_that_is_captured_gets_nothing(driver):
    driver.capturing = 1
    assert driver.start(2) == CAPTURED
    assert driver.calls == ASKED


@pytest.mark.parametrize("capturing", [0, 1])
def test_the_context_is_made_current_and_the_previous_one_restored(driver, capturing):
    driver.current, driver.capturing = OTHER, capturing
    assert driver.start(1) == (CAPTURED if capturing else 0)
    assert driver.calls[1] == ("set", CONTEXT)
    assert driver.calls[-1] == ("set", OTHER)
    assert driver.current == OTHER


@pytest.mark.parametrize(("call", "calls"), [("get", 1), ("capturing", 2), ("launch", 3), ("record", 5)])
def test_the_first_failure_ends_it_and_its_status_comes_back(driver, call, calls):
    driver.failing, driver.status = call, 906
    assert driver.start(2) == 906
    assert len(driver.calls) == calls
    assert driver.calls[-1][0] == call


def test_the_previous_context_is_restored_after_a_failure(driver):
    driver.current, driver.failing, driver.status = OTHER, "launch", 719
    assert driver.start(2) == 719
    assert driver.current == OTHER


def test_a_context_that_cannot_be_set_is_a_failure(driver):
    driver.current, driver.failing, driver.status = OTHER, "set", 201
    assert driver.start(2) == 201
    assert ("capturing", STREAM) not in driver.calls


# -- a prepared lookup ---------------------------------------------------------------------------------------------------


class Prepared:
    """``start_lookup`` with memory that shows what the kernels would take."""

    def __init__(self, driver: Driver, *, touch: bool, insert: bool, sets: int = 1000, capacity: int = 10_000) -> None:
        self.driver = driver
        self.arguments = np.zeros(3, np.int64)
        self.blocks = np.full((3, 3), 1, np.uint32)  # of the lookup, the touch and the insertion: x, y, z
        self.blocks[:, 2] = 7  # what follows stays
        self.advance = np.zeros(1, np.int64)
        self.work = np.zeros(launch_native.WORK_WORDS + 9, np.int64)
        place = [int(self.blocks[i].ctypes.data) for i in range(3)]
        words = {
            "work": int(self.work.ctypes.data),
            "context": CONTEXT,
            "stream": STREAM,
            "event": EVENT,
            "count": 1 + touch + insert,
            "keys": int(self.arguments.ctypes.data),
            "blocks": place[0],
            "keys_of_block": 16,
            "touch_blocks": place[1] * touch,
            "insert_blocks": place[2] * insert,
            "advance": int(self.advance.ctypes.data) * insert,
            "tiles_of_block": 32,
            "max_blocks": 528,
            "min_blocks": 66,
            "sets": sets,
            "capacity": capacity,
        }
        assert set(words) == set(launch_native.LOOKUP_WORDS)
        self.words = np.array([words[name] for name in launch_native.LOOKUP_WORDS], np.int64)

    def start(self, n: int) -> int:
        return launch_native.start_lookup(self.driver.table.ctypes.data, self.words.ctypes.data, 0x1000, n, 0x2000)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000, 40_000, 1 << 24])
def test_a_prepared_lookup_starts_what_a_lookup_of_so_many_keys_starts(driver, n):
    prepared = Prepared(driver, touch=True, insert=True)
    assert prepared.start(n) == 0
    assert prepared.arguments.tolist() == [0x1000, n, 0x2000]
    # as CudaBackend.lookup_blocks(n, 4), blocks_after(n, n), blocks_after(n, min(n, sets)), and EmbeddingCache._ticks
    most = min(528, max(66, n // KEYS_OF_A_BLOCK_AFTER))
    expected = [-(-(-(-n // 4) * 32) // 128), max(1, min(-(-n // 32), most)), max(1, min(-(-min(n, 1000) // 32), most))]
    assert prepared.blocks.tolist() == [[blocks, 1, 7] for blocks in expected]
    assert prepared.advance[0] == max(1, 4 * n // 10_000)
    assert [call[0] for call in driver.calls] == ["get", "capturing", "launch", "launch", "launch", "record"]


def test_a_prepared_lookup_of_a_fixed_cache_is_one_kernel(driver):
    prepared = Prepared(driver, touch=False, insert=False)
    assert prepared.start(100) == 0
    assert prepared.blocks.tolist() == [[7, 1, 7], [1, 1, 7], [1, 1, 7]]
    assert [call[0] for call in driver.calls] == ["get", "capturing", "launch", "record"]


def test_a_prepared_lookup_under_capture_starts_nothing(driver):
    driver.capturing = 1
    assert Prepared(driver, touch=False, insert=True).start(100) == CAPTURED
    assert [call[0] for call in driver.calls] == ["get", "capturing"]


# -- several tables --------------------------------------------------------------------------------------------------------


class PreparedTables:
    """``start_tables`` with memory that shows what the kernels would take."""

    def __init__(self, driver: Driver, tables: int, *, touch: bool, insert: bool, sets: int = 1000) -> None:
        self.driver, self.tables = driver, tables
        self.arguments = np.full((2, tables + 1, 3), 5, np.int64)  # of the lookup and the insertion
        self.blocks = np.full((3, 3), 1, np.uint32)
        self.blocks[:, 2] = 7  # what follows stays
        self.work = np.zeros(launch_native.WORK_WORDS + 9, np.int64)
        place = [int(self.blocks[i].ctypes.data) for i in range(3)]
        words = {
            "work": int(self.work.ctypes.data),
            "context": CONTEXT,
            "stream": STREAM,
            "event": EVENT,
            "count": 1 + touch + insert,
            "tables": tables,
            "words": int(self.arguments[0].ctypes.data),
            "insert_words": int(self.arguments[1].ctypes.data) * insert,
            "blocks": place[0],
            "keys_of_block": 16,
            "touch_blocks": place[1] * touch,
            "insert_blocks": place[2] * insert,
            "tiles_of_block": 32,
            "max_blocks": 528,
            "min_blocks": 66,
            "sets": sets,
        }
        assert set(words) == set(launch_native.TABLES_WORDS)
        self.words = np.array([words[name] for name in launch_native.TABLES_WORDS], np.int64)

    def start(self, words: int, n: int, *evenly: int) -> int:
        return launch_native.start_tables(
            self.driver.table.ctypes.data, self.words.ctypes.data, words, n, *(evenly or (0, 0, 0, 0))
        )


@pytest.mark.parametrize("tables", [1, 3, 26])
@pytest.mark.parametrize("n", [1, 16, 17, 1000, 1 << 20])
def test_prepared_tables_start_what_a_group_starts(driver, tables, n):
    prepared = PreparedTables(driver, tables, touch=True, insert=True)
    assert prepared.start(0, n, 0x1000, 8 * n, 0x9000, 128 * n) == 0
    given = [[0x1000 + 8 * n * i, n, 0x9000 + 128 * n * i] for i in range(tables)]
    assert prepared.arguments.tolist() == [[*given, [5, 5, 5]]] * 2
    # as CudaBackend.lookup_blocks(n, 4), and blocks_after(tables * n, n or min(n, sets), tables)
    most = min(528, max(66, tables * n // KEYS_OF_A_BLOCK_AFTER)) // tables
    expected = [-(-(-(-n // 4) * 32) // 128), max(1, min(-(-n // 32), most)), max(1, min(-(-min(n, 1000) // 32), most))]
    assert prepared.blocks.tolist() == [[blocks, tables, 7] for blocks in expected]
    assert [call[0] for call in driver.calls] == ["get", "capturing", "launch", "launch", "launch", "record"]


def test_prepared_tables_take_the_keys_of_each_table(driver):
    prepared = PreparedTables(driver, 3, touch=False, insert=True)
    words = np.array([[11, 1, 12], [21, 0, 22], [31, 40, 32]], np.int64)
    assert prepared.start(words.ctypes.data, 40) == 0
    assert prepared.arguments.tolist() == [[*words.tolist(), [5, 5, 5]]] * 2
    assert prepared.blocks.tolist() == [[3, 3, 7], [1, 1, 7], [2, 3, 7]]


def test_prepared_tables_of_which_nothing_is_inserted_are_one_kernel(driver):
    prepared = PreparedTables(driver, 2, touch=False, insert=False)
    assert prepared.start(0, 10, 100, 8, 200, 16) == 0
    assert prepared.arguments[0, :2].tolist() == [[100, 10, 200], [108, 10, 216]] and (prepared.arguments[1] == 5).all()
    assert [call[0] for call in driver.calls] == ["get", "capturing", "launch", "record"]
    driver.capturing = 1
    assert prepared.start(0, 10, 100, 8, 200, 16) == CAPTURED
