"""``HPS.lookup`` knows a table by how it was named before; what it knows never outlives the table, nor stands for another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.oracles import assert_same_bits, rows_of
from support.shared_memory import MIB, new_name, started_child

from hps_numba.errors import ArrayError, ClosedError, DeviceError, KeyDtypeError, UnknownModelError

DIM = 4
KEYS = np.arange(20)


def known(server: Any) -> dict[tuple[Any, ...], Any]:
    plain: dict[tuple[Any, ...], Any] = server._catalog.models.plain
    return plain


@pytest.fixture
def server(workshop: Workshop) -> Any:
    return workshop.open(workshop.model((KEYS, DIM), (KEYS + 5, DIM)))


def test_names_that_are_equal_are_not_the_same(server: Any) -> None:
    assert_same_bits(server.lookup(KEYS, "m", 1), server.lookup(KEYS.tolist(), "m", np.int64(1)))
    for wrong in (True, 1.0, "1", 2, -1, [1], None):
        for _ in range(2):
            with pytest.raises(UnknownModelError, match="table_id: "):
                server.lookup(KEYS, "m", wrong)
    for wrong in (False, 0.0, "0", 3, [0]):
        for _ in range(2):
            with pytest.raises(DeviceError):
                server.lookup(KEYS, "m", 1, wrong)
    for wrong in ("x", ["m"], None, b"m"):
        with pytest.raises(UnknownModelError, match="model_name: "):
            server.lookup(KEYS, wrong, 1)
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))
    assert_same_bits(server.lookup(KEYS, "m", 0, None), rows_of(KEYS, DIM))
    assert {type(part) for names in known(server) for part in names[1:5:2]} <= {int, str, type(None)}


def test_arguments_are_checked_as_before(server: Any) -> None:
    for _ in range(2):
        server.lookup(KEYS, "m", 0)
        with pytest.raises(KeyDtypeError):
            server.lookup(KEYS.astype(float), "m", 0)
        with pytest.raises(ArrayError, match="out: expected shape"):
            server.lookup(KEYS, "m", 0, out=np.empty((3, DIM), np.float32))
        with pytest.raises(ArrayError, match="out: expected a writable array"):
            out = np.empty((20, DIM), np.float32)
            out.flags.writeable = False
            server.lookup(KEYS, "m", 0, out=out)


def test_keys_of_32_bits_are_not_plain(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((KEYS, DIM)), supportlonglong=False)
    for _ in range(2):
        assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))
        with pytest.raises(KeyDtypeError, match="expected 32-bit keys"):
            server.lookup(np.array([1, -1]), "m", 0)


def test_a_table_that_was_unloaded_is_known_no_more(server: Any, workshop: Workshop) -> None:
    server.lookup(KEYS, "m", 0)
    before = known(server)
    assert before
    server.unload_model("m")
    with pytest.raises(UnknownModelError):
        server.lookup(KEYS, "m", 0)
    server.load_model(workshop.model((KEYS, DIM), stamp=3))
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM, 3))
    assert known(server) is not before
    server.close()
    with pytest.raises(ClosedError, match="the server is closed"):
        server.lookup(KEYS, "m", 0)


def test_a_replaced_model_and_written_rows_are_seen_at_once(server: Any, workshop: Workshop) -> None:
    server.lookup(KEYS, "m", 0)
    server.insert(KEYS[:3], rows_of(KEYS[:3], DIM, 1), "m", 0)
    assert_same_bits(server.lookup(KEYS, "m", 0)[:3], rows_of(KEYS[:3], DIM, 1))
    workshop.model((KEYS, DIM), (KEYS, DIM), stamp=2)
    server.replace_model("m")
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM, 2))
    assert server.stats()["m"][next(iter(server.stats()["m"]))].keys == 60


def test_keys_are_recorded(server: Any, tmp_path: Path) -> None:
    server.lookup(KEYS, "m", 0)
    with server.record_trace(tmp_path / "trace.npy", "m", 0):
        server.lookup(KEYS, "m", 0)
    server.lookup(KEYS, "m", 0)
    assert np.array_equal(np.load(tmp_path / "trace.npy"), KEYS)


@pytest.mark.parametrize("shape", [(20,), (4, 5), (2, 5, 2), (20, 1)])
def test_front_ends_look_up_keys_of_any_shape(server: Any, shape: tuple[int, ...]) -> None:
    keys, out = KEYS.reshape(shape), np.zeros((*shape, DIM), np.float32)
    server.direct.lookup_into(keys, "m", 0, out)
    assert_same_bits(out, rows_of(KEYS, DIM).reshape(out.shape))
    turned = np.zeros((*shape[::-1], DIM), np.float32)
    server.direct.lookup_into(keys.T, "m", 0, turned)
    assert_same_bits(turned, rows_of(keys.T.reshape(-1), DIM).reshape(turned.shape))
    with pytest.raises(ArrayError):
        server.direct.lookup_into(keys, "m", 0, np.zeros((*shape[:-1], DIM), np.float32))


def test_a_table_in_shared_memory_that_was_left(workshop: Workshop) -> None:
    shared = {"type": "multi_process_hash_map", "shared_memory_name": new_name(), "shared_memory_size": 16 * MIB}
    with workshop.open(workshop.model((KEYS, DIM)), volatile_db=shared | {"shared_memory_auto_remove": True}) as server:
        for _ in range(2):
            assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))
        (plain,) = known(server).values()
        assert plain(KEYS, None) is not None
        store = server._catalog.table("m", 0).store
        server.insert(KEYS[:3], rows_of(KEYS[:3], DIM, 1), "m", 0)
        assert_same_bits(plain(KEYS, None)[:3], rows_of(KEYS[:3], DIM, 1))
    assert store.block == 0 and plain(KEYS, None) is None
    with pytest.raises(ClosedError, match="the server is closed"):
        server.lookup(KEYS, "m", 0)


def test_a_forked_child_looks_up(server: Any) -> None:
    server.lookup(KEYS, "m", 0)

    def look_up() -> None:
        for _ in range(2):
            assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))

    _, status = os.waitpid(started_child(look_up), 0)
    assert status == 0
    look_up()
