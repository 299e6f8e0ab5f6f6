"""What a front end counts of its requests."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import pytest
from support.factories import Workshop
from support.waiting import join_all

from hps_numba.metrics import Family, HistogramSnapshot, Registry, RequestMetrics
from hps_numba.metrics.requests import REQUEST_METRICS


def values(metrics: RequestMetrics) -> dict[str, Family]:
    return {family.metric.name: family for family in metrics.collect()}


def statuses(metrics: RequestMetrics) -> dict[tuple[str, ...], float | HistogramSnapshot]:
    return {labels[2:]: value for labels, value in values(metrics)["hps_requests_total"].samples}


def test_requests_are_counted_by_model_and_status() -> None:
    metrics = RequestMetrics("open_inference", "http")
    for status in (200, 200, 404):
        with metrics.request("m") as request:
            request.status = status
            request.keys = 32
    found = values(metrics)
    assert statuses(metrics) == {("m", "200"): 2, ("m", "404"): 1}
    keys, seconds = found["hps_request_keys"].value(model="m"), found["hps_request_seconds"].value(model="m")
    assert isinstance(keys, HistogramSnapshot)
    assert isinstance(seconds, HistogramSnapshot)
    assert (keys.count, keys.sum, seconds.count) == (3, 96, 3)
    assert seconds.sum > 0
    assert {labels[:2] for family in found.values() for labels, _ in family.samples} == {("open_inference", "http")}


def test_every_metric_is_collected() -> None:
    assert tuple(family.metric for family in RequestMetrics("f", "p").collect()) == REQUEST_METRICS


def test_in_flight_and_queue_are_numbers_of_now() -> None:
    metrics = RequestMetrics("f", "p")
    with metrics.request(), metrics.request():
        metrics.queue()
        metrics.queue(2)
        found = values(metrics)
        assert found["hps_requests_in_flight"].value() == metrics.in_flight == 2
        assert found["hps_queued_requests"].value() == metrics.queue_depth == 3
        metrics.queue(-3)
    found = values(metrics)
    assert found["hps_requests_in_flight"].value() == found["hps_queued_requests"].value() == 0


def fail(error: BaseException, status: int | None) -> dict[Any, Any]:
    metrics = RequestMetrics("f", "p")
    with pytest.raises(type(error)), metrics.request("m") as request:
        request.status = status
        raise error
    assert metrics.in_flight == 0
    return statuses(metrics)


def test_a_request_that_raises_is_counted() -> None:
    assert fail(ValueError("no"), None) == {("m", "500"): 1}
    assert fail(ValueError("no"), 503) == {("m", "503"): 1}
    assert fail(asyncio.CancelledError(), None) == {("m", "499"): 1}
    assert fail(KeyboardInterrupt(), None) == {("m", "499"): 1}


def test_a_request_without_a_block_is_finished_once() -> None:
    metrics = RequestMetrics("f", "p")
    request = metrics.request()
    request.model = "late"
    request.finish(429)
    request.finish(200)
    assert statuses(metrics) == {("late", "429"): 1}
    assert metrics.in_flight == 0


def test_batches_are_counted_by_size() -> None:
    metrics = RequestMetrics("f", "p")
    metrics.batch(1, "m")
    metrics.batch(5, "m")
    batches = values(metrics)["hps_batch_requests"].value(model="m")
    assert isinstance(batches, HistogramSnapshot)
    assert (batches.count, batches.sum) == (2, 6)


def test_any_number_of_model_names_takes_bounded_memory() -> None:
    metrics = RequestMetrics("f", "p")
    for number in range(1000):
        metrics.request(f"model-{number}").finish()
    found = statuses(metrics)
    assert len(found) == 257
    assert found["(other)", "200"] == 1000 - 256
    assert len(values(metrics)["hps_request_seconds"].samples) == 257


def test_no_request_of_any_thread_is_lost() -> None:
    metrics = RequestMetrics("f", "p")
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(500):
            with metrics.request("m") as request:
                metrics.queue()
                request.keys = 1
                metrics.queue(-1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert statuses(metrics) == {("m", "200"): 2000}
    assert (metrics.in_flight, metrics.queue_depth) == (0, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_a_forked_child_has_no_request_in_flight() -> None:
    metrics = RequestMetrics("f", "p")
    with metrics.request("m"):
        child = os.fork()
        if child == 0:
            os._exit(metrics.in_flight)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert metrics.in_flight == 1


def test_attached_metrics_are_in_the_text_of_a_server(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(9), 3)), volatile_db={"type": "hash_map"})
    http, grpc = RequestMetrics("open_inference", "http"), RequestMetrics("open_inference", "grpc")
    remove = http.attach(server)
    grpc.attach(server)
    http.request("m").finish(200)
    grpc.request("m").finish(503)
    text = server.metrics_text()
    assert 'hps_requests_total{frontend="open_inference",protocol="http",model="m",status="200"} 1' in text
    assert 'hps_requests_total{frontend="open_inference",protocol="grpc",model="m",status="503"} 1' in text
    assert text.count("# TYPE hps_requests_total counter") == 1
    remove()
    assert 'protocol="http"' not in server.metrics_text()


def test_anything_with_a_registry_can_show_them() -> None:
    class Shows:
        metrics = Registry()

    RequestMetrics("f", "p").attach(Shows())
    assert [family.metric for family in Shows.metrics.collect()] == [*REQUEST_METRICS]
