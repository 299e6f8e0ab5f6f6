"""``hps-numba top``: metrics are read as Prometheus reads them, and shown as they changed."""

from __future__ import annotations

import http.server
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.servers import free_port
from support.waiting import join_all
from typer.testing import CliRunner, Result

import hps_numba
from hps_numba.cli import build
from hps_numba.cli._top_samples import Change, Samples, read_samples
from hps_numba.cli._top_view import USED_METRICS, look, view
from hps_numba.errors import HpsError
from hps_numba.metrics import Family, Metric, RequestMetrics, render
from hps_numba.metrics.histogram import Histogram, edges_between
from hps_numba.metrics.requests import REQUEST_METRICS
from hps_numba.server.metrics import SERVER_METRICS

TABLE = {"model": "m", "table": "t"}


def run(*words: object, **environment: str) -> Result:
    return CliRunner().invoke(build(), list(map(str, words)), env=environment)


def refused(*words: object, code: int = 1, **environment: str) -> str:
    result = run(*words, **environment)
    assert result.exit_code == code and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    return line


def samples(text: str) -> Samples:
    return read_samples(text, "here")


def change(before: str, after: str, seconds: float = 2.0) -> Change:
    return Change(samples(before), samples(after), seconds)


class Answer:
    """What a small HTTP server answers: status, headers and a body, or what gives the body."""

    def __init__(self, body: str | bytes | Callable[[], str] = "", status: int = 200, **headers: str) -> None:
        self.body, self.status, self.headers = body, status, headers

    def content(self) -> bytes:
        body = self.body() if callable(self.body) else self.body
        return body if isinstance(body, bytes) else body.encode()


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[Any]]]:
    """A URL that gives an answer, and the requests that came."""
    requests: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append((self.path, dict(self.headers)))
            content = answer.content()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", requests
        finally:
            server.shutdown()
            join_all(thread)


# -- the text ---------------------------------------------------------------------


def test_labels_and_values_are_read_as_prometheus_reads_them() -> None:
    found = samples(
        '# HELP hps_a_total Some { text } = "x"\n# TYPE hps_a_total counter\n'
        'hps_a_total{model="a \\"b\\" \\\\ {c},d=\\"e\\"\\n}",table=""} 1.5e3\n'
        'hps_a_total{ model = "x" , } +Inf 1712345678901\n'
        "hps_b NaN\n\n"
    )
    first, second = found.by_name["hps_a_total"]
    assert first.labels == {"model": 'a "b" \\ {c},d="e"\n}', "table": ""} and first.value == 1500
    assert second.labels == {"model": "x"} and second.value == math.inf
    (third,) = found.of("hps_b")
    assert third.labels == {} and math.isnan(third.value)


@pytest.mark.parametrize("openmetrics", [False, True])
def test_what_the_library_writes_is_read_back(openmetrics: bool) -> None:
    names = ["plain", 'with "quotes"', "back\\slash", "new\nline", "}", "", "dé"]
    family = Family(Metric(name="hps_some_total", kind="counter", help="some \\ help\nmore", labels=("model", "table")))
    for number, name in enumerate(names):
        family.add(number, name, "t")
    found = samples(render([family], openmetrics=openmetrics))
    assert [(one.labels["model"], one.value) for one in found.of("hps_some_total", table="t")] == [
        (name, float(number)) for number, name in enumerate(names)
    ]


@pytest.mark.parametrize(
    "line",
    ["<html>", "hps_a", "hps_a{", 'hps_a{b="c" 1', 'hps_a{b="c"}', "hps_a one", 'hps_a{b=c} 1', "1 2", "hps_a{b=\"c\\\"} 1"],
)  # fmt: skip
def test_other_text_is_an_error_that_names_the_line(line: str) -> None:
    with pytest.raises(HpsError, match="here: line 2: expected a metric in the text format of Prometheus, got") as failed:
        samples(f"hps_a 1\n{line}\n")
    assert line[:20] in str(failed.value).replace("\\\\", "\\") or "'" in line


