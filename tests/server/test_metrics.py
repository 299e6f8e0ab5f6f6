"""The metrics of a server: what its text says is what its stats say, and every metric appears where it should."""

from __future__ import annotations

import re
from itertools import repeat
from typing import Any

import numpy as np
import pytest
from support.factories import KEEPING, Workshop
from support.internals import served_model
from support.services import DIM, KEYS, Service

from hps_numba import HPS
from hps_numba.errors import ArrayError, ClosedError, ConfigError, KeyDtypeError, ModelFileError, TierError
from hps_numba.kernels.host.histogram import SAMPLED
from hps_numba.metrics import Family, HistogramSnapshot
from hps_numba.server.metrics import SERVER_METRICS

HOST = {"type": "hash_map"}


def families(server: HPS) -> dict[str, Family]:
    return {family.metric.name: family for family in server.metrics.collect()}


def value(server: HPS, name: str, **labels: Any) -> float | HistogramSnapshot:
    return families(server)[name].value(**labels)


def test_names_of_metrics_are_as_prometheus_wants_them() -> None:
    names = [metric.name for metric in SERVER_METRICS]
    assert len(set(names)) == len(names)
    for metric in SERVER_METRICS:
        assert re.fullmatch(r"hps_[a-z_]+", metric.name)
        assert metric.help.endswith(".")
        assert metric.unit or not metric.family.endswith(("_seconds", "_bytes", "_keys", "_rows"))


def test_lookups_are_counted_by_tier(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(9), 3), (range(5), 2)), volatile_db=HOST)
    server.lookup(np.array([1, 1, 2, 100]), "m", 0)
    server.lookup([4], "m", 1)
    found = families(server)
    assert found["hps_lookups_total"].value(table="sparse_embedding0") == 1
    assert found["hps_keys_total"].value(table="sparse_embedding0") == 4
    assert found["hps_keys_total"].value(table="sparse_embedding1") == 1
    assert found["hps_hit_keys_total"].value(table="sparse_embedding0", tier="host_memory") == 3
    assert found["hps_absent_keys_total"].value(table="sparse_embedding0") == 1
    assert found["hps_host_rows"].value(table="sparse_embedding0") == 9
    assert found["hps_model_version"].value(model="m") == 1


def test_hits_of_slower_tiers_and_unanswered_keys(workshop: Workshop) -> None:
    server, _ = workshop.open_cold(volatile=KEEPING)
    server.lookup([1, 2, 99], "m", 0)
    workshop.let_background_finish(server)
    server.lookup([1], "m", 0)
    assert value(server, "hps_hit_keys_total", tier="slower_tiers") == 2
    assert value(server, "hps_hit_keys_total", tier="host_memory") == 1
    assert value(server, "hps_absent_keys_total") == 1
    assert value(server, "hps_unanswered_keys_total") == 0
    assert value(server, "hps_background_jobs", pool="lookups") == 0
    server.prefetch([3], "m", 0, wait=True)
    assert value(server, "hps_prefetched_rows_total") == 1


def test_a_sample_of_lookups_in_host_memory_is_timed(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(9), 3)), volatile_db=HOST)
    keys = np.array([1, 2])
    for _ in range(100):
        server.lookup(keys, "m", 0)
        server.lookup([1, 2, 100], "m", 0)
        server.lookup_pooled(keys, [0, 1, 2], "m", 0)
    assert value(server, "hps_lookups_total") == 300
    times = value(server, "hps_host_lookup_seconds")
    assert isinstance(times, HistogramSnapshot)
    assert 300 / SAMPLED - 2 <= times.count <= 300 / SAMPLED + 2
    assert times.sum > 0


def snapshot(server: HPS, name: str, **labels: Any) -> HistogramSnapshot:
    found = value(server, name, **labels)
    assert isinstance(found, HistogramSnapshot)
    return found


def time_every_lookup(server: HPS) -> None:
    for table in served_model(server).tables:
        for times in (table.cached_lookups, *(cache.calls for cache in table.caches)):
            if times.on:
                times.due = repeat(True)


def test_a_sample_of_lookups_in_caches_is_timed(service: Service) -> None:
    server = service.open((range(100), DIM))
    keys = service.keys([1, 2])
    for _ in range(1021):  # of so many one after the other, 16 are timed
        rows = server.lookup(keys, "m", 0)
    service.on_host(rows)  # a device counts a lookup when it is done
    assert value(server, "hps_cache_lookups_total") == 1021
    name, device = ("hps_cache_lookup_seconds", "cpu") if service.device is None else ("hps_cache_call_seconds", "0")
    times = snapshot(server, name, device=device)
    assert times.count == 16 and times.sum > 16 * 1000, "no lookup takes less than a microsecond"
    other = ({"hps_cache_lookup_seconds", "hps_cache_call_seconds"} - {name}).pop()
    assert not families(server)[other].samples
    assert snapshot(server, "hps_host_lookup_seconds").count == 0


