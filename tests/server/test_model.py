"""Models that are loaded, replaced and unloaded while the server serves; and two models from a config of HugeCTR HPS."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.factories import COLD, KEEPING, Workshop
from support.internals import bytes_in_use, host_memory, slower_tier, wait_for_background, wait_for_release
from support.oracles import assert_same_bits, rows_of
from support.waiting import join_all, wait_until

import hps_numba
from hps_numba.device import driver
from hps_numba.errors import CapacityError, ConfigError, DeviceError, ModelFileError, TierError, UnknownModelError
from hps_numba.server.table import ServedTable

DIM = 3
KEYS = list(range(9))
TAG = "hps_et.m.sparse_embedding0"


def stats_of(server: hps_numba.HPS, model: str = "m", table: int = 0) -> Any:
    return server.stats()[model][f"sparse_embedding{table}"]


# --- a config of HugeCTR HPS ------------------------------------------------------------------------------------------


@pytest.fixture
def hugectr_config(workshop: Workshop) -> Path:
    """Two models of the samples of HugeCTR HPS, with ``//`` comments and keys that it documents and never reads."""
    one = workshop.table("demo_model_sparse.model", range(500), 16)
    two = [workshop.table(f"demo_model2_sparse_{i}.model", range(100 * i, 300), dim) for i, dim in enumerate((64, 32))]
    text = f"""
    {{
        // keys are int64
        "supportlonglong": true,
        "models": [{{
            "model": "demo_model",
            "sparse_files": [{json.dumps(one)}],
            "dense_file": "",
            "network_file": "demo_model.json",
            "num_of_worker_buffer_in_pool": 3,
            "embedding_table_names": ["sparse_embedding1"],
            "embedding_vecsize_per_table": [16],
            "maxnum_catfeature_query_per_table_per_sample": [10],
            "default_value_for_each_table": [1.0],
            "deployed_device_list": [0],
            "max_batch_size": 16384,
            "cache_refresh_percentage_per_iteration": 0.2,
            "hit_rate_threshold": 1.0,
            "gpucacheper": 1.0,
            "gpucache": true
        }},
        {{
            "model": "demo_model2",
            "sparse_files": [{json.dumps(two[0])}, {json.dumps(two[1])}],  // one a table
            "embedding_table_names": ["sparse_embedding0", "sparse_embedding1"],
            "embedding_vecsize_per_table": [64, 32],
            "maxnum_catfeature_query_per_table_per_sample": [3, 5],
            "default_value_for_each_table": [0.5, 2.0],
            "deployed_device_list": [0],
            "max_batch_size": 16384,
            "cache_refresh_percentage_per_iteration": 0.2,
            "hit_rate_threshold": 1.0,
            "gpucacheper": 1.0,
            "gpucache": true
        }}],
        "volatile_db": {{"type": "parallel_hash_map", "num_partitions": 4, "initial_cache_rate": 1.0}}
    }}"""
    path = workshop.folder / "hps_conf.json"
    path.write_text(text)
    return path


def test_a_hugectr_config_of_two_models_serves(hugectr_config: Path, caplog: pytest.LogCaptureFixture) -> None:  # C01, C18
    with caplog.at_level(logging.WARNING), hps_numba.HPS(hugectr_config) as server:
        said = [f"deployed_device_list [0]: {driver.why_no_device()}: host memory serves all lookups"]
        assert [r.message for r in caplog.records if r.levelname == "WARNING"] == ([] if driver.device_count() else said)
        rng = np.random.default_rng(0)
        keys = rng.integers(0, 500, (64, 10))
        assert_same_bits(server.lookup(keys, "demo_model", 0, 0), rows_of(keys, 16))
        assert_same_bits(server.lookup([[7]], "demo_model", "sparse_embedding1"), rows_of([[7]], 16))
        first, second = rng.integers(0, 300, (64, 3)), rng.integers(100, 300, (64, 5))
        got = server.lookup_many([first, second], "demo_model2")
        assert_same_bits(got[0], rows_of(first, 64))
        assert_same_bits(got[1], rows_of(second, 32))
        assert (server.lookup([500], "demo_model", 0) == 1).all()
        assert (server.lookup([300], "demo_model2", 0) == 0.5).all()
        assert (server.lookup([99], "demo_model2", 1) == 2).all()
        assert [table.rows for model in server.stats().values() for table in model.values()] == [500, 300, 200]
        assert [spec.max_keys for spec in server.config.tables()] == [163840, 49152, 81920]
        with pytest.raises(DeviceError, match="device_id"):
            server.lookup([1], "demo_model", 0, 1)


