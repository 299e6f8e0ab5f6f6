"""A simulation as one self-contained HTML page with facts, tables and plots as inline SVG; it loads nothing."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from hps_numba.config.messages import show
from hps_numba.errors import ConfigError
from hps_numba.runtime.paths import checked_path
from hps_numba.runtime.replacing import write_report
from hps_numba.simulate.advice import Advice, Choice
from hps_numba.simulate.plots import GEOMETRY_NAMES, check_matplotlib, figures, to_svg
from hps_numba.simulate.results import Run, Simulation

__all__ = ["check_page", "render_page", "write_page"]

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d1d1f; max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p.lead, .note { color: #555; } .note { font-size: .88rem; }
svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .82rem; }
th, td { padding: .28rem .5rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { color: #555; font-weight: 600; border-bottom: 2px solid #bbb; }
th:first-child, td:first-child, th.text, td.text { text-align: left; }
td.best { font-weight: 700; } tr.bound td { color: #777; }
dl { display: grid; grid-template-columns: max-content auto; gap: .15rem 1.2rem; } dt { color: #555; } dd { margin: 0; }
details { margin-top: 1rem; } summary { cursor: pointer; }
"""


def check_page(path: str | os.PathLike[str]) -> Path:
    """``path``; raises, before any work is done, if a page could not be written there.

    Raises:
        HpsError: matplotlib is missing.   ConfigError: not a path, or no such directory.
    """
    check_matplotlib()
    place = checked_path(path, "page", error=ConfigError)
    if not place.absolute().parent.is_dir():
        raise ConfigError(f"page: expected a file in an existing directory, got {place}")
    return place


def write_page(
    simulation: Simulation, path: str | os.PathLike[str], *, advice: Advice | None = None, rows: int | None = None
) -> None:
    """Write the simulation to ``path`` as a self-contained HTML page.

    Args:
        advice: to show as well.   rows: cache size of the plot over time; by default the middle one.

    Raises:
        As ``check_page``; ConfigError: no cache of this size was simulated, or there is something else than a page.
    """
    place = check_page(path)
    if advice is not None and not isinstance(advice, Advice):
        raise ConfigError(f"advice: expected what simulate.advise returned, got {show(advice)}")
    write_report(place, render_page(simulation, advice=advice, rows=rows), "<!doctype html", error=ConfigError)


def render_page(simulation: Simulation, *, advice: Advice | None = None, rows: int | None = None) -> str:
    """The page as a string."""
    drawn = {name: to_svg(figure) for name, figure in figures(simulation, rows).items()}
    title = f"Cache policies on {simulation.trace}"
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="lead">{simulation.requests:,} requests for {simulation.distinct:,} distinct keys</p>',
        _facts(simulation),
        *([] if advice is None else _advice(advice)),
        "<h2>Hit rates</h2>",
        drawn["curves"],
        _legend(simulation),
        '<div class="scroll">' + _hit_rates(simulation) + "</div>",
        "<h2>Over time</h2>",
        drawn["time"],
        drawn["heat"],
        '<p class="note">Keys are sorted by popularity and cut into groups with equally many requests over the whole trace.'
        " Red: the group is requested more often than on average; blue: less often. A row of one colour means that its keys are"
        " equally popular all the time.</p>",
        f"<details><summary>All {len(simulation.runs)} runs: hits, admissions, evictions, bytes</summary>",
        _all_runs(simulation),
        "</details>",
        '<p class="note">Made by <code>hps-numba simulate</code>.</p>',
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(title)}</title>'
    joined = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{joined}\n</body></html>\n'


def _text(value: object) -> str:
    return html.escape(str(value))


def _facts(simulation: Simulation) -> str:
    facts = [
        ("trace", _text(f"{simulation.trace} ({simulation.format})")),
        ("calls", f"{simulation.batch:,} keys each, in the order of the trace"),
        (
            "counted",
            f"all but the first {simulation.warmup:,} requests"
            if simulation.warmup
            else "all requests, starting with an empty cache",
        ),
        ("rows", f"{simulation.dim} x {simulation.row_dtype}"),
    ]
    if simulation.rate < 1:
        facts.append(
            (
                "sample",
                f"{simulation.simulated:,} requests for {simulation.rate:.3g} of the keys, in caches scaled down by the same"
                " factor; &plusmn; is half of a 95 % interval, measured on four disjoint quarters of the sample",
            )
        )
    facts += [("not simulated", _text(line)) for line in simulation.skipped]
    return "<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{value}</dd>" for name, value in facts) + "</dl>"


def _legend(simulation: Simulation) -> str:
    lines = []
    if simulation.select(geometry="gpu"):
        lines.append(
            "<b>GPU sets</b>: the cache as it runs on a GPU, with sets of ten rows and calls of"
            f" {simulation.batch:,} keys. Rows are inserted after the whole call was looked up, so a missing key that occurs"
            " twice in a call misses twice."
        )
    if simulation.select(geometry="associative"):
        lines.append("<b>associative</b>: one order of all rows, one request after the other, as in the literature.")
    if any(run.bound for run in simulation.runs):
        lines.append(
            "<b>belady</b> knows the future: no policy has more hits in a cache of the same size."
            " <b>infinite</b>: each key misses once."
        )
    lines.append("Below each size: its share of the distinct keys. Bold: the best policy for each size and geometry.")
    return f'<p class="note">{" ".join(lines)}</p>'


