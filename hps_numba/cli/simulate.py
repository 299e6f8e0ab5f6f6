"""``hps-numba simulate``: hit rates of cache policies and sizes on a trace of keys, before deployment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hps_numba.cli import _simulate_options as options
from hps_numba.cli._output import STDOUT, check_output_file, human_seconds, print_facts, print_json, print_table

if TYPE_CHECKING:
    from hps_numba.simulate import Advice, Run, Simulation

__all__ = ["PLUGIN"]

_GEOMETRIES = {"gpu": "GPU", "associative": "assoc."}


def simulate(
    trace: options.TraceFile,
    policy: options.Policies = None,
    size: options.Sizes = None,
    geometry: options.Geometry = "both",
    batch: options.Batch = 1024,
    warmup: options.Warmup = None,
    sample: options.Sample = 1.0,
    no_bounds: options.NoBounds = False,
    advise: options.Advise = False,
    target_hit_rate: options.TargetHitRate = None,
    dim: options.Dim = 32,
    row_dtype: options.RowDtype = "float32",
    format_name: options.FormatName = None,
    column: options.Column = None,
    limit: options.Limit = None,
    threads: options.Threads = None,
    allow_code: options.AllowCode = False,
    json_file: options.JsonFile = None,
    csv_file: options.CsvFile = None,
    plot: options.Plot = None,
    html: options.HtmlFile = None,
) -> None:
    """Simulate cache policies on a trace of keys.

    Policies run as in the GPU cache (sets of ten rows, calls of --batch keys; the hits are exactly those of the cache) and as
    in the literature (one order of all rows, one request after the other). Belady's optimum and the infinite cache are upper
    bounds. --advise finds the policy and size that reach a hit rate with the least GPU memory.
    """
    if target_hit_rate is not None and not advise:
        raise typer.BadParameter("is an option for --advise only", param_hint="--target-hit-rate")
    for name, path in (("--json", json_file), ("--csv", csv_file), ("--html", html)):
        check_output_file(name, path)

    from hps_numba import simulate as simulation
    from hps_numba.simulate.html_report import check_page
    from hps_numba.simulate.plots import check_plot

    if plot is not None:
        check_plot(plot)
    if html is not None:
        check_page(html)
    opened = simulation.open_trace(trace, format=format_name, column=column, limit=limit)
    how: dict[str, Any] = {"batch": batch, "sample": sample, "dim": dim, "row_dtype": row_dtype, "threads": threads}
    how |= {"allow_code": allow_code, "progress": False if json_file == STDOUT else None}
    named = options.words_of(policy)
    advice = None
    if advise:
        target = 0.95 if target_hit_rate is None else target_hit_rate
        share = 0.2 if warmup is None else warmup
        advice = simulation.advise(opened, target, named or None, warmup=share, **how)
    result = None
    if not advise or any(path is not None for path in (csv_file, plot, html)) or size:
        sizes = options.words_of(size)
        how |= {"geometry": geometry, "bounds": not no_bounds, "warmup": warmup or 0}
        result = simulation.run(opened, named or simulation.DEFAULT_POLICIES, *([sizes] if sizes else []), **how)
    _write(result, advice, json_file, csv_file, plot, html)
    if json_file != STDOUT:
        if result is not None:
            _show(result)
        if advice is not None:
            _show_advice(advice, blank=result is not None)


PLUGIN = simulate


def _write(
    result: Simulation | None,
    advice: Advice | None,
    json_file: Path | None,
    csv_file: Path | None,
    plot: Path | None,
    html: Path | None,
) -> None:
    import json

    from hps_numba import simulate as simulation
    from hps_numba.errors import ConfigError
    from hps_numba.runtime.replacing import write_report

    content = {**({} if result is None else result.to_dict()), **({} if advice is None else {"advice": advice.to_dict()})}
    if json_file == STDOUT:
        print_json(content)
    elif json_file is not None:
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        write_report(json_file, text, '{\n "trace"', '{\n "advice"', error=ConfigError)
    if result is not None:
        if csv_file is not None:
            result.write_csv(csv_file)
        if plot is not None:
            simulation.write_plot(result, plot)
        if html is not None:
            simulation.write_page(result, html, advice=advice)


# -- for a terminal -----------------------------------------------------------------------------------


def _show(result: Simulation) -> None:
    sampled = "" if result.rate == 1 else f", estimated from {result.rate:.3g} of the keys ({result.simulated:,} requests)"
    counted = f"all but the first {result.warmup:,} requests" if result.warmup else "all requests, starting with an empty cache"
    print_facts(
        [
            ("trace", f"{result.trace} ({result.format}): {result.requests:,} requests, {result.distinct:,} keys{sampled}"),
            ("GPU sets", f"sets of ten rows, calls of {result.batch:,} keys; rows of {result.dim} x {result.row_dtype}"),
            ("counted", counted),
            *(("left out", line) for line in result.skipped),
        ]
    )
    typer.echo("")
    sampled_error = any(run.error for run in result.runs)
    columns = ("policy", "geometry", "rows", "hits", *(("+-",) if sampled_error else ()), "by key", "admitted", "evicted")
    print_table(
        (*columns, "host MB", "GPU MB"),
        [_line(run, sampled_error) for run in result.runs],
        left=2,
    )
    typer.echo("")
    typer.echo("hits: share of requests. by key: share of the distinct keys of each call. host MB: missed rows. GPU MB: memory")
    typer.echo("of the cache. GPU: its sets and calls. assoc.: one order of all rows, one request after the other.")
    if sampled_error:
        typer.echo("+-: half of a 95 % interval, from four quarters of the sample. Counts and bytes are those of the sample.")


def _line(run: Run, error: bool) -> list[str]:
    name = f"{run.policy} (bound)" if run.bound else run.policy
    return [
        name,
        "" if run.bound else _GEOMETRIES[run.geometry],
        f"{run.rows:,}",
        f"{run.hit_rate:.2%}",
        *([f"{run.error:.2%}"] if error else []),
        f"{run.key_hit_rate:.2%}",
        f"{run.admissions:,}",
        f"{run.evictions:,}",
        f"{run.bytes_from_host / 1e6:,.1f}",
        f"{run.gpu_bytes / 1e6:,.2f}" if run.gpu_bytes else "",
    ]


def _show_advice(advice: Advice, *, blank: bool) -> None:
    if blank:
        typer.echo("")
    best = advice.best
    if best is None:
        typer.echo(f"No policy reaches a hit rate of {advice.target:.1%} on {advice.trace}.")
        typer.echo(
            f"Even a cache that is never full has {advice.ceiling:.2%}: the first request for a key misses under every policy."
        )
    else:
        typer.echo(
            f"A hit rate of {advice.target:.1%} on {advice.trace} with the least GPU memory: {best.policy}, {best.rows:,} rows"
        )
        typer.echo("")
        sampled = any(one.error for one in advice.choices)
        print_table(
            ("policy", "rows", "GPU memory", "hits", *(("+-",) if sampled else ()), f"call of {advice.batch:,} keys"),
            [
                (
                    one.policy,
                    f"{one.rows:,}",
                    f"{one.gpu_bytes / 1e6:,.2f} MB",
                    f"{one.hit_rate:.2%}",
                    *((f"{one.error:.2%}" if one.error else "",) if sampled else ()),
                    f"about {human_seconds(one.lookup_seconds)}",
                )
                for one in advice.choices
            ],
        )
        if advice.missed:
            typer.echo(f"Not reached by {', '.join(advice.missed)}.")
    typer.echo("")
    typer.echo("Assumptions:")
    for line in advice.assumptions:
        typer.echo(f"* {line}")
