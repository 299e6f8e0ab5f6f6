"""What is reported to Triton's metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import played_triton
from support.factories import Workshop
from support.waiting import wait_until

from hps_numba.frontends.triton.metrics import FAMILIES, MetricsReporter


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> Any:
    return played_triton.play(monkeypatch).MetricFamily


def test_counts_and_gauges(workshop: Workshop, families: Any) -> None:
    server = workshop.open(workshop.model((range(9), 3), (range(9), 5), embedding_table_names=["user", "item"]))
    reporter = MetricsReporter(server, 0)
    server.lookup([1, 2, 99], "m", "user")
    reporter.report()
    server.lookup([3], "m", "user")
    reporter.report()
    user = {"model": "m", "table": "user"}
    assert set(families.made) == {family.name for family in FAMILIES} - {"hps_update_lag_seconds"}
    assert families.value("hps_lookups_total", **user) == 2
    assert families.value("hps_keys_total", **user) == 4
    assert families.value("hps_hit_keys_total", **user, tier="host_memory", device="") == 3
    assert families.value("hps_absent_keys_total", **user) == 1
    assert families.value("hps_host_rows", model="m", table="item") == 9
    assert families.value("hps_host_memory_bytes", **user, part="rows") == server.stats()["m"]["user"].memory.rows
    reporter.close()


def test_what_has_not_changed_is_not_told_again(workshop: Workshop, families: Any) -> None:
    server = workshop.open(workshop.model((range(9), 3)))
    reporter = MetricsReporter(server, 0)
    server.lookup(np.arange(3), "m", 0)
    for _ in range(3):
        reporter.report()
    assert [metric.calls for metric in families.made["hps_keys_total"]] == [1]
    assert [metric.calls for metric in families.made["hps_absent_keys_total"]] == [0]


def test_it_reports_by_itself(workshop: Workshop, families: Any) -> None:
    server = workshop.open(workshop.model((range(9), 3)))
    reporter = MetricsReporter(server, 1e-3)
    server.lookup(np.arange(3), "m", 0)
    wait_until(lambda: "hps_keys_total" in families.made and families.made["hps_keys_total"])
    wait_until(lambda: families.value("hps_keys_total", model="m") == 3)
    reporter.close()


def test_triton_without_metrics_is_one_warning(workshop: Workshop, families: Any, caplog: pytest.LogCaptureFixture) -> None:
    families.refusal = RuntimeError("metrics are off")
    reporter = MetricsReporter(workshop.open(workshop.model((range(9), 3))), 1e-3)
    wait_until(lambda: caplog.records)
    reporter.close()
    assert [record.getMessage() for record in caplog.records] == [
        "metrics: Triton does not take them, and gets no more: metrics are off"
    ]
