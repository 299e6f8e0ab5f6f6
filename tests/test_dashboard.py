"""The Grafana dashboard in ``examples/serving``: its queries ask for metrics and labels that there are."""

from __future__ import annotations

import http.server
import itertools
import json
import math
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.processes import ROOT
from support.servers import free_port
from support.updates import fresh_bus, source_of, update_of
from support.waiting import HANG_SECONDS, join_all, wait_until

import hps_numba
from hps_numba.metrics import Metric, RequestMetrics
from hps_numba.metrics.requests import REQUEST_METRICS
from hps_numba.server.metrics import SERVER_METRICS
from hps_numba.updates.in_process import Bus

FILE = ROOT / "examples" / "serving" / "grafana-dashboard.json"
METRICS = {metric.name: metric for metric in (*SERVER_METRICS, *REQUEST_METRICS)}
SELECTOR = re.compile(r"\b(hps_\w+)\{([^}]*)\}(\[\$__rate_interval\])?")
MATCHER = re.compile(r'(\w+)=~?"([^"]*)"')
BY = re.compile(r"\bby \(([^)]*)\)")
ADDED_BY_PROMETHEUS = {"instance"}


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads(FILE.read_text())


def charts(dashboard: Any) -> list[Any]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries(dashboard: Any) -> list[str]:
    return [target["expr"] for panel in charts(dashboard) for target in panel["targets"]]


def metric_of(name: str) -> Metric:
    """The metric of a series; histograms have three kinds of series."""
    family = re.sub(r"_(bucket|count|sum)$", "", name)
    metric = METRICS.get(name) or METRICS.get(family)
    assert metric is not None, f"{name}: there is no such metric"
    assert (metric.kind == "histogram") == (name != metric.name), name
    return metric


def test_every_query_asks_for_metrics_that_there_are_by_labels_that_they_have(dashboard: Any) -> None:
    for query in queries(dashboard):
        asked = SELECTOR.findall(query)
        assert len(asked) == len(re.findall(r"\bhps_\w+", query)) > 0, query
        available: set[str] = set()
        for name, matchers, duration in asked:
            metric = metric_of(name)
            labels = {*metric.labels, *ADDED_BY_PROMETHEUS}
            assert {label for label, _ in MATCHER.findall(matchers)} <= labels, query
            assert 'instance=~"$instance"' in matchers, query
            assert bool(duration) == (metric.kind != "gauge"), f"{query}: counters by their rate, gauges as they are"
            available |= {*labels, *(("le",) if name.endswith("_bucket") else ())}
        wanted = {label.strip() for labels in BY.findall(query) for label in labels.split(",")}
        assert wanted <= available, query


def test_legends_name_labels_that_the_query_leaves(dashboard: Any) -> None:
    for panel in charts(dashboard):
        for target in panel["targets"]:
            left = {label.strip() for labels in BY.findall(target["expr"]) for label in labels.split(",")}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= left, target


def test_it_shows_what_operators_ask_first(dashboard: Any) -> None:
    everything = "\n".join(queries(dashboard))
    for name in (
        "hps_hit_keys_total",
        "hps_host_lookup_seconds_bucket",
        "hps_request_seconds_bucket",
        "hps_unanswered_keys_total",
        "hps_evicted_rows_total",
        "hps_update_freshness_seconds",
        "hps_queued_requests",
        "hps_host_memory_bytes",
        "hps_cache_memory_bytes",
    ):
        assert name in everything
    assert any(
        "tier" in BY.findall(query)[0] for query in queries(dashboard) if "hps_hit_keys_total" in query and BY.findall(query)
    )


def test_panels_have_places_of_their_own(dashboard: Any) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 20
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    for panel in charts(dashboard):
        assert panel["title"] and panel["description"].endswith(".")
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_the_source_of_data_and_what_is_shown_are_chosen_by_variables(dashboard: Any) -> None:
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert list(variables) == ["datasource", "instance", "model", "table"]
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    sources = [panel["datasource"] for panel in charts(dashboard)]
    sources += [target["datasource"] for panel in charts(dashboard) for target in panel["targets"]]
    sources += [variables[name]["datasource"] for name in ("instance", "model", "table")]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    for name in ("instance", "model", "table"):
        found = re.fullmatch(r"label_values\((hps_\w+)(?:\{(.*)\})?, (\w+)\)", variables[name]["query"]["query"])
        assert found and found[3] == name and {name} <= {*metric_of(found[1]).labels, *ADDED_BY_PROMETHEUS}
        assert variables[name]["definition"] == variables[name]["query"]["query"]
        assert {label for label, _ in MATCHER.findall(found[2] or "")} <= {*metric_of(found[1]).labels, *ADDED_BY_PROMETHEUS}
    used = set(re.findall(r"\$(?!__)(\w+)", "\n".join(queries(dashboard))))
    assert used == {"instance", "model", "table"}


# -- as Prometheus reads it ---------------------------------------------------------------------