def test_metrics_of_other_programs_are_an_error() -> None:
    for text in ("", "# nothing\n", "go_goroutines 5\n"):
        with pytest.raises(HpsError, match="here: expected metrics of hps_numba, whose names begin with hps_, got none"):
            samples(text)


# -- what changed ---------------------------------------------------------------------


def test_rates_are_of_the_time_between_two_looks() -> None:
    one = change(
        'hps_a_total{model="m"} 10\nhps_a_total{model="n"} 3\n', 'hps_a_total{model="m"} 30\nhps_a_total{model="n"} 4\n'
    )
    assert one.rate("hps_a_total", model="m") == 10 and one.rate("hps_a_total") == 10.5
    assert one.rate("hps_a_total", model="other") is None and one.rate("hps_b_total") is None


def test_a_server_that_was_started_again_counts_from_0() -> None:
    one = change('hps_a_total{model="m"} 1000\n', 'hps_a_total{model="m"} 30\nhps_a_total{model="new"} 8\n')
    assert one.total("hps_a_total", model="m") == 30
    assert one.total("hps_a_total", model="new") == 8


def test_values_that_are_no_numbers_do_not_count() -> None:
    one = change("hps_a_total 1\n", 'hps_a_total NaN\nhps_g{t="a"} NaN\nhps_g{t="b"} 4\nhps_g{t="c"} 2\n')
    assert one.total("hps_a_total") is None
    assert one.sum("hps_g") == 6 and one.max("hps_g") == 4 and one.sum("hps_none") is one.max("hps_none") is None


METRIC = Metric(
    name="hps_some_seconds",
    kind="histogram",
    help="Some.",
    labels=("model",),
    unit="seconds",
    edges=edges_between(1 << 10, 1 << 30),
    scale=1e-9,
)


def histogram_text(*some: tuple[str, Histogram]) -> str:
    family = Family(METRIC)
    for model, histogram in some:
        family.add(histogram.snapshot(), model)
    return render([family])


@pytest.mark.parametrize("seed", range(5))
def test_quantiles_are_those_of_what_was_counted_between(seed: int) -> None:
    random = np.random.default_rng(seed)
    counted = Histogram(), Histogram()
    for histogram in counted:
        for value in random.integers(1 << 20, 1 << 28, 50).tolist():
            histogram.record(value)
    before = histogram_text(("m", counted[0]), ("n", counted[1]))
    values = random.lognormal(14, 1.5, 400).astype(np.int64)
    for value in values.tolist():
        counted[value % 2].record(value)
    one = change(before, histogram_text(("m", counted[0]), ("n", counted[1])))
    for some, labels in ((values, {}), (values[values % 2 == 0], {"model": "m"})):
        for share in (0.01, 0.5, 0.9, 0.99, 1.0):
            exact = np.quantile(some, share, method="inverted_cdf") * 1e-9
            found = one.quantile(share, "hps_some_seconds", **labels)
            assert found is not None and 0.66 * exact <= found <= 1.5 * exact  # an octave has two published buckets


def test_quantiles_without_values_and_beyond_the_last_edge() -> None:
    quiet = histogram_text(("m", Histogram()))
    assert change(quiet, quiet).quantile(0.5, "hps_some_seconds") is None
    assert change(quiet, quiet).quantile(0.5, "hps_other_seconds") is None
    slow = Histogram()
    slow.record(1 << 40)
    assert change(quiet, histogram_text(("m", slow))).quantile(0.5, "hps_some_seconds") == (1 << 30) * 1e-9


# -- what is shown ---------------------------------------------------------------------


@pytest.fixture
def server(workshop: Workshop) -> hps_numba.HPS:
    entries = [workshop.model((range(300), 3), (range(20), 5)), workshop.model((range(9), 2), name="n")]
    return workshop.open(*entries, cache_on_cpu=True, update_source={"type": "in_process", "name": "news"})