def test_relative_files_are_found_beside_the_config(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # C01
    entry = workshop.model((KEYS, DIM), sparse_files=["m_0.model"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    server = workshop.open_file(entry)
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))
    workshop.table("later.model", KEYS, DIM, 1)
    server.load_model({**entry, "model": "later", "sparse_files": ["later.model"]})
    assert_same_bits(server.lookup(KEYS, "later", 0), rows_of(KEYS, DIM, 1))
    workshop.table("elsewhere/m_0.model", KEYS, DIM, 2)  # the working directory comes first
    assert_same_bits(workshop.open_file(entry).lookup(KEYS, "m", 0), rows_of(KEYS, DIM, 2))


# --- load and unload --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dict", "object", "config"])
def test_load_model_adds_a_model_to_a_running_server(workshop: Workshop, form: str) -> None:  # D25
    server = workshop.open(workshop.model((KEYS, DIM)))
    entry = workshop.model(([5], 2), ([6], 4), name="added")
    described: Any = entry
    if form == "object":
        described = hps_numba.InferenceParams(
            "added",
            4,
            0.9,
            "",
            entry["sparse_files"],
            False,
            0.2,
            True,
            default_value_for_each_table=[-7.5, -8.5],
            maxnum_catfeature_query_per_table_per_sample=[2, 2],
            embedding_vecsize_per_table=[2, 4],
        )
    elif form == "config":
        described = hps_numba.read_config({"supportlonglong": True, "models": [entry]}).models[0]
    server.load_model(described)
    assert server.models == ("m", "added")
    assert_same_bits(server.lookup([5], "added", 0), rows_of([5], 2))
    assert_same_bits(server.lookup([6, 7], "added", 1)[:1], rows_of([6], 4))
    assert (server.lookup([7], "added", 1) == -8.5).all()
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))


def test_load_model_refuses_the_name_of_a_deployed_model(workshop: Workshop) -> None:
    entry = workshop.model((KEYS, DIM))
    server = workshop.open(entry)
    with pytest.raises(ConfigError, match="model: 'm' is deployed already"):
        server.load_model(entry)
    assert server.models == ("m",)


def test_load_model_refuses_an_invalid_description(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((KEYS, DIM)))
    for wrong in ({"gpucacheper": 1.4}, {"embedding_vecsize_per_table": [3, 3]}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            server.load_model({**workshop.model((KEYS, DIM), name="n"), **wrong})
    assert server.models == ("m",)


def test_load_model_of_a_strict_server_refuses_unknown_keys(workshop: Workshop) -> None:
    entry = workshop.model((KEYS, DIM), name="n", gpucachepr=0.5)
    with hps_numba.HPS({"supportlonglong": True, "models": [workshop.model((KEYS, DIM))]}, strict=True) as server:
        with pytest.raises(ConfigError, match="gpucachepr: unknown key"):
            server.load_model(entry)
        assert server.models == ("m",)


def test_a_model_that_does_not_fit_into_memory_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    server = workshop.open(workshop.model((KEYS, DIM)))
    before = bytes_in_use(server)
    monkeypatch.setattr("hps_numba.server.plan.available_bytes", lambda: 1000)
    with pytest.raises(CapacityError, match="the plan takes"):
        server.load_model(workshop.model((range(500), 64), name="big"))
    with pytest.raises(CapacityError, match="the plan takes"):
        server.replace_model("m")
    assert server.models == ("m",)
    wait_for_release(server, before)
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))


def test_a_failed_load_model_leaves_no_memory_in_use(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((KEYS, DIM)))
    before = bytes_in_use(server)
    entry = workshop.model((KEYS, DIM), (KEYS, 5), name="broken")
    path = Path(entry["sparse_files"][1], "emb_vector")
    path.write_bytes(path.read_bytes()[:-4])
    for _ in range(3):
        with pytest.raises(ModelFileError, match="broken_1"):
            server.load_model(entry)
    assert server.models == ("m",)
    wait_for_release(server, before)
    with pytest.raises(UnknownModelError):
        server.lookup([1], "broken", 0)
    server.load_model(workshop.model((KEYS, DIM), (KEYS, 5), name="broken"))
    assert_same_bits(server.lookup(KEYS, "broken", 1), rows_of(KEYS, 5))


class RefusedTable(ServedTable):
    """Tables of width 5 cannot be opened."""

    def __init__(self, spec: Any, *args: Any, **options: Any) -> None:
        if spec.dim == 5:
            raise ConfigError("no table of width 5")
        super().__init__(spec, *args, **options)