def resolved(query: str) -> str:
    """A query as Grafana sends it if everything is chosen."""
    return re.sub(r"\$(instance|model|table)\b", ".*", query).replace("$__rate_interval", "1m")


def needed(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"needs {program} (apt-get install prometheus)")
    return path


def test_prometheus_parses_every_query(dashboard: Any, tmp_path: Path) -> None:
    rules = [{"record": f"q:{number}", "expr": resolved(query)} for number, query in enumerate(queries(dashboard))]
    file = tmp_path / "rules.json"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    command = [needed("promtool"), "check", "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0 and f"{len(rules)} rules found" in done.stdout, done.stdout + done.stderr


@contextmanager
def metrics_served(server: hps_numba.HPS) -> Iterator[str]:
    """HOST:PORT where ``/metrics`` of a server is."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = server.metrics_text().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"127.0.0.1:{web.server_address[1]}"
        finally:
            web.shutdown()
            join_all(thread)


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[str]:
    """The URL of a Prometheus that scrapes a server every second."""
    scrape = {"job_name": "hps_numba", "scrape_interval": "1s", "scrape_timeout": "1s"}
    file = folder / "prometheus.json"
    file.write_text(json.dumps({"scrape_configs": [{**scrape, "static_configs": [{"targets": [target]}]}]}))
    address = f"127.0.0.1:{free_port()}"
    command = [
        needed("prometheus"),
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address={address}",
        "--log.level=error",
    ]
    with (folder / "prometheus.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait(HANG_SECONDS)


def answer_of(url: str, query: str) -> list[Any]:
    """What an instant query gives."""
    call = f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(call, timeout=HANG_SECONDS) as response:
        content = json.load(response)
    assert content["status"] == "success", query
    return list(content["data"]["result"])


def busy(server: hps_numba.HPS, bus: Bus, requests: RequestMetrics, ended: threading.Event) -> None:
    """Have all of it happen, again and again, until ``ended``."""
    random, table = np.random.default_rng(0), "hps_et.m.sparse_embedding0"
    for number in itertools.count():
        requests.queue(1)
        with requests.request("m") as request:
            requests.queue(-1)
            request.keys = 64
            server.lookup(random.zipf(1.3, 64).clip(max=3200) - 1, "m", 0)
            server.lookup(random.integers(0, 600, 16), "m", 1)
            server.lookup(random.integers(0, 100, 16), "of_host_memory", 0)
        requests.batch(2, "m")
        if number % 20 == 0:
            now = time.time_ns() // 1_000_000
            bus.put(update_of([1, 2], np.ones((2, 4), np.float32), table, event_time_ms=now))
            bus.put(update_of([3], None, table, event_time_ms=now))
            bus.put(update_of([1], np.ones((1, 4), np.float32), "hps_et.m.of_nobody"))
            server.refresh("m")
            server.replace_model("m")
        if ended.wait(0.005):
            return


def has_data(url: str, query: str) -> bool:
    """Whether Prometheus has a number for a query, of one series at least."""
    return any(math.isfinite(float(one["value"][1])) for one in answer_of(url, resolved(query)))


def test_a_real_prometheus_has_data_for_every_query(dashboard: Any, workshop: Workshop, tmp_path: Path) -> None:
    needed("prometheus")
    bus = fresh_bus()
    server = workshop.open(
        workshop.model((range(3000), 4), (range(500), 4), hit_rate_threshold=1.0),
        workshop.model((range(100), 4), name="of_host_memory", gpucache=False),
        cache_on_cpu=True,
        volatile_db={"type": "hash_map", "initial_cache_rate": 0.5, "overflow_margin": 2000, "num_partitions": 1},
        persistent_db={"type": "support.fakes:CountedDictTier"},
        update_source=source_of(bus, name="news"),
    )
    requests, ended = RequestMetrics("open_inference", "http"), threading.Event()
    requests.attach(server)
    with metrics_served(server) as target, prometheus(target, tmp_path) as url:
        worker = threading.Thread(target=busy, args=(server, bus, requests, ended))
        worker.start()
        try:
            wait_until(lambda: _is_up(url))
            for query in queries(dashboard):  # rates need two scrapes of a series
                wait_until(lambda: has_data(url, query) or not worker.is_alive())  # noqa: B023 - it is called here
                assert worker.is_alive(), query
            (by_tier,) = (query for query in queries(dashboard) if query.startswith("sum by (tier) (rate(hps_hit_keys_total"))
            found = answer_of(url, resolved(by_tier))
        finally:
            ended.set()
            join_all(worker)
    shares = {one["metric"]["tier"]: float(one["value"][1]) for one in found}
    assert set(shares) >= {"cache", "host_memory", "slower_tiers"} and shares["cache"] > 0 and sum(shares.values()) <= 1.01


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=HANG_SECONDS) as response:
            return bool(response.status == 200)
    except OSError:
        return False
