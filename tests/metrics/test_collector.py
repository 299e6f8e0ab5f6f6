"""The collector for registries of ``prometheus-client``: what it shows is the text of the server."""

from __future__ import annotations

import builtins
import gc
import weakref
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop

from hps_numba import HPS
from hps_numba.errors import ConfigError
from hps_numba.metrics import PrometheusCollector, RequestMetrics

HOST = {"type": "hash_map"}


@pytest.fixture
def client() -> Any:
    return pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")


def opened(workshop: Workshop) -> HPS:
    server = workshop.open(workshop.model((range(9), 3)), volatile_db=HOST)
    for _ in range(40):
        server.lookup(np.array([1, 2]), "m", 0)
    return server


def values(text: str) -> dict[str, str]:
    """Lines of samples, without those that change by themselves."""
    lines = [line for line in text.splitlines() if not line.startswith("#") and "age_seconds" not in line]
    return dict(line.rsplit(" ", 1) for line in lines)


def test_a_registry_shows_what_the_text_of_the_server_says(client: Any, workshop: Workshop) -> None:
    server = opened(workshop)
    requests = RequestMetrics("f", "http")
    requests.attach(server)
    requests.request("m").finish(200)
    registry = client.CollectorRegistry()
    registry.register(PrometheusCollector(server))
    mine, theirs = values(server.metrics_text()), values(client.generate_latest(registry).decode())
    assert {sorted_labels(name): float(value) for name, value in mine.items()} == {
        sorted_labels(name): float(value) for name, value in theirs.items()
    }


def sorted_labels(sample: str) -> str:
    name, _, labels = sample.partition("{")
    return name + ",".join(sorted(labels.rstrip("}").split(",")))


def test_a_registry_refuses_a_second_server(client: Any, workshop: Workshop) -> None:
    server = opened(workshop)
    registry = client.CollectorRegistry()
    first = PrometheusCollector(server)
    registry.register(first)
    with pytest.raises(ValueError, match="hps_"):
        registry.register(PrometheusCollector(server))
    registry.unregister(first)
    registry.register(PrometheusCollector(server))


def test_a_closed_server_has_nothing_to_collect(client: Any, workshop: Workshop) -> None:
    server = opened(workshop)
    registry = client.CollectorRegistry()
    registry.register(PrometheusCollector(server))
    server.close()
    assert client.generate_latest(registry) == b""


def test_a_collector_does_not_keep_its_server(client: Any, workshop: Workshop) -> None:
    server = opened(workshop)
    collector, gone = PrometheusCollector(server), weakref.ref(server)
    server.close()
    workshop.servers.clear()
    del server
    gc.collect()
    assert gone() is None
    assert list(collector.collect()) == []


def test_what_has_no_metrics_is_refused(client: Any) -> None:
    with pytest.raises(ConfigError, match=r"PrometheusCollector: expected a server.*got str"):
        PrometheusCollector("server")  # type: ignore[arg-type]


def test_without_the_client_library_the_error_says_what_to_install(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    server = opened(workshop)
    found = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == "prometheus_client":
            raise ImportError(name)
        return found(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"pip install hps-numba\[metrics\]"):
        PrometheusCollector(server)