@pytest.mark.parametrize("early", ["tables", "plan"])
def test_a_load_model_that_fails_early_leaves_no_table(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, early: str) -> None:
    server = workshop.open(workshop.model((KEYS, DIM)))
    entry = workshop.model((KEYS, DIM), (KEYS, 5), name="broken")
    if early == "tables":
        monkeypatch.setattr("hps_numba.server.model.ServedTable", RefusedTable)
    else:  # the files vanish after the plan was made
        monkeypatch.setattr("hps_numba.server.model_loader.plan_config", lambda *given: SimpleNamespace(check=lambda: None))
        entry["sparse_files"][1] += ".gone"
    with pytest.raises((ConfigError, ModelFileError)):
        server.load_model(entry)
    assert host_memory(server).tables() == [TAG]
    assert server.models == ("m",)


def test_unload_model_frees_host_memory(workshop: Workshop) -> None:  # D24, D25
    first, second = workshop.model((KEYS, DIM)), workshop.model((range(2000), 64), name="second")
    server = workshop.open(first)
    before = bytes_in_use(server)
    server.load_model(second)
    assert bytes_in_use(server) >= before + 2000 * 64 * 4
    server.unload_model("second")
    assert server.models == ("m",)
    wait_for_release(server, before, headers=1)
    with pytest.raises(UnknownModelError, match="'second' is not deployed, deployed are m"):
        server.lookup([1], "second", 0)
    with pytest.raises(UnknownModelError):
        server.unload_model("second")
    server.load_model(workshop.model((KEYS, 2), name="second"))  # another width under the same name
    assert_same_bits(server.lookup(KEYS, "second", 0), rows_of(KEYS, 2))


@pytest.mark.parametrize("erase", [False, True])
def test_unload_model_erases_slower_tiers_only_if_asked_to(workshop: Workshop, erase: bool) -> None:  # D24
    server = workshop.open(workshop.model((KEYS, DIM)), persistent_db={"type": "support.fakes:DictTier"})
    server.unload_model("m", erase=erase)
    assert server.models == ()
    assert slower_tier(server).size(TAG) == (0 if erase else 9)


def test_unload_model_erases_the_other_tables_if_a_tier_fails_on_one(workshop: Workshop) -> None:  # D24
    server = workshop.open(workshop.model((KEYS, DIM), (KEYS, 2)), persistent_db={"type": "support.fakes:StuckTableTier"})
    with pytest.raises(TierError, match=f"{TAG}: stuck"):
        server.unload_model("m", erase=True)
    assert server.models == ()
    assert host_memory(server).tables() == []
    wait_for_release(server, 0, headers=2)
    assert [slower_tier(server).size(tag) for tag in (TAG, TAG[:-1] + "1")] == [9, 0]


# --- keys without effect ----------------------------------------------------------------------------------------------

UNUSED: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"miss_path": "staged"}, "disabled", ["miss_path"]),
    ({"refresh_interval": 2.5, "refresh_delay": 1}, "disabled", ["refresh_interval", "refresh_delay"]),
    ({"cache_policy": ["lru", "lfu"], "cache_row_dtype": "float16"}, "disabled", ["cache_policy", "cache_row_dtype"]),
    ({"cache_size_bytes": [0, 4096]}, "disabled", ["cache_size_bytes"]),
    ({"cache_size_bytes": [0, 0], "cache_policy": ["lru", "lru"], "miss_path": "auto"}, "disabled", []),
    ({"hit_rate_threshold": 0.5}, "support.fakes:DictTier", ["hit_rate_threshold"]),
    ({"hit_rate_threshold": -1}, "support.fakes:DictTier", ["hit_rate_threshold"]),
    ({"hit_rate_threshold": 1.0}, "support.fakes:DictTier", []),
    ({"hit_rate_threshold": 0.5}, "disabled", []),
]


@pytest.mark.parametrize(("entry", "persistent", "named"), UNUSED)
def test_config_keys_without_effect_are_one_warning_a_model(
    workshop: Workshop, caplog: pytest.LogCaptureFixture, entry: dict[str, Any], persistent: str, named: list[str]
) -> None:
    plain = workshop.model((KEYS, DIM), name="plain")
    described = workshop.model((KEYS, DIM), (KEYS, 2), **entry)
    with caplog.at_level(logging.WARNING):
        server = workshop.open(plain, persistent_db={"type": persistent})
        assert not caplog.records
        server.load_model(described)
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [line.partition(": without effect")[0] for line in lines] == ([f"model m: {', '.join(named)}"] if named else [])


