"""The parameter server end to end on small tables: what a config opens and what lookups answer."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.internals import slower_tier, wait_for_release
from support.oracles import EXTREME_32, EXTREME_64, NaiveServer, assert_same_bits, rows_of

import hps_numba
from hps_numba import (
    ArrayError,
    CapacityError,
    ClosedError,
    DeviceError,
    KeyDtypeError,
    UnknownModelError,
)
from hps_numba.device import driver as devices

DIM = 3
KEYS = list(range(9))
DICT_TIER = {"type": "support.fakes:DictTier"}


def stats_of(server: hps_numba.HPS, model: str = "m", table: str = "sparse_embedding0") -> Any:
    return server.stats()[model][table]


# --- configs ----------------------------------------------------------------------------------------------------------


def test_a_path_a_dict_and_objects_serve_the_same_rows(workshop: Workshop) -> None:  # N01
    entry = workshop.model((KEYS, DIM))
    params = hps_numba.InferenceParams(
        "m",
        4,
        0.9,
        "",
        entry["sparse_files"],
        False,
        0.2,
        True,
        deployed_devices=[0],
        default_value_for_each_table=[-7.5],
        maxnum_catfeature_query_per_table_per_sample=[2],
        embedding_vecsize_per_table=[DIM],
    )
    objects = hps_numba.ParameterServerConfig({"m": ["sparse_embedding0"]}, {"m": [DIM]}, {"m": [2]}, [params])
    keys = [8, 99, 0, 8]
    expected = workshop.open(entry).lookup(keys, "m", 0)
    assert_same_bits(expected[[0, 2, 3]], rows_of([8, 0, 8], DIM))
    assert_same_bits(workshop.open_file(entry).lookup(keys, "m", 0), expected)
    for config in (objects, [params]):
        with hps_numba.HPS(config) as server:
            assert_same_bits(server.lookup(keys, "m", 0), expected)


def test_64_bit_server_serves_every_int64(workshop: Workshop) -> None:  # C10
    server = workshop.open(workshop.model((EXTREME_64, DIM)))
    keys = np.array(EXTREME_64, np.int64)
    assert_same_bits(server.lookup(keys, "m", 0), rows_of(keys, DIM))
    absent = np.array([2**62, -(2**62), 2, -2], np.int64)
    assert (server.lookup(absent, "m", 0) == -7.5).all()
    assert server.erase(keys, "m", 0) == len(keys)
    assert (server.lookup(keys, "m", 0) == -7.5).all()
    assert server.insert(keys, rows_of(keys, DIM, 1), "m", 0) == len(keys)
    assert_same_bits(server.lookup(keys, "m", 0), rows_of(keys, DIM, 1))


def test_64_bit_server_sign_extends_int32_and_reinterprets_uint64(workshop: Workshop) -> None:  # C10
    server = workshop.open(workshop.model((EXTREME_64, DIM)))
    assert_same_bits(server.lookup(np.array([-1, -(2**31)], np.int32), "m", 0), rows_of([-1, -(2**31)], DIM))
    assert_same_bits(server.lookup(np.array([2**64 - 1, 2**63], np.uint64), "m", 0), rows_of([-1, -(2**63)], DIM))


def test_32_bit_server_serves_every_uint32(workshop: Workshop) -> None:  # C10
    server = workshop.open(workshop.model((EXTREME_32, DIM)), supportlonglong=False)
    keys = np.array(EXTREME_32, np.uint32)
    expected = rows_of(keys, DIM)
    assert_same_bits(server.lookup(keys, "m", 0), expected)
    assert_same_bits(server.lookup(keys.view(np.int32), "m", 0), expected)  # -1 is 2**32 - 1
    assert_same_bits(server.lookup(keys.astype(np.int64), "m", 0), expected)
    assert server.insert(np.array([-2], np.int32), rows_of([5], DIM), "m", 0) == 1
    assert_same_bits(server.lookup([2**32 - 2], "m", 0), rows_of([5], DIM))


@pytest.mark.parametrize("key", [-1, 2**32, -(2**63), 2**63 - 1])
def test_32_bit_server_refuses_wider_keys(workshop: Workshop, key: int) -> None:  # C10
    server = workshop.open(workshop.model((EXTREME_32, DIM)), supportlonglong=False)
    for call in (
        lambda: server.lookup(np.array([0, key]), "m", 0),
        lambda: server.insert(np.array([0, key]), rows_of([0, 1], DIM), "m", 0),
        lambda: server.erase(np.array([0, key]), "m", 0),
    ):
        with pytest.raises(KeyDtypeError, match=re.escape(str(key))):
            call()
    assert stats_of(server).rows == len(EXTREME_32)


def test_absent_volatile_db_is_host_memory(workshop: Workshop) -> None:  # C11
    server = workshop.open(workshop.model((KEYS, DIM)))
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))
    assert (stats_of(server).rows, stats_of(server).host_hits) == (9, 9)


def test_volatile_db_without_type_holds_nothing(workshop: Workshop) -> None:  # C12
    server = workshop.open(workshop.model((KEYS, DIM)), volatile_db={"num_partitions": 2})
    assert (server.lookup(KEYS, "m", 0) == -7.5).all()
    assert (stats_of(server).rows, server.host_bytes) == (0, 0)


def test_several_models_are_independent_and_share_the_databases(workshop: Workshop) -> None:  # C18
    first = workshop.model((KEYS, 3), (KEYS[:4], 5), name="first")
    second = workshop.model(([7, 8], 4), name="second", stamp=3, deployed_device_list=[1, 0], default_value_for_each_table=[2])
    server = workshop.open(first, second, persistent_db={"type": "support.fakes:DictTier"})
    assert server.models == ("first", "second")
    assert_same_bits(server.lookup(KEYS, "first", 0), rows_of(KEYS, 3))
    assert_same_bits(server.lookup(KEYS[:4], "first", "sparse_embedding1"), rows_of(KEYS[:4], 5))
    assert_same_bits(server.lookup([7, 8], "second", 0, 1), rows_of([7, 8], 4, 3))
    assert (server.lookup([0], "second", 0) == 2).all()
    tags = ["hps_et.first.sparse_embedding0", "hps_et.first.sparse_embedding1", "hps_et.second.sparse_embedding0"]
    assert slower_tier(server).tables() == tags
    assert stats_of(server, "first").keys == 9
    assert stats_of(server, "second").keys == 3


@pytest.mark.parametrize(("volatile", "persistent"), [(True, True), (True, False), (False, True), (False, False)])
def test_initialize_after_startup_decides_which_tiers_are_loaded(
    workshop: Workshop, volatile: bool, persistent: bool
) -> None:  # C19
    server = workshop.open(
        workshop.model((KEYS, DIM)),
        volatile_db={"type": "hash_map", "initialize_after_startup": volatile},
        persistent_db={**DICT_TIER, "initialize_after_startup": persistent},
    )
    tier = slower_tier(server)
    assert stats_of(server).rows == (9 if volatile else 0)
    assert tier.size("hps_et.m.sparse_embedding0") == (9 if persistent else 0)
    rows = server.lookup(KEYS, "m", 0)
    assert_same_bits(rows, rows_of(KEYS, DIM) if volatile or persistent else np.full((9, DIM), -7.5, np.float32))


@pytest.mark.parametrize("volatile", [True, False])
def test_initialize_after_startup_applies_to_user_defined_volatile_tiers(workshop: Workshop, volatile: bool) -> None:  # C19
    server = workshop.open(
        workshop.model((KEYS, DIM)), volatile_db={"type": "support.fakes:DictTier", "initialize_after_startup": volatile}
    )
    assert slower_tier(server).size("hps_et.m.sparse_embedding0") == (9 if volatile else 0)


@pytest.mark.parametrize(("rate", "rows"), [(0.0, 0), (0.07, 7), (0.5, 50), (0.501, 51), (1.0, 100)])
def test_initial_cache_rate_takes_the_head_of_the_file(workshop: Workshop, rate: float, rows: int) -> None:  # C20
    keys = list(range(100))
    server = workshop.open(workshop.model((keys, DIM)), volatile_db={"type": "hash_map", "initial_cache_rate": rate})
    assert stats_of(server).rows == rows
    assert server.contains(keys, "m", 0).tolist() == [key < rows for key in keys]
    assert server.plan().tables[0].host_rows == rows


def test_without_a_gpu_listed_devices_are_a_warning_and_host_memory_serves(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "device_count", lambda: 0)
    monkeypatch.setattr(devices, "why_no_device", lambda: "no CUDA driver: gone")
    with caplog.at_level(logging.WARNING):
        server = workshop.open(workshop.model((KEYS, DIM), deployed_device_list=[2, 0]))
    assert [r.message for r in caplog.records] == [
        "deployed_device_list [0, 2]: no CUDA driver: gone: host memory serves all lookups"
    ]
    for device in (0, 2):
        assert_same_bits(server.lookup(KEYS, "m", 0, device), rows_of(KEYS, DIM))
    with pytest.raises(DeviceError, match=r"device_id: model 'm' is deployed on \[2, 0\], not on 1"):
        server.lookup(KEYS, "m", 0, 1)


def test_without_a_device_list_only_device_0_is_accepted(workshop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        server = workshop.open(workshop.model((KEYS, DIM)))
    assert not caplog.records
    assert_same_bits(server.lookup(KEYS, "m", 0, 0), rows_of(KEYS, DIM))
    with pytest.raises(DeviceError, match="the CPU"):
        server.lookup(KEYS, "m", 0, 1)


def test_start_logs_rows_in_host_memory(workshop: Workshop, caplog: pytest.LogCaptureFixture) -> None:  # O08
    with caplog.at_level(logging.INFO, "hps_numba.server"):
        workshop.open(workshop.model((KEYS, DIM), (KEYS[:4], DIM)), volatile_db={"type": "hash_map", "initial_cache_rate": 0.5})
    assert [r.message for r in caplog.records if "host memory" in r.message and r.message.startswith("hps_et")] == [
        "hps_et.m.sparse_embedding0: cached 5 of 9 rows in host memory",
        "hps_et.m.sparse_embedding1: cached 2 of 4 rows in host memory",
    ]


def test_require_gpu_raises_without_a_gpu(workshop: Workshop) -> None:
    with pytest.raises(DeviceError, match="require_gpu"):
        workshop.open(workshop.model((KEYS, DIM)), require_gpu=True)


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_allocated(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = workshop.model((KEYS, DIM), (range(500), 64))
    server = workshop.open(entry)
    planned = server.plan()
    needed = planned.host_bytes + planned.loading_bytes
    reserved: list[str] = []
    reserve = hps_numba.device.host_memory.PlainHostAllocator.reserve

    def recorded(self: Any, limit: int, purpose: str, **more: Any) -> Any:
        reserved.append(purpose)
        return reserve(self, limit, purpose, **more)

    monkeypatch.setattr(hps_numba.device.host_memory.PlainHostAllocator, "reserve", recorded)
    monkeypatch.setattr("hps_numba.server.plan.available_bytes", lambda: needed - 1)
    with pytest.raises(CapacityError, match="the largest table is m/sparse_embedding1 with"):
        workshop.open(entry)
    assert reserved == []
    monkeypatch.setattr("hps_numba.server.plan.available_bytes", lambda: needed)
    workshop.open(entry)
    assert reserved


# --- lookups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 16, 33])
@pytest.mark.parametrize("shape", [(0,), (1,), (5, 0), (7,), (3, 4), (2, 3, 4), ()])
def test_lookup_takes_keys_of_any_shape(workshop: Workshop, shape: tuple[int, ...], dim: int) -> None:
    server = workshop.open(workshop.model((KEYS, dim)))
    truth = NaiveServer(dim, -7.5)
    truth.insert(KEYS, rows_of(KEYS, dim))
    keys = np.random.default_rng(len(shape)).integers(-2, 11, shape)
    assert_same_bits(server.lookup(keys, "m", 0), truth.lookup(keys))


def test_caller_order_and_duplicates_are_kept(workshop: Workshop) -> None:  # D02
    server = workshop.open(workshop.model((KEYS, DIM)))
    keys = [8, 3, 3, 77, 0, 8, 77, 3]
    rows = server.lookup(keys, "m", 0)
    assert_same_bits(rows[[0, 1, 2, 4, 5, 7]], rows_of([8, 3, 3, 0, 8, 3], DIM))
    assert (rows[[3, 6]] == -7.5).all()
    stats = stats_of(server)
    assert (stats.keys, stats.host_hits, stats.absent, stats.calls) == (8, 6, 2, 1)


def test_more_keys_than_the_config_announced(workshop: Workshop) -> None:  # N02
    server = workshop.open(workshop.model((KEYS, DIM)))
    keys = np.arange(10_000) % 9
    assert server.config.tables()[0].max_keys == 8
    assert_same_bits(server.lookup(keys, "m", 0), rows_of(keys, DIM))
    assert_same_bits(server.lookup(keys.tolist(), "m", 0), rows_of(keys, DIM))


def test_out_is_written_and_returned(workshop: Workshop) -> None:  # N02
    server = workshop.open(workshop.model((KEYS, DIM)))
    out = np.full((2, 2, DIM), np.nan, np.float32)
    assert server.lookup([[1, 2], [99, 4]], "m", 0, out=out) is out
    assert_same_bits(out, server.lookup([[1, 2], [99, 4]], "m", 0))
    wide = np.full((3, 2 * DIM), np.nan, np.float32)
    server.lookup([1, 2, 99], "m", 0, out=wide[:, ::2])
    assert_same_bits(wide[:, ::2], server.lookup([1, 2, 99], "m", 0))
    assert np.isnan(wide[:, 1::2]).all()


@pytest.mark.parametrize("out", [np.empty((2, DIM)), np.empty((1, DIM), np.float32), np.empty(2 * DIM, np.float32)])
def test_an_output_that_does_not_fit_is_refused(workshop: Workshop, out: np.ndarray) -> None:
    with pytest.raises(ArrayError, match="out"):
        workshop.open(workshop.model((KEYS, DIM))).lookup([1, 2], "m", 0, out=out)


def test_lookup_many_follows_the_order_of_tables(workshop: Workshop) -> None:  # G39
    server = workshop.open(workshop.model((KEYS, 2), (KEYS, 3), ([], 4)))
    expected = [rows_of([1, 2], 2), rows_of([[3], [4]], 3), np.full((1, 4), -9.5, np.float32)]
    for got, want in zip(server.lookup_many([[1, 2], [[3], [4]], [5]], "m"), expected, strict=True):
        assert_same_bits(got, want)
    flat = server.lookup_many([[1, 2], [[3], [4]], [5]], "m", flat=True)
    assert_same_bits(flat, np.concatenate([rows.reshape(-1) for rows in expected]))
    some = server.lookup_many({"sparse_embedding1": [3], 0: [1]}, "m")
    assert list(some) == ["sparse_embedding1", 0]
    assert_same_bits(some["sparse_embedding1"], rows_of([3], 3))
    assert server.lookup_many([], "m") == []
    assert_same_bits(server.lookup_many([], "m", flat=True), np.empty(0, np.float32))


def test_lookup_many_refuses_more_tables_than_the_model_has(workshop: Workshop) -> None:  # G39
    server = workshop.open(workshop.model((KEYS, 2)))
    with pytest.raises(UnknownModelError, match="has no table 1"):
        server.lookup_many([[1], [2]], "m")


@pytest.mark.parametrize("volatile", ["parallel_hash_map", "disabled"])
@pytest.mark.parametrize("persistent", ["support.fakes:DictTier", "disabled"])
def test_every_combination_of_databases_serves(
    workshop: Workshop, caplog: pytest.LogCaptureFixture, volatile: str, persistent: str
) -> None:  # D03
    with caplog.at_level(logging.WARNING):
        server = workshop.open(workshop.model((KEYS, DIM)), volatile_db={"type": volatile}, persistent_db={"type": persistent})
    none = volatile == persistent == "disabled"
    truth = NaiveServer(DIM, -7.5)
    if not none:
        truth.insert(KEYS, rows_of(KEYS, DIM))
    keys = [5, 99, 5, 0, -1]
    assert_same_bits(server.lookup(keys, "m", 0), truth.lookup(keys))
    warnings = [r.message for r in caplog.records]
    without_database = "model m: no volatile_db and no persistent_db: every key gets its table's default value"
    assert warnings == ([without_database] if none else [])
    stats = stats_of(server)
    by_tier = (stats.host_hits, stats.tier_hits, stats.absent)
    assert by_tier == ((0, 0, 5) if none else (3, 0, 2) if volatile != "disabled" else (0, 3, 2))


# --- counters, names, the end -----------------------------------------------------------------------------------------


def test_stats_count_keys_as_asked_for(workshop: Workshop) -> None:  # N05
    server = workshop.open(workshop.model((KEYS, DIM)))
    assert stats_of(server).hit_rate == 1.0
    server.lookup([1, 1, 99], "m", 0)
    server.lookup([], "m", 0)
    server.lookup([2], "m", 0)
    stats = stats_of(server)
    assert (stats.calls, stats.keys, stats.host_hits, stats.tier_hits) == (2, 4, 3, 0)
    assert (stats.absent, stats.unanswered, stats.tier_errors, stats.defaults) == (1, 0, 0, 1)
    assert (stats.rows, stats.evicted, stats.version) == (9, 0, 1)
    assert stats.hit_rate == 0.75
    assert server.host_bytes == stats.bytes == server.plan().host_bytes


@pytest.mark.parametrize(
    ("model", "table", "message"),
    [
        ("n", 0, "model_name: 'n' is not deployed, deployed are m"),
        ("m", 2, r"model 'm' has no table 2, it has 0 \(sparse_embedding0\), 1 \(sparse_embedding1\)"),
        ("m", -1, "has no table -1"),
        ("m", "x", "has no table 'x'"),
    ],
)
def test_unknown_models_and_tables_are_named(workshop: Workshop, model: str, table: int | str, message: str) -> None:
    server = workshop.open(workshop.model((KEYS, DIM), (KEYS, DIM)))
    rows = rows_of([1], DIM)
    for call in (
        lambda: server.lookup([1], model, table),
        lambda: server.insert([1], rows, model, table),
        lambda: server.update([1], rows, model, table),
        lambda: server.erase([1], model, table),
        lambda: server.contains([1], model, table),
    ):
        with pytest.raises(UnknownModelError, match=message):
            call()


@pytest.mark.parametrize("table", [0.0, None, True, [0], np.float32(0)])
def test_a_table_id_of_a_wrong_type_is_refused(workshop: Workshop, table: Any) -> None:
    server = workshop.open(workshop.model((KEYS, DIM), (KEYS, DIM)))
    with pytest.raises(UnknownModelError, match="has no table"):
        server.lookup([1], "m", table)


def test_a_table_id_may_be_a_numpy_integer(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((KEYS, DIM)))
    assert_same_bits(server.lookup([1], "m", np.int64(0)), rows_of([1], DIM))  # type: ignore[arg-type]


def test_every_call_on_a_closed_server_raises_closed_error(workshop: Workshop, tmp_path: Path) -> None:  # N05
    entry = workshop.model((KEYS, DIM))
    with workshop.open(entry) as server:
        assert repr(server) == "<HPS m (1 tables)>"
    server.close()
    assert repr(server) == "<HPS closed>"
    rows = rows_of([1], DIM)
    for call in (
        lambda: server.lookup([1], "m", 0),
        lambda: server.lookup_many([[1]], "m"),
        lambda: server.insert([1], rows, "m", 0),
        lambda: server.update([1], rows, "m", 0),
        lambda: server.erase([1], "m", 0),
        lambda: server.contains([1], "m", 0),
        lambda: server.dump(tmp_path / "x.bin", "m", 0),
        lambda: server.load_model(entry),
        lambda: server.replace_model("m"),
        lambda: server.unload_model("m"),
        server.stats,
        server.plan,
    ):
        with pytest.raises(ClosedError, match="closed"):
            call()
    wait_for_release(server, 0, headers=1)  # the header of a table stays for late readers


def test_servers_open_again_and_side_by_side_in_one_process(workshop: Workshop) -> None:  # O12
    entry = workshop.model((KEYS, DIM))
    for _ in range(3):
        with workshop.open(entry) as server:
            assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))
    first, second = workshop.open(entry), workshop.open(entry)
    first.insert([0], rows_of([0], DIM, 5), "m", 0)
    first.close()
    assert_same_bits(second.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))


def test_output_dtype_float16(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(5), 4), output_dtype="float16"))
    rows = server.lookup([3, 99], "m", 0)
    assert rows.dtype == np.float16
    assert np.array_equal(rows[0], rows_of([3], 4)[0].astype(np.float16))
    out = np.empty((2, 4), np.float16)
    assert server.lookup([3, 99], "m", 0, out=out) is out and np.array_equal(out, rows)
    with pytest.raises(hps_numba.ArrayError, match="expected dtype float16, got float32"):
        server.lookup([3], "m", 0, out=np.empty((1, 4), np.float32))


def test_bfloat16_answers_in_host_memory_are_refused(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(5), 4), output_dtype="bfloat16"))  # for keys in the memory of a GPU
    with pytest.raises(ArrayError, match="output_dtype: expected float32 or float16 for keys in host memory, got bfloat16"):
        server.lookup([1], "m", 0)


def test_wrong_argument_types_raise_typed_errors(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(5), 4)))
    with pytest.raises(hps_numba.UnknownModelError, match="model_name"):
        server.lookup([1], ["m"], 0)  # type: ignore[arg-type]
    with pytest.raises(hps_numba.KeyDtypeError, match=r"keys: expected a sequence or mapping .*, got int"):
        server.lookup_many(5, "m")
    with pytest.raises(hps_numba.ConfigError, match="model: expected a mapping, InferenceParams or ModelConfig, got int"):
        server.load_model(3)  # type: ignore[arg-type]
    narrow = hps_numba.InferenceParams("n", 1, 1.0, "", ["x"], False, 1.0, False)
    with pytest.raises(hps_numba.ConfigError, match="i64_input_key: False, but this server has keys of 64 bits"):
        server.load_model(narrow)
    server.close()
    with pytest.raises(hps_numba.ClosedError), server:
        pass
