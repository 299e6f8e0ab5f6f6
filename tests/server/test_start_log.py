"""What is logged at INFO while a server starts (checklist O08), and at TRACE while it works."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.oracles import rows_of
from support.updates import fresh_bus, source_of

import hps_numba
from hps_numba.runtime.hugectr_log import TRACE

KEYS, DIM = range(9), 3
T0, T1 = "hps_et.m.sparse_embedding0", "hps_et.m.sparse_embedding1"
CACHED: dict[str, Any] = {"cache_on_cpu": True}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches are in host memory, whatever the machine has."""
    monkeypatch.setattr(hps_numba.device.driver, "device_count", lambda: 0)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """Calls a function and returns the INFO lines that it logged."""
    caplog.set_level(logging.INFO, "hps_numba")

    def of(call: Any) -> list[str]:
        caplog.clear()
        call()
        return [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]

    return of


def one_of(lines: list[str], beginning: str) -> str:
    (line,) = [line for line in lines if line.startswith(beginning)]
    return line


def position(lines: list[str], beginning: str) -> int:
    return lines.index(one_of(lines, beginning))


def test_o08_what_is_read_comes_first_then_what_is_absent(workshop: Workshop, lines: Any) -> None:
    found = lines(lambda: workshop.open_file(workshop.model((KEYS, DIM)), volatile_db={"type": "hash_map"}))
    assert found[0] == f"reading {workshop.folder / 'ps.json'}: models m"
    assert "models[0].gpucacheper: absent, using 0.2" in found
    assert "persistent_db: absent, using type 'disabled' with its defaults" in found
    assert position(found, "models[0].gpucacheper") < position(found, "starting")


def test_o08_the_plan_and_the_end_of_the_start(workshop: Workshop, lines: Any) -> None:
    models = [workshop.model((KEYS, DIM), (KEYS, 5)), workshop.model((KEYS, 4), name="n")]
    found = lines(lambda: workshop.open(*models))
    start = one_of(found, "starting")
    assert re.fullmatch(r"starting models m, n: 3 tables, keys of 64 bits, planned: [\d.]+ [KMG]?i?B of host memory", start)
    assert re.fullmatch(r"model m: ready after [\d.e-]+ s: version 1, 2 tables", one_of(found, "model m: ready"))
    assert re.fullmatch(r"model n: ready after [\d.e-]+ s: version 1, 1 table", one_of(found, "model n: ready"))
    assert re.fullmatch(r"ready after [\d.e-]+ s: models m, n", found[-1])


def test_o08_the_sizes_of_devices_are_in_the_plan(lines: Any) -> None:
    from types import SimpleNamespace

    from hps_numba.server.start_log import log_start

    model = SimpleNamespace(model="m")
    config: Any = SimpleNamespace(models=(model,), supportlonglong=False)
    plan: Any = SimpleNamespace(host_bytes=3 << 20, device_bytes={0: 1 << 30, 2: 5 << 20}, tables=(1, 2))
    (line,) = lines(lambda: log_start(config, plan))
    assert line == (
        "starting models m: 2 tables, keys of 32 bits, planned: 3.0 MiB of host memory, 1.0 GiB of device 0, "
        "5.0 MiB of device 2"
    )


def test_o08_every_tier_with_what_it_does_at_the_start_and_with_missed_rows(
    workshop: Workshop, lines: Any, tmp_path: Path
) -> None:
    volatile = {"type": "hash_map", "initial_cache_rate": 0.5, "cache_missed_embeddings": True}
    persistent = {"type": "rocks_db", "path": str(tmp_path / "db"), "initialize_after_startup": True}
    found = lines(lambda: workshop.open(workshop.model((KEYS, DIM)), volatile_db=volatile, persistent_db=persistent))
    host, slower = one_of(found, "volatile_db: opened"), one_of(found, "persistent_db: opened")
    assert host.startswith("volatile_db: opened hash_map: initialize_after_startup true, initial_cache_rate 0.5")
    assert "cache_missed_embeddings true" in host and "overflow" not in host
    assert slower.startswith("persistent_db: opened rocks_db: initialize_after_startup true")
    assert "read_only false" in slower
    assert f"{T0}: inserted 9 of 9 rows in rocks_db" in found
    assert f"{T0}: cached 5 of 9 rows in host memory" in found


def test_o08_no_password_is_logged(workshop: Workshop, lines: Any) -> None:
    volatile = {"type": "support.fakes:DictTier", "password": "a secret"}
    found = lines(lambda: workshop.open(workshop.model((KEYS, DIM)), volatile_db=volatile))
    assert one_of(found, "volatile_db: opened support.fakes:DictTier")
    assert "a secret" not in "\n".join(found)


def test_o08_the_load_of_a_bound_table(workshop: Workshop, lines: Any) -> None:
    volatile = {"type": "hash_map", "num_partitions": 2, "overflow_margin": 10, "initial_cache_rate": 0.5}
    found = lines(lambda: workshop.open(workshop.model((KEYS, DIM)), volatile_db=volatile))
    assert "overflow_policy 'evict_random', overflow_margin 10, num_partitions 2" in one_of(found, "volatile_db: opened")
    assert f"{T0}: cached 5 of 9 rows in host memory, load 25 % of 20 (overflow_margin x num_partitions)" in found