def test_every_way_to_a_cache_is_timed_once(service: Service) -> None:
    server = service.open((range(100), DIM), (range(50), DIM))
    time_every_lookup(server)
    name = "hps_cache_lookup_seconds" if service.device is None else "hps_cache_call_seconds"
    keys, ends = service.keys([1, 2]), service.keys([0, 1, 2])
    counted = []
    for look_up in (
        lambda: server.lookup(keys, "m", 0),
        lambda: server.lookup(keys, "m", 0, out=server.lookup(keys, "m", 1)),
        lambda: server.lookup_many([keys], "m"),
        lambda: server.lookup_pooled(keys, ends, "m", 0),
        lambda: server.direct.lookup_into(np.array([1, 2]), "m", 0, np.empty((2, DIM), np.float32)),
    ):
        before = families(server)[name]
        look_up()
        after = families(server)[name]
        counted.append(sum(now[1].count - then[1].count for now, then in zip(after.samples, before.samples, strict=True)))
    pooled, of_host = (0, 1) if service.device is None else (1, 0)  # bags of keys in host memory are pooled past the cache
    assert counted == [1, 2, 1, pooled, of_host]


def test_lookups_that_raise_are_not_timed(on_cpu: Service) -> None:
    server = on_cpu.open((range(100), DIM))
    time_every_lookup(server)
    with pytest.raises(ArrayError):
        server.lookup([1, 2], "m", 0, out=np.empty((3, DIM), np.float32))
    with pytest.raises(KeyDtypeError):
        server.lookup([0.5], "m", 0)
    assert snapshot(server, "hps_cache_lookup_seconds").count == 0


def test_lookups_in_caches_are_timed_with_their_fetches(service: Service) -> None:
    server, _ = service.open_cold()
    time_every_lookup(server)
    service.lookup(server, [1, 2, 3])
    name = "hps_cache_lookup_seconds" if service.device is None else "hps_cache_call_seconds"
    whole, fetch = snapshot(server, name), snapshot(server, "hps_tier_fetch_seconds")
    assert whole.count == fetch.count == 1
    assert whole.sum > fetch.sum > 0


def test_fetches_of_slower_tiers_are_counted_one_by_one(workshop: Workshop) -> None:
    model = workshop.model((range(9), 3))
    tiers = [{"type": "support.fakes:CountedDictTier", "initialize_after_startup": first} for first in (False, True)]
    server = workshop.open(model, tiers=tiers)
    server.lookup([1, 1, 2, 99], "m", 0)
    found = families(server)
    asked = {labels[2]: value for labels, value in found["hps_tier_fetched_keys_total"].samples}
    assert asked == {"CountedDictTier-0": 3, "CountedDictTier-1": 3}
    assert found["hps_tier_found_keys_total"].value(tier="CountedDictTier-0") == 0
    assert found["hps_tier_found_keys_total"].value(tier="CountedDictTier-1") == 2
    assert found["hps_hit_keys_total"].value(tier="slower_tiers") == 3  # keys as asked for
    times = found["hps_tier_fetch_seconds"].value(tier="CountedDictTier-1")
    assert isinstance(times, HistogramSnapshot)
    assert times.count == 1
    assert times.sum > 0


def test_failed_fetches_are_counted_and_timed(workshop: Workshop) -> None:
    server, tier = workshop.open_cold("support.fakes:FlakyDictTier")
    tier.fail_on = {"fetch"}
    server.lookup([1, 2], "m", 0)
    found = families(server)
    assert found["hps_tier_fetch_errors_total"].value() == 1
    assert found["hps_unanswered_keys_total"].value() == 2
    times = found["hps_tier_fetch_seconds"].value()
    assert isinstance(times, HistogramSnapshot)
    assert times.count == 1


def test_counts_of_tiers_go_with_their_model(workshop: Workshop) -> None:
    server, _ = workshop.open_cold()
    server.lookup([1], "m", 0)
    model = server.config.models[0]
    server.unload_model("m")
    assert families(server)["hps_tier_fetched_keys_total"].samples == []
    server.load_model(model)
    assert value(server, "hps_tier_fetched_keys_total") == 0


