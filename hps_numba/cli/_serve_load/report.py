"""The report of a benchmark of a server, for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from hps_numba.cli._output import human_seconds, print_facts, print_table
from hps_numba.cli._serve_load.outcomes import PERCENTILES
from hps_numba.cli._serve_load.prometheus import answered_from

__all__ = ["show"]

_LATE = 0.5  # share of the median latency, from which on the lag of the client matters


def show(report: dict[str, Any]) -> None:
    """Print facts, a line for each case, and what a reader of the figures needs to know."""
    print_facts(
        [
            ("server", f"{report['url']}, model {report['model']} ({report['platform'] or 'no platform'})"),
            ("requests", f"{report['protocol']}, {_sizes(report)}"),
            ("keys", "; ".join(f"{name}: {_keys(facts)}" for name, facts in report["tables"].items())),
        ]
    )
    typer.echo("")
    with_server = any(line["server_cpu_seconds_per_request"] is not None for line in report["results"])
    head = ("keys", "load", "req/s", *PERCENTILES, "err", "MB/s", "client", *(["server"] if with_server else []))
    print_table(head, [_cells(line, with_server) for line in report["results"]], left=2)
    typer.echo("")
    for text in _remarks(report):
        typer.echo(text)


def _sizes(report: dict[str, Any]) -> str:
    sizes = [
        f"{one['distinct']:,} different of {one['keys']:,} keys and {one['request_bytes']:,.0f} B" for one in report["requests"]
    ]
    return "; ".join(sizes)


def _keys(facts: dict[str, Any]) -> str:
    more = ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("distribution", "table_size"))
    return f"{facts['distribution']}{f' ({more})' if more else ''} over {facts['table_size']:,}"


def _cells(line: dict[str, Any], with_server: bool) -> tuple[str, ...]:
    cells = (
        f"{line['keys']:,}",
        _load(line),
        _rate(line["requests_per_second"]),
        *(_seconds(line[f"{name}_seconds"]) for name in PERCENTILES),
        f"{sum(line['errors'].values()):,}" if line["errors"] else "0",
        f"{line['bytes_per_second'] / 1e6:,.3g}",
        _seconds(line["client_cpu_seconds_per_request"]),
    )
    return (*cells, _seconds(line["server_cpu_seconds_per_request"])) if with_server else cells


def _load(line: dict[str, Any]) -> str:
    return f"{line['concurrency']} conn" if line["loop"] == "closed" else f"{_rate(line['rate'])}/s"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else human_seconds(value)


def _remarks(report: dict[str, Any]) -> Iterator[str]:
    yield "N conn: N connections, each with a request at a time. N/s: so many requests were due; latencies count from then."
    yield "client, server: CPU time of one request."
    for line in report["results"]:
        name = f"{line['keys']:,} keys, {_load(line)}"
        if line["errors"]:
            yield f"{name}: not answered well: " + ", ".join(f"{count:,} {status}" for status, count in line["errors"].items())
        if line["client_cpu_share"] > 0.9:
            yield f"{name}: the client used {line['client_cpu_share']:.0%} of a core: it may be what limits this."
        if line["loop"] == "open" and line["p50_seconds"] and line["lag_p50_seconds"] > _LATE * line["p50_seconds"]:
            waiting = f"up to {line['most_waiting']:,} requests waited for one of {line['most_busy']:,} connections"
            yield f"{name}: half of the requests were sent {human_seconds(line['lag_p50_seconds'])} or more late; {waiting}."
    for table, shares in answered_from(line["metrics"] for line in report["results"]).items():
        parts = [f"{share:.2%} from {place}" for place, share in sorted(shares.items(), key=lambda one: -one[1])]
        yield f"{table}: rows of its keys came {', '.join(parts) or 'from nowhere'}."