def test_o08_parameters_of_caches(workshop: Workshop, lines: Any) -> None:
    entry = workshop.model(
        (KEYS, DIM),
        (range(500), 8),
        gpucacheper=0.5,
        hit_rate_threshold=0.75,
        max_batch_size=16,
        num_of_worker_buffer_in_pool=3,
        use_context_stream=False,
        cache_policy=["lru", "lfu"],
        cache_row_dtype=["float32", "float16"],
    )
    found = lines(lambda: workshop.open(entry, supportlonglong=False, **CACHED))
    shared = one_of(found, "model m: caches")
    assert shared.startswith("model m: caches of type dynamic in host memory: 2 tables, keys of 32 bits, max_batch_size 16")
    for said in (
        "gpucacheper 0.5",
        "hit_rate_threshold 0.75",
        "num_of_worker_buffer_in_pool 3",
        "num_of_refresher_buffer_in_pool 1",
        "cache_refresh_percentage_per_iteration 0.0",
        "use_context_stream false",
        "fuse_embedding_table false",
    ):
        assert f", {said}" in shared
    assert f"{T0}: dynamic cache for 64 rows of 3 x float32, policy lru" in found
    assert f"{T1}: dynamic cache for 256 rows of 8 x float16, policy lfu" in found
    for tag, table, rows in ((T0, "sparse_embedding0", 9), (T1, "sparse_embedding1", 500)):
        (cache,) = workshop.servers[0].stats()["m"][table].caches
        resident, room = cache.resident, cache.capacity
        load = f"load {100 * resident / room:.3g} % of {room}"
        assert f"{tag}: cached {resident} of {rows} rows in the cache of host memory, {load}" in found


def test_o08_a_cache_that_gets_the_minimum_size(workshop: Workshop, lines: Any) -> None:
    found = lines(lambda: workshop.open(workshop.model((KEYS, DIM), (range(320), DIM)), **CACHED))
    assert f"{T0}: gpucacheper 0.2 of 9 rows is 1: the cache gets the minimum, 64 rows" in found
    assert not [line for line in found if line.startswith(T1) and "minimum" in line]  # 0.2 of 320 is 64


@pytest.mark.parametrize("kind", ["static", "uvm"])
def test_o08_fixed_caches_have_neither_policy_nor_minimum(workshop: Workshop, lines: Any, kind: str) -> None:
    found = lines(lambda: workshop.open(workshop.model((KEYS, DIM), embedding_cache_type=kind, gpucacheper=1.0), **CACHED))
    assert one_of(found, "model m: caches").startswith(f"model m: caches of type {kind} in host memory")
    assert f"{T0}: {kind} cache for 9 rows of 3 x float32" in found
    assert "minimum" not in "\n".join(found)


def test_o08_without_a_cache_nothing_is_said_of_one(workshop: Workshop, lines: Any) -> None:
    found = lines(lambda: workshop.open(workshop.model((KEYS, DIM), gpucache=False), **CACHED))
    found += lines(lambda: workshop.open(workshop.model((KEYS, DIM))))
    assert not [line for line in found if re.search(r"\bcaches? (of|for)\b", line)]


def test_o08_update_sources_and_the_tables_they_are_for(workshop: Workshop, lines: Any) -> None:
    entries = [workshop.model((KEYS, DIM), (KEYS, DIM)), workshop.model((KEYS, DIM), name="n")]
    source = source_of(fresh_bus(), name="news")
    volatile = {"type": "hash_map", "update_filters": ["m"]}
    found = lines(lambda: workshop.open(*entries, volatile_db=volatile, update_source=source))
    assert f"update_source: in_process 'news' brings updates of 2 tables: {T0}, {T1}" in found
    volatile["update_filters"] = ["nobody"]
    found = lines(lambda: workshop.open(*entries, volatile_db=volatile, update_source=source))
    assert "update_source: in_process 'news' brings updates of 0 tables" in found


def test_o08_no_database_is_a_warning(workshop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    workshop.open(workshop.model((KEYS, DIM)), volatile_db={"type": "disabled"})
    assert "model m: no volatile_db and no persistent_db: every key gets its table's default value" in caplog.messages


def test_a_model_that_is_loaded_later_says_the_same(workshop: Workshop, lines: Any) -> None:
    server = workshop.open(workshop.model((KEYS, DIM)))
    found = lines(lambda: server.load_model(workshop.model((KEYS, DIM), name="late")))
    assert "hps_et.late.sparse_embedding0: cached 9 of 9 rows in host memory" in found
    assert one_of(found, "model late: ready after")


def test_trace_tells_of_each_call_of_a_tier_and_of_refreshes(workshop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(TRACE, "hps_numba"):
        server, _ = workshop.open_cold()
        np.testing.assert_array_equal(server.lookup([1, 2, 100], "m", 0)[:2], rows_of([1, 2], DIM))
        assert re.search(rf"{T0}: 9 rows in support.fakes:CountedDictTier after [\d.e-]+ s", caplog.text)
        assert re.search(rf"{T0}: [\w ():.]+: 2 of 3 keys in [\d.]+ ms", caplog.text)
        caplog.clear()
        cached = workshop.open(workshop.model((KEYS, DIM), cache_refresh_percentage_per_iteration=0.5, name="c"), **CACHED)
        cached.refresh("c")
        assert len(re.findall(r"hps_et.c.sparse_embedding0: sets \d+ to \d+ refreshed in [\d.e-]+ s", caplog.text)) == 2