# --- replace ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("volatile", "persistent"),
    [("hash_map", "disabled"), ("disabled", "support.fakes:DictTier"), ("hash_map", "support.fakes:DictTier")],
)
def test_replace_model_replaces_rows_in_every_tier(workshop: Workshop, volatile: str, persistent: str) -> None:  # D25
    server = workshop.open(
        workshop.model((KEYS, DIM), (KEYS, 2)), volatile_db={"type": volatile}, persistent_db={"type": persistent}
    )
    server.insert([50, 1], rows_of([50, 1], DIM, 5), "m", 0)  # part of the old version
    new = [workshop.table("new0", [1, 2, 20], DIM, 1), workshop.table("new1", [3], 2, 1)]
    server.replace_model("m", [Path(new[0]), new[1]])
    assert_same_bits(server.lookup([1, 2, 20], "m", 0), rows_of([1, 2, 20], DIM, 1))
    assert (server.lookup([0, 3, 50], "m", 0) == -7.5).all()
    assert_same_bits(server.lookup([3], "m", 1), rows_of([3], 2, 1))
    assert not server.contains([0, 1, 2, 4], "m", 1).any()
    assert stats_of(server).version == 2
    if persistent != "disabled":
        assert [slower_tier(server).size(tag) for tag in (TAG, TAG[:-1] + "1")] == [3, 1]


def test_replace_model_without_files_reads_those_of_the_config_again(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((KEYS, DIM)))
    workshop.table("m_0.model", [8, 9], DIM, 1)
    server.replace_model("m")
    assert_same_bits(server.lookup([8, 9], "m", 0), rows_of([8, 9], DIM, 1))
    assert stats_of(server).rows == 2


def test_replace_model_writes_tiers_that_are_not_initialized_at_start(workshop: Workshop) -> None:  # C19
    server = workshop.open(
        workshop.model((KEYS, DIM)), persistent_db={"type": "support.fakes:DictTier", "initialize_after_startup": False}
    )
    tier = slower_tier(server)
    tier.insert(TAG, np.array([1, 70]), rows_of([1, 70], DIM))  # from an earlier server
    server.replace_model("m", [workshop.table("new", [1, 2], DIM, 1)])
    assert tier.content[TAG].rows.keys() == {1, 2}
    assert (server.lookup([70], "m", 0) == -7.5).all()


def test_replace_model_leaves_host_memory_empty_if_lookups_fill_it(workshop: Workshop) -> None:  # C19
    server, _ = workshop.open_cold("support.fakes:DictTier", volatile=KEEPING)
    server.lookup([1, 2], "m", 0)
    wait_for_background(server)
    assert stats_of(server).rows == 2
    server.replace_model("m", [workshop.table("new", range(100), DIM, 1)])
    assert stats_of(server).rows == 0
    assert_same_bits(server.lookup([1, 99], "m", 0), rows_of([1, 99], DIM, 1))
    wait_for_background(server)
    assert stats_of(server).rows == 2


def test_replace_model_fills_host_memory_if_no_other_tier_can_hold_the_rows(workshop: Workshop) -> None:  # C19
    server = workshop.open(workshop.model((KEYS, DIM)), volatile_db={"type": "hash_map", "initialize_after_startup": False})
    assert (server.lookup(KEYS, "m", 0) == -7.5).all()
    server.replace_model("m")
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))


def test_replace_model_leaves_no_old_row_in_a_tier_with_an_initial_cache_rate(workshop: Workshop) -> None:  # C20
    volatile = {"type": "support.fakes:DictTier", "initial_cache_rate": 0.5}
    server = workshop.open(workshop.model((range(10), DIM)), volatile_db=volatile)
    workshop.table("m_0.model", range(9, -1, -1), DIM, 1)
    server.replace_model("m")
    assert_same_bits(server.lookup([9, 8, 7, 6, 5], "m", 0), rows_of([9, 8, 7, 6, 5], DIM, 1))
    assert (server.lookup([4, 3, 2, 1, 0], "m", 0) == -7.5).all()


@pytest.mark.parametrize("files", [0, 1, 3])
def test_replace_model_refuses_a_wrong_number_of_files(workshop: Workshop, files: int) -> None:
    server = workshop.open(workshop.model((KEYS, DIM), (KEYS, 2)))
    with pytest.raises(ConfigError, match=rf"sparse_files: expected one for each of the 2 tables of model 'm', got {files}"):
        server.replace_model("m", [workshop.table("new", KEYS, DIM, 1)] * files)
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))
    assert stats_of(server).version == 1