def _hit_rates(simulation: Simulation) -> str:
    """Hit rates, a line for each policy and a column for each size; the best of each column and geometry in bold."""
    curves = {name: runs for name, runs in simulation.curves().items() if name[0] != "infinite"}
    count = max(map(len, curves.values()))
    columns = [max(runs[i].rows for runs in curves.values() if i < len(runs)) for i in range(count)]
    best = {
        (geometry, i): max(runs[i].hit_rate for (_, other), runs in curves.items() if other == geometry and not runs[0].bound)
        for geometry in {other for (_, other), runs in curves.items() if not runs[0].bound}
        for i in range(count)
    }
    head = ["policy", "geometry", *(f"{rows:,} rows<br>{_share(rows / simulation.distinct)}" for rows in columns)]
    lines = []
    for (policy, geometry), runs in curves.items():
        cells = [_text(policy), GEOMETRY_NAMES[geometry]]
        marks = ["", "text"]
        for i in range(count):
            run = runs[i] if i < len(runs) else None
            cells.append("" if run is None else _rate(run))
            marks.append("best" if run is not None and not run.bound and run.hit_rate == best[geometry, i] else "")
        lines.append((cells, marks, runs[0].bound))
    for run in simulation.select(policy="infinite"):
        lines.append(([f"infinite ({run.rows:,} rows)", "", *[_rate(run)] * count], ["", "text", *[""] * count], True))
    return _table(head, lines)


def _share(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _rate(run: Run | Choice) -> str:
    return f"{run.hit_rate:.2%}" + (f" &plusmn; {100 * run.error:.2f}" if run.error else "")


def _table(head: Sequence[str], lines: Iterable[tuple[Sequence[str], Sequence[str], bool]]) -> str:
    top = "".join(f"<th{' class=text' if name == 'geometry' else ''}>{name}</th>" for name in head)
    rows = "".join(
        f"<tr{' class=bound' if is_bound else ''}>"
        + "".join(f"<td{f' class={mark}' if mark else ''}>{cell}</td>" for cell, mark in zip(cells, marks))
        + "</tr>"
        for cells, marks, is_bound in lines
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table>"


def _all_runs(simulation: Simulation) -> str:
    head = [
        "policy",
        "geometry",
        "rows",
        "hit rate by request",
        "by distinct key of a call",
        "requests",
        "admissions",
        "evictions",
    ]
    head += ["MB from host", "MB into cache", "MB from cache", "GPU memory, MB"]
    lines = []
    for run in simulation.runs:
        numbers = (run.bytes_from_host, run.bytes_into_cache, run.bytes_from_cache)
        cells = [
            _text(run.policy),
            GEOMETRY_NAMES[run.geometry],
            f"{run.rows:,}",
            _rate(run),
            f"{run.key_hit_rate:.2%}",
            f"{run.requests:,}",
            f"{run.admissions:,}",
            f"{run.evictions:,}",
            *(f"{number / 1e6:,.1f}" for number in numbers),
            f"{run.gpu_bytes / 1e6:,.2f}" if run.gpu_bytes else "",
        ]
        lines.append((cells, ["", "text", *[""] * 10], run.bound))
    note = "" if simulation.rate == 1 else '<p class="note">Counts and bytes are of the sampled keys.</p>'
    return f'{note}<div class="scroll">{_table(head, lines)}</div>'


def _advice(advice: Advice) -> list[str]:
    best = advice.best
    if best is None:
        verdict = (
            f"No policy reaches {advice.target:.1%} on this trace: even a cache that is never full has {advice.ceiling:.2%},"
            " because the first request for each key misses under every policy."
        )
    else:
        verdict = (
            f"<b>{_text(best.policy)}</b> with <b>{best.rows:,} rows</b> ({best.gpu_bytes / 1e6:,.2f} MB of GPU memory) reaches"
            f" {advice.target:.1%}: hit rate {best.hit_rate:.2%}, about {best.lookup_seconds * 1e6:,.0f} &micro;s for a call of"
            f" {advice.batch:,} keys."
        )
    lines = [
        (
            [
                _text(choice.policy),
                f"{choice.rows:,}",
                f"{choice.gpu_bytes / 1e6:,.2f}",
                _rate(choice),
                f"{choice.lookup_seconds * 1e6:,.0f}",
            ],
            [""] * 5,
            False,
        )
        for choice in advice.choices
    ]
    table = [_table(["policy", "rows", "GPU memory, MB", "hit rate", "&micro;s a call"], lines)] if lines else []
    missed = [f'<p class="note">Not reached by {_text(", ".join(advice.missed))}.</p>'] if advice.missed and lines else []
    holds = "".join(f"<li>{_text(line)}</li>" for line in advice.assumptions)
    return [
        f"<h2>Advice for a hit rate of {advice.target:.1%}</h2>",
        f"<p>{verdict}</p>",
        *table,
        *missed,
        f'<ul class="note">{holds}</ul>',
    ]
