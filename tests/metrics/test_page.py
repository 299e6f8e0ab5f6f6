"""The page of the documentation lists every metric as servers and front ends emit it."""

from __future__ import annotations

import re

from support.processes import ROOT

from hps_numba.metrics import Metric
from hps_numba.metrics.requests import REQUEST_METRICS
from hps_numba.server.metrics import SERVER_METRICS

PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


def row_of(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.unit} | {metric.help} |"


def test_every_metric_is_on_the_page_and_nothing_else() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `hps_")]
    assert sorted(rows) == sorted(row_of(metric) for metric in (*SERVER_METRICS, *REQUEST_METRICS))


def test_queries_on_the_page_name_metrics_that_exist() -> None:
    known = {metric.name for metric in (*SERVER_METRICS, *REQUEST_METRICS)}
    known |= {f"{metric.name}_{part}" for metric in SERVER_METRICS if metric.edges for part in ("bucket", "count", "sum")}
    named = set(re.findall(r"\bhps_[a-z_]+[a-z]\b", PAGE)) - {"hps_numba", "hps_tier"}
    assert named <= known