@pytest.mark.parametrize("persistent", ["disabled", "support.fakes:DictTier"])
def test_a_failed_replace_model_leaves_the_old_version_in_force(workshop: Workshop, persistent: str) -> None:
    server = workshop.open(workshop.model((KEYS, DIM), (KEYS, 2)), persistent_db={"type": persistent})
    before = bytes_in_use(server)
    good, narrow = workshop.table("good", [1], DIM, 1), workshop.table("narrow", KEYS, 5, 1)
    for bad in (narrow, str(workshop.folder / "missing")):
        with pytest.raises(ModelFileError, match=Path(bad).name):
            server.replace_model("m", [good, bad])
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))
    assert_same_bits(server.lookup(KEYS, "m", 1), rows_of(KEYS, 2))
    assert stats_of(server).version == 1
    wait_for_release(server, before)


@pytest.mark.parametrize("volatile", [COLD, {"type": "hash_map", "initial_cache_rate": 0.5}, {"type": "disabled"}])
def test_replace_model_changes_no_tier_if_a_file_has_a_bad_key_near_its_end(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, volatile: dict[str, Any]
) -> None:
    monkeypatch.setattr("hps_numba.storage.loading._CHUNK_BYTES", 160)
    server = workshop.open(
        workshop.model((range(50), 2), (KEYS, 2)),
        supportlonglong=False,
        volatile_db=volatile,
        persistent_db={"type": "support.fakes:DictTier"},
    )
    good, bad = workshop.table("good", KEYS, 2, 4), workshop.table("bad", [*range(49), 2**40], 2, 4)
    for files in ([good, bad], [bad, good]):
        with pytest.raises(ModelFileError, match=f"bad: key {2**40} at row 49 does not fit 32 bits"):
            server.replace_model("m", files)
    tier = slower_tier(server)
    for tag, n in ((TAG, 50), (TAG[:-1] + "1", 9)):
        rows = np.zeros((n, 2), np.float32)
        assert tier.size(tag) == n
        assert tier.fetch(tag, np.arange(n), rows).found.all()
        assert_same_bits(rows, rows_of(range(n), 2))
    assert stats_of(server).version == 1


def test_replace_model_of_an_unknown_model_raises(workshop: Workshop) -> None:
    with pytest.raises(UnknownModelError, match="'n' is not deployed"):
        workshop.open(workshop.model((KEYS, DIM))).replace_model("n")


def test_replace_model_leaves_host_memory_if_a_slower_tier_fails(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((KEYS, DIM)), persistent_db={"type": "support.fakes:FlakyDictTier"})
    slower_tier(server).fail_on.add("insert")
    before = bytes_in_use(server)
    with pytest.raises(TierError, match="failed on purpose"):
        server.replace_model("m", [workshop.table("new", KEYS, DIM, 1)])
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))
    assert stats_of(server).version == 1
    wait_for_release(server, before)
    slower_tier(server).fail_on.clear()
    server.insert([1], rows_of([1], DIM, 2), "m", 0)  # no lock is still held
    assert_same_bits(server.lookup([1], "m", 0), rows_of([1], DIM, 2))


def test_repeated_replace_model_takes_no_more_memory(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(300), 16)))
    before = bytes_in_use(server)
    for stamp in range(12):
        server.replace_model("m", [workshop.table(f"v{stamp % 2}", range(300), 16, stamp)])
        assert bytes_in_use(server) >= before
        wait_for_release(server, before)
    assert stats_of(server).version == 13


def test_lookup_many_sees_one_version_of_all_tables(workshop: Workshop) -> None:
    versions = [[workshop.table(f"v{v}_{i}", range(64), 4, v) for i in range(3)] for v in range(4)]
    server = workshop.open(workshop.model(*[(range(64), 4)] * 3, sparse_files=versions[0]))
    keys = np.arange(64)
    expected = [rows_of(keys, 4, v) for v in range(4)]
    seen: set[int] = set()
    wrong: list[Any] = []
    stop = threading.Event()

    def look_up() -> None:
        try:
            while not stop.is_set():
                got = server.lookup_many([keys] * 3, "m")
                which = {v for v in range(4) for rows in got if np.array_equal(rows, expected[v])}
                seen.update(which)
                if len(which) != 1 or not all(np.array_equal(rows, got[0]) for rows in got):
                    wrong.append(got)
        except BaseException as problem:
            wrong.append(problem)

    threads = [threading.Thread(target=look_up) for _ in range(2)]
    for thread in threads:
        thread.start()
    for step in range(1, 9):
        server.replace_model("m", versions[step % 4])
        seen.clear()
        wait_until(lambda step=step: step % 4 in seen or wrong)
    stop.set()
    join_all(*threads)
    assert not wrong


def test_replace_model_takes_a_single_path(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(5), 4)))
    server.replace_model("m", workshop.table("new", range(5), 4, stamp=7))
    assert_same_bits(server.lookup(np.arange(5), "m", 0), rows_of(range(5), 4, 7))
