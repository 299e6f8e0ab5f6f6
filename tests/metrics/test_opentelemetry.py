"""Observable instruments: what a reader of the SDK gets is what the server counted."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop

from hps_numba import HPS
from hps_numba.errors import ConfigError
from hps_numba.metrics import HistogramSnapshot, observe_with_opentelemetry, opentelemetry
from hps_numba.server.metrics import SERVER_METRICS


def opened(workshop: Workshop) -> HPS:
    server = workshop.open(workshop.model((range(9), 3)), volatile_db={"type": "hash_map"})
    for _ in range(60):
        server.lookup(np.array([1, 2, 100]), "m", 0)
    return server


class Observer:
    """A meter of the SDK whose instruments are read when the test wants to."""

    def __init__(self) -> None:
        api = pytest.importorskip("opentelemetry.sdk.metrics", reason="opentelemetry-sdk is not installed")
        export = pytest.importorskip("opentelemetry.sdk.metrics.export")
        self._reader = export.InMemoryMetricReader()
        self.provider = api.MeterProvider([self._reader])
        self.meter = self.provider.get_meter("test")

    def read(self) -> dict[str, Any]:
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        return {metric.name: metric for of in data.resource_metrics for scope in of.scope_metrics for metric in scope.metrics}


@pytest.fixture
def observer() -> Any:
    made = Observer()
    yield made
    made.provider.shutdown()


def points(metric: Any) -> list[tuple[dict[str, str], float]]:
    return [(dict(point.attributes), point.value) for point in metric.data.data_points]


def test_counters_gauges_and_histograms_are_observed(workshop: Workshop, observer: Observer) -> None:
    server = opened(workshop)
    observe_with_opentelemetry(server, observer.meter)
    read = observer.read()
    table = {"model": "m", "table": "sparse_embedding0"}
    assert points(read["hps_keys"]) == [(table, 180)]
    assert points(read["hps_absent_keys"]) == [(table, 60)]
    assert points(read["hps_host_rows"]) == [(table, 9)]
    assert read["hps_keys"].data.is_monotonic
    assert (read["hps_keys"].unit, read["hps_model_version_age_seconds"].unit) == ("{keys}", "s")
    assert read["hps_host_memory_bytes"].unit == "By"
    (times,) = [family for family in server.metrics.collect() if family.metric.name == "hps_host_lookup_seconds"]
    snapshot = times.value()
    assert isinstance(snapshot, HistogramSnapshot)
    assert points(read["hps_host_lookup_seconds_count"]) == [(table, snapshot.count)]
    assert points(read["hps_host_lookup_seconds_sum"]) == [(table, pytest.approx(snapshot.sum * 1e-9))]
    quantiles = {labels["quantile"]: value for labels, value in points(read["hps_host_lookup_seconds_quantile"])}
    assert quantiles == {str(share): pytest.approx(snapshot.quantile(share) * 1e-9) for share in (0.5, 0.9, 0.99)}


def test_every_metric_has_an_instrument(workshop: Workshop, observer: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for kind in ("counter", "gauge"):
        name = f"create_observable_{kind}"
        monkeypatch.setattr(observer.meter, name, lambda name, callbacks, **told: made.append(name))
    observe_with_opentelemetry(opened(workshop), observer.meter)
    histograms = [metric.name for metric in SERVER_METRICS if metric.kind == "histogram"]
    rest = [metric.family for metric in SERVER_METRICS if metric.kind != "histogram"]
    assert sorted(made) == sorted(rest + [f"{name}_{part}" for name in histograms for part in ("count", "sum", "quantile")])


def test_quantiles_are_of_what_came_since_the_last_observation(
    workshop: Workshop, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opentelemetry, "_FRESH_SECONDS", 0.0)
    server = opened(workshop)
    observe_with_opentelemetry(server, observer.meter)
    assert "hps_host_lookup_seconds_quantile" in observer.read()
    assert "hps_host_lookup_seconds_quantile" not in observer.read(), "nothing was looked up since"


def test_an_observation_can_be_ended(workshop: Workshop, observer: Observer) -> None:
    end = observe_with_opentelemetry(opened(workshop), observer.meter)
    assert "hps_keys" in observer.read()
    end()
    assert "hps_keys" not in observer.read()


def test_a_server_is_not_kept_and_a_closed_one_not_observed(
    workshop: Workshop, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opentelemetry, "_FRESH_SECONDS", 0.0)
    server = opened(workshop)
    gone = weakref.ref(server)
    observe_with_opentelemetry(server, observer.meter)
    server.close()
    assert "hps_keys" not in observer.read()
    workshop.servers.clear()
    del server
    gc.collect()
    assert gone() is None
    assert observer.read() == {}


def test_the_global_meter_is_the_default(workshop: Workshop) -> None:
    pytest.importorskip("opentelemetry.metrics", reason="opentelemetry-api is not installed")
    end = observe_with_opentelemetry(opened(workshop))
    end()


def test_without_the_api_the_error_says_what_to_install(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    server = opened(workshop)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"pip install hps-numba\[metrics\]"):
        observe_with_opentelemetry(server)


def test_what_has_no_metrics_is_refused() -> None:
    pytest.importorskip("opentelemetry.metrics", reason="opentelemetry-api is not installed")
    with pytest.raises(ConfigError, match="expected a server"):
        observe_with_opentelemetry(object())  # type: ignore[arg-type]
