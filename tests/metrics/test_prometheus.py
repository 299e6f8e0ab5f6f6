"""The text of metrics, read back by the parsers of ``prometheus_client``, whose maintainers are those of the format."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hps_numba.errors import ConfigError
from hps_numba.metrics import Family, Metric, accepts_openmetrics, content_type, render
from hps_numba.metrics.histogram import Histogram, edges_between

AWKWARD = ['plain "quoted"', "back\\slash", "two\nlines", "\\n", "Ü‑table", "", "{}=,", "ends in \\"]
KEYS = Metric(name="hps_t_keys_total", kind="counter", help="Keys.", labels=("model", "table"), unit="keys")
AGE = Metric(name="hps_t_age_seconds", kind="gauge", help='Say "age"\nor \\ so.', unit="seconds")
TIMES = Metric(
    name="hps_t_seconds",
    kind="histogram",
    help="Times.",
    labels=("model",),
    unit="seconds",
    edges=edges_between(1 << 10, 1 << 20),
    scale=1e-9,
)


def parsed(text: str, *, openmetrics: bool) -> dict[str, Any]:
    """Families by name without ``_total``."""
    name = "prometheus_client.openmetrics.parser" if openmetrics else "prometheus_client.parser"
    parser = pytest.importorskip(name, reason="prometheus-client is not installed")
    families = list(parser.text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


def family(metric: Metric, *samples: tuple[Any, ...]) -> Family:
    made = Family(metric)
    for value, *labels in samples:
        made.add(value, *labels)
    return made


def some_times() -> Histogram:
    histogram = Histogram()
    for value in (3, 1024, 1025, 5000, 1 << 20, 1 << 40):
        histogram.record(value)
    return histogram


@pytest.mark.parametrize("openmetrics", [False, True])
def test_label_values_and_numbers_are_read_back(openmetrics: bool) -> None:
    keys = family(KEYS, *((7 + i, "m", text) for i, text in enumerate(AWKWARD)))
    read = parsed(render([keys, family(AGE, (0.1,))], openmetrics=openmetrics), openmetrics=openmetrics)
    assert [(sample.labels["table"], sample.value) for sample in read["hps_t_keys"].samples] == [
        (text, 7.0 + i) for i, text in enumerate(AWKWARD)
    ]
    assert {sample.name for sample in read["hps_t_keys"].samples} == {"hps_t_keys_total"}
    assert [sample.value for sample in read["hps_t_age_seconds"].samples] == [0.1]
    assert (read["hps_t_keys"].type, read["hps_t_age_seconds"].type) == ("counter", "gauge")
    assert read["hps_t_age_seconds"].documentation == AGE.help
    if openmetrics:
        assert (read["hps_t_keys"].unit, read["hps_t_age_seconds"].unit) == ("keys", "seconds")


@pytest.mark.parametrize("openmetrics", [False, True])
def test_histograms_are_read_back(openmetrics: bool) -> None:
    made = family(TIMES, (some_times().snapshot(), 'a "b"'), (Histogram().snapshot(), "none"))
    read = parsed(render([made], openmetrics=openmetrics), openmetrics=openmetrics)["hps_t_seconds"]
    assert read.type == "histogram"
    samples = [sample for sample in read.samples if sample.labels["model"] == 'a "b"']
    buckets = {float(s.labels["le"]): s.value for s in samples if s.name == "hps_t_seconds_bucket"}
    assert buckets[1024e-9] == 2
    assert buckets[1536e-9] == 3
    assert buckets[6144e-9] == 4
    assert buckets[1048576e-9] == 5
    assert buckets[math.inf] == 6
    assert list(buckets) == sorted(buckets)
    assert list(buckets.values()) == sorted(buckets.values())
    values = {s.name: s.value for s in samples if s.name != "hps_t_seconds_bucket"}
    assert values == {"hps_t_seconds_count": 6, "hps_t_seconds_sum": pytest.approx(some_times().snapshot().sum * 1e-9)}


@pytest.mark.parametrize(("value", "text"), [(3, "3"), (0.25, "0.25"), (1e-9, "1e-09"), (math.inf, "+Inf"), (math.nan, "NaN")])
def test_numbers_as_text(value: float, text: str) -> None:
    assert render([family(AGE, (value,))]).endswith(f"\nhps_t_age_seconds {text}\n")


def test_openmetrics_ends_with_eof_and_the_other_format_does_not() -> None:
    assert render([], openmetrics=True) == "# EOF\n"
    assert render([]) == ""
    assert render([family(AGE, (1,))], openmetrics=True).endswith("\n# EOF\n")
    assert "EOF" not in render([family(AGE, (1,))])


def test_a_metric_without_a_value_is_left_out() -> None:
    assert render([family(AGE, (None,))]) == ""


def test_text_can_be_encoded_whatever_names_contain() -> None:
    text = render([family(KEYS, (1, "m", "file-\udcff"))])
    assert "\\\\udcff" in text.encode().decode()


def test_content_types_name_format_and_version() -> None:
    assert content_type() == "text/plain; version=0.0.4; charset=utf-8"
    assert content_type(openmetrics=True) == "application/openmetrics-text; version=1.0.0; charset=utf-8"


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text; version=1.0.0", True),
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2", True),
        ("application/openmetrics-text;q=0.2, text/plain;q=0.9", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=no", False),
    ],
)
def test_the_format_is_chosen_by_the_accept_header(accept: str, expected: bool) -> None:
    assert accepts_openmetrics(accept) is expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "hps keys_total"}, "hps keys_total"),
        ({"name": "hps_t_keys"}, "_total"),
        ({"kind": "gauge"}, "_total"),
        ({"unit": "rows"}, "'rows'"),
        ({"labels": ("model", "model")}, "labels"),
        ({"labels": ("le",)}, "labels"),
        ({"labels": ("no-dash",)}, "labels"),
        ({"edges": (4,)}, "edges"),
        ({"name": "hps_t_keys", "kind": "histogram"}, "edges"),
        ({"name": "hps_t_keys", "kind": "histogram", "edges": (17,)}, "edges"),
    ],
)
def test_a_metric_that_prometheus_would_refuse_is_a_config_error(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"name": "hps_t_keys_total", "kind": "counter", "help": "Keys.", "unit": "keys"} | change
    with pytest.raises(ConfigError, match=message):
        Metric(**given)


def test_values_have_to_fit_their_metric() -> None:
    with pytest.raises(ConfigError, match="model"):
        family(KEYS, (1, "m"))
    with pytest.raises(ConfigError, match="counter"):
        family(KEYS, (Histogram().snapshot(), "m", "t"))
    with pytest.raises(ConfigError, match="histogram"):
        family(TIMES, (1.0, "m"))