def test_refreshes_and_replacements_are_timed(on_cpu: Service) -> None:
    server = on_cpu.open((KEYS, DIM))
    before = value(server, "hps_refresh_age_seconds")
    assert isinstance(before, float)
    server.refresh("m")
    server.replace_model("m")
    with pytest.raises(ModelFileError):
        server.replace_model("m", [str(on_cpu.workshop.folder / "missing")])
    found = families(server)
    refreshes, replacements = found["hps_refresh_seconds"].value(), found["hps_replacement_seconds"].value(model="m")
    assert isinstance(refreshes, HistogramSnapshot)
    assert isinstance(replacements, HistogramSnapshot)
    assert (refreshes.count, found["hps_refresh_errors_total"].value()) == (1, 0)
    assert (replacements.count, found["hps_replacement_errors_total"].value()) == (2, 1)
    assert found["hps_model_version"].value() == 2
    assert 0 <= found["hps_model_version_age_seconds"].value() <= found["hps_refresh_age_seconds"].value() + 60


def test_a_failed_refresh_is_counted(on_cpu: Service) -> None:
    server, tier = on_cpu.open_cold("support.fakes:FlakyDictTier")
    on_cpu.lookup(server, [1])
    on_cpu.settle(server)
    age = value(server, "hps_refresh_age_seconds")
    tier.fail_on = {"fetch"}
    with pytest.raises(TierError):
        server.refresh("m")
    assert value(server, "hps_refresh_errors_total") == 1
    assert value(server, "hps_refresh_age_seconds") > age, "a refresh that failed is none"


def test_jobs_that_are_dropped_are_counted(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    server = workshop.open(workshop.model((range(9), 3)), volatile_db=HOST)
    monkeypatch.setattr(served_model(server).prefetches.jobs, "LIMIT", 0)
    assert not server.prefetch([1], "m", 0)
    assert value(server, "hps_background_dropped_jobs_total", pool="prefetches") == 1
    assert value(server, "hps_background_dropped_jobs_total", pool="lookups") == 0


def test_caches_are_counted_by_device(service: Service) -> None:
    server = service.open((range(100), DIM))
    service.lookup(server, [1, 2, 200])
    stats = server.stats()["m"]["sparse_embedding0"]
    device = "cpu" if service.device is None else str(service.device)
    found = families(server)
    assert found["hps_hit_keys_total"].value(tier="cache", device=device) == stats.cache_hits == 2
    assert found["hps_cache_keys_total"].value(device=device) == 3
    assert found["hps_cache_capacity_rows"].value(device=device) == stats.caches[0].capacity
    parts = {labels[3]: value for labels, value in found["hps_cache_memory_bytes"].samples}
    planned = {labels[3]: value for labels, value in found["hps_cache_memory_planned_bytes"].samples}
    assert sum(v for part, v in parts.items() if not part.startswith("pinned")) == stats.caches[0].bytes
    assert planned.keys() == parts.keys()
    assert planned["rows"] == parts["rows"] > 0


def test_bytes_planned_and_used(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(1000), 8)), volatile_db=HOST)
    used, planned = (
        {labels[2]: value for labels, value in families(server)[name].samples}
        for name in ("hps_host_memory_bytes", "hps_host_memory_planned_bytes")
    )
    assert used["rows"] == planned["rows"] == 1000 * 8 * 4
    assert sum(used.values()) == server.stats()["m"]["sparse_embedding0"].memory.bytes


@pytest.mark.parametrize("openmetrics", [False, True])
def test_the_text_of_a_server_is_what_prometheus_reads(workshop: Workshop, openmetrics: bool) -> None:
    name = "prometheus_client.openmetrics.parser" if openmetrics else "prometheus_client.parser"
    parser = pytest.importorskip(name, reason="prometheus-client is not installed")
    server = workshop.open(workshop.model((range(9), 3)), volatile_db=HOST)
    server.lookup([1, 2], "m", 0)
    read = {one.name: one for one in parser.text_string_to_metric_families(server.metrics_text(openmetrics=openmetrics))}
    assert [(sample.labels, sample.value) for sample in read["hps_keys"].samples] == [
        ({"model": "m", "table": "sparse_embedding0"}, 2.0)
    ]
    with_values = {family.metric.family for family in server.metrics.collect() if family.samples}
    assert set(read) == with_values


def test_a_closed_server_has_no_metrics(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(9), 3)), volatile_db=HOST)
    server.close()
    with pytest.raises(ClosedError):
        server.metrics_text()


def test_openmetrics_is_a_flag(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(9), 3)), volatile_db=HOST)
    with pytest.raises(ConfigError, match="openmetrics"):
        server.metrics_text(openmetrics="yes")  # type: ignore[arg-type]