def test_numbers_of_a_look_are_those_of_the_server(server: hps_numba.HPS) -> None:
    requests = RequestMetrics("open_inference", "http")
    requests.attach(server)
    before = server.metrics_text()
    for _ in range(4):
        server.lookup(range(250, 350), "m", 0)
    with requests.request("m") as request:
        request.keys, request.status = 400, 200
    for status in (429, 503, 500):
        requests.request("m").finish(status)
    requests.queue(3)
    after = server.metrics_text()
    found = json.loads(json.dumps(look(change(before, after))))
    assert found["seconds"] == 2
    rows = {(row["model"], row["table"]): row for row in found["lookups"]}
    assert set(rows) == {("m", "sparse_embedding0"), ("m", "sparse_embedding1"), ("n", "sparse_embedding0")}
    busy, quiet = rows["m", "sparse_embedding0"], rows["n", "sparse_embedding0"]
    assert busy["lookups_per_second"] == 2 and busy["keys_per_second"] == 200 and busy["default_rate"] == 0.5
    hits = busy["cache_hit_rate"] + busy["host_memory_hit_rate"] + busy["slower_tiers_hit_rate"]
    assert hits == pytest.approx(0.5) and busy["unanswered_rate"] == 0
    assert quiet["lookups_per_second"] == 0 and quiet["cache_hit_rate"] is None
    stats = server.stats()["m"]["sparse_embedding0"]
    memory = next(row for row in found["rows"] if (row["model"], row["table"]) == ("m", "sparse_embedding0"))
    assert memory["host_rows"] == 300 and memory["cache_capacity_rows"] == stats.caches[0].capacity
    assert memory["inserted_rows_per_second"] == stats.caches[0].insertions / 2
    assert memory["cache_bytes"] > 0 and memory["host_bytes"] > 0
    assert [(row["model"], row["version"]) for row in found["models"]] == [("m", 1), ("n", 1)]
    (source,) = found["sources"]
    assert source["source"] == "news" and source["running"] == 1 and source["backlog_messages"] == 0
    (answered,) = found["requests"]
    assert (answered["requests_per_second"], answered["refused_per_second"], answered["failed_per_second"]) == (2, 0.5, 1)
    assert answered["p99_seconds"] > 0
    assert found["frontends"] == [{"frontend": "open_inference", "protocol": "http", "in_flight": 0, "queued": 3}]
    assert {row["model"] for row in look(change(before, after), "n")["lookups"]} == {"n"}


def test_latency_is_that_of_whole_lookups_and_of_calls_on_gpus() -> None:
    def text(*counts: tuple[str, str]) -> str:
        lines = [f'hps_lookups_total{{model="m",table="{table}"}} 1' for _, table in counts]
        for name, table in counts:
            labels = f'model="m",table="{table}"'
            lines += [f'{name}_bucket{{{labels},le="{edge}"}} {number}' for edge, number in (("0.001", 0), ("+Inf", 0))]
        return "\n".join(lines) + "\n"

    kinds = ("hps_host_lookup_seconds", "a"), ("hps_cache_lookup_seconds", "b"), ("hps_cache_call_seconds", "c")
    before = text(*kinds)
    after = before.replace('le="0.001"} 0', 'le="0.001"} 4').replace('le="+Inf"} 0', 'le="+Inf"} 4')
    found = {row["table"]: row for row in look(change(before, after))["lookups"]}
    for table in "ab":
        assert found[table]["p50_seconds"] == 0.0005 and found[table]["call_p99_seconds"] is None
    assert found["c"]["p50_seconds"] is found["c"]["p99_seconds"] is None
    assert found["c"]["call_p50_seconds"] == 0.0005 and found["c"]["call_p99_seconds"] == pytest.approx(0.00099)
    assert "call p99" in shown(look(change(before, after))) and "p50" in shown(look(change(before, after)))


def test_metrics_that_an_older_server_lacks_are_dashes() -> None:
    text = 'hps_lookups_total{model="m",table="t"} 5\n'
    found = look(change(text, text))
    (row,) = found["lookups"]
    assert row["lookups_per_second"] == 0 and row["keys_per_second"] is row["p50_seconds"] is None
    assert not any(found[name] for name in found if name not in ("seconds", "lookups"))
    assert look(change("hps_build_info 1", "hps_build_info 1"))["lookups"] == []


def shown(found: Any) -> str:
    from hps_numba.cli._output import console

    out = console()
    with out.capture() as captured:
        out.print(view(found))
    return captured.get()


def test_tables_are_in_units_that_people_read() -> None:
    before = "hps_build_info 1\n"
    after = (
        'hps_lookups_total{model="m",table="t"} 25400\nhps_keys_total{model="m",table="t"} 2540000\n'
        'hps_hit_keys_total{model="m",table="t",tier="cache",device="0"} 1270000\n'
        'hps_hit_keys_total{model="m",table="t",tier="cache",device="1"} 635000\n'
        'hps_host_rows{model="m",table="t"} 1234567\nhps_host_memory_bytes{model="m",table="t",part="rows"} 1048576\n'
        'hps_tier_fetched_keys_total{model="m",table="t",tier="redis_cluster"} 200\n'
        'hps_tier_found_keys_total{model="m",table="t",tier="redis_cluster"} 50\n'
        'hps_update_rows_total{model="m",table="t",source="news"} 20\n'
        'hps_update_freshness_seconds{model="m",table="t",source="news"} 0.02\n'
        'hps_update_source_running{source="news",type="kafka"} 0\n'
    )
    lines = [line.split() for line in shown(look(change(before, after))).splitlines()]
    assert ["m/t", "12.7", "k", "1.27", "M", "75.0", "%", *"-------"] in lines
    assert ["m/t", "-", "-", "1,234,567", "1.0", "MiB", "-", "-", "-"] in lines
    assert ["m/t/redis_cluster", "100", "25.0", "%", "-", "-", "-"] in lines
    assert ["news/m/t", "10", "-", "-", "20", "ms", "-", "-"] in lines
    assert ["news", "no", "-", "-", "-", "-", "-"] in lines
    assert max(map(len, shown(look(change(before, after))).splitlines())) <= 100


def test_a_server_without_models_has_nothing_to_show() -> None:
    assert "no model, table, source or front end has metrics" in shown(look(change("hps_build_info 1", "hps_build_info 1")))


def test_every_metric_that_is_shown_is_a_documented_one() -> None:
    assert {metric.name for metric in (*SERVER_METRICS, *REQUEST_METRICS)} >= USED_METRICS
    assert len(USED_METRICS) > 30


# -- the command ---------------------------------------------------------------------


@pytest.fixture
def end_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ctrl-C comes after so many looks, which follow each other without a pause."""

    def end_after(looks: int) -> None:
        left = iter(range(looks))

        def sleep(seconds: float) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        monkeypatch.setattr("hps_numba.cli._live.time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))

    return end_after


def test_a_url_is_read_and_looks_follow_each_other(
    server: hps_numba.HPS, monkeypatch: pytest.MonkeyPatch, end_after: Callable[[int], None]
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")  # nobody is there: it must not be asked
    with serving(Answer(server.metrics_text)) as (url, requests):
        once = run("top", url, "--once", "--interval", 0.1, "--json")
        assert once.exit_code == 0, once.output
        assert {row["model"] for row in json.loads(once.stdout)["lookups"]} == {"m", "n"}
        assert [path for path, _ in requests] == ["/metrics"] * 2
        assert "Authorization" not in requests[0][1] and requests[0][1]["Accept"].startswith("text/plain")
        end_after(3)
        lines = run("top", f"{url}/", "--json", "--model", "n").stdout.splitlines()
        assert len(lines) == 3 and all({row["model"] for row in json.loads(line)["lookups"]} == {"n"} for line in lines)
        end_after(2)
        result = run("top", f"{url}/elsewhere?x=1")
        assert result.exit_code == 0 and result.stdout.count("lookups/s") == 2
        assert requests[-1][0] == "/elsewhere?x=1"


def test_it_ends_after_the_seconds_that_are_given(server: hps_numba.HPS) -> None:
    with serving(Answer(server.metrics_text)) as (url, requests):
        result = run("top", url, "--seconds", 0.3, "--interval", 0.2)
        assert result.exit_code == 0 and result.stdout.count("lookups/s") == len(requests) - 1 > 0


def test_the_token_of_the_environment_is_sent(server: hps_numba.HPS) -> None:
    with serving(Answer(server.metrics_text)) as (url, requests):
        assert run("top", url, "--once", "--interval", 0.1, HPS_NUMBA_TOKEN="a secret token").exit_code == 0
        assert requests[0][1]["Authorization"] == "Bearer a secret token"


def test_a_config_is_served_and_shown(workshop: Workshop) -> None:
    config = {"supportlonglong": True, "models": [workshop.model((range(9), 3))], "update_source": {"type": "in_process"}}
    path = workshop.folder / "ps.json"
    path.write_text(json.dumps(config))
    result = run("top", path, "--once", "--interval", 0.1)
    assert result.exit_code == 0, result.output
    assert "m/sparse_embedding0" in result.stdout and "in_process" in result.stdout


def test_what_cannot_be_shown_is_one_line() -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    assert f"error: {nobody}/metrics: cannot be read: Connection refused" in refused("top", nobody)
    for target in ("ftp://x", "http://", "http://[::1", "http://h:x", "http://h:99999", "http://h\u00e4/", "http://a b/"):
        assert "expected a config, or http://HOST:PORT, got" in refused("top", target, code=2)
    line = refused("top", "http://user:secret@127.0.0.1/", code=2)
    assert "got 'one with a user name'" in line and "secret" not in line
    assert "no_such.json: No such file or directory" in refused("top", "no_such.json")
    for answer, text in (
        (Answer("{}", 401), "expected metrics, got HTTP status 401 (HPS_NUMBA_TOKEN in the environment"),
        (Answer("", 404), "expected metrics, got HTTP status 404"),
        (Answer("", 302, Location="http://127.0.0.1:1/metrics"), "expected metrics, got HTTP status 302"),
        (Answer("<html>"), "line 1: expected a metric in the text format of Prometheus, got '<html>'"),
        (Answer(b"\xff\xfe"), "line 1: expected a metric"),
        (Answer("up 1\n"), "expected metrics of hps_numba"),
    ):
        with serving(answer) as (url, _):
            assert f"{url}/metrics: " in (line := refused("top", url)) and text in line


def test_a_model_that_the_server_lacks_is_refused(server: hps_numba.HPS) -> None:
    with serving(Answer(server.metrics_text)) as (url, _):
        assert "--model: expected one of m, n, got 'other'" in refused("top", url, "--model", "other", code=2)
    with serving(Answer("hps_build_info 1\n")) as (url, _):
        assert "--model: expected none, as the server has no models, got 'm'" in refused("top", url, "--model", "m", code=2)


def test_more_than_metrics_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hps_numba.cli._top_scrape._MAX_BYTES", 1 << 20)
    with serving(Answer("hps_a 1\n" * (1 << 18))) as (url, _):
        assert "expected at most 1 MiB of metrics, got more" in refused("top", url)


def test_a_server_that_is_away_for_a_while_is_shown_again(end_after: Callable[[int], None]) -> None:
    numbers = iter(range(1, 100))
    answer = Answer()

    def body() -> str:
        number = next(numbers)
        answer.status = 503 if number % 4 == 3 else 200
        return f'hps_lookups_total{{model="m",table="t"}} {100 * number}\n'

    answer.body = body
    with serving(answer) as (url, _):
        end_after(3)
        lines = [json.loads(line) for line in run("top", url, "--json").stdout.splitlines()]
        assert ["problem" in line for line in lines] == [False, True, False]
        assert lines[1] == {"problem": f"{url}/metrics: expected metrics, got HTTP status 503"}
        after = lines[2]["lookups"][0]["lookups_per_second"] * lines[2]["seconds"]
        assert after == pytest.approx(200)  # of both intervals
        end_after(3)
        assert run("top", url).stdout.count("expected metrics, got HTTP status 503") == 1


def test_ctrl_c_ends_it(server: hps_numba.HPS, end_after: Callable[[int], None]) -> None:
    with serving(Answer(server.metrics_text)) as (url, _):
        end_after(0)
        result = run("top", url)
        assert result.exit_code == 0 and result.output == ""
