"""``hps-numba profile``: the time of lookups, the tiers that answer them, and whether the rows are right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import typer

from hps_numba.cli import _profile_options as options
from hps_numba.cli._miss_rates import shown_rates
from hps_numba.cli._output import (
    STDOUT,
    check_output_file,
    console,
    human_rate,
    human_seconds,
    print_facts,
    print_table,
    write_json,
)

__all__ = ["PLUGIN"]

_TIMES = ("p50", "p95", "p99")


def profile(
    config: options.Config = None,
    model: options.Model = None,
    table: options.Table = None,
    device: options.Device = None,
    allow_code: options.AllowCode = False,
    rows: options.Rows = None,
    dim: options.Dim = None,
    gpucacheper: options.Gpucacheper = None,
    mode: options.Mode = None,
    num_keys: options.NumKeys = None,
    iterations: options.Iterations = 1000,
    warmup_iterations: options.WarmupIterations = 10,
    refreshes: options.Refreshes = 10,
    threads: options.Threads = 1,
    distribution: options.DistributionName = "powerlaw",
    alpha: options.Alpha = 1.2,
    hot_key_percentage: options.HotKeyPercentage = 0.2,
    hot_key_coverage: options.HotKeyCoverage = 0.8,
    histogram: options.Histogram = "0.4,0.3,0.2,0.1",
    table_size: options.TableSize = None,
    keys: options.KeysFile = None,
    seed: options.Seed = 0,
    json_file: options.JsonFile = None,
    lookup_session: options.LookupSession = False,
    database_backend: options.DatabaseBackend = False,
    embedding_cache: options.EmbeddingCache = False,
    refresh_embeddingcache: options.RefreshEmbeddingcache = 0.0,
) -> None:
    """Measure lookups of a table.

    Mode session is a complete lookup, with keys in GPU memory if the model is deployed on a GPU; host has keys in host memory,
    and is answered from there; cache looks up keys that were looked up just before; refresh reloads the rows of the cache.
    Every call has new keys, and one batch for each line of the table is checked: the exit code is 1 if any row is wrong.
    The options of HugeCTR's hps_profiler are accepted as well.
    """
    _check_options_of("a config", config is not None, {"--model": model, "--table": table})
    _check_options_of("a generated table", config is None, {"--rows": rows, "--dim": dim, "--gpucacheper": gpucacheper})
    flags = {"session": lookup_session, "host": database_backend, "cache": embedding_cache}
    modes = options.chosen_modes(mode, {**flags, "refresh": refresh_embeddingcache > 0})
    sizes = options.chosen_sizes(num_keys)
    check_output_file("--json", json_file)

    from hps_numba.cli._profile_keys import chosen_distribution
    from hps_numba.cli._profile_measure import Calls
    from hps_numba.cli._profile_run import Profile
    from hps_numba.cli._profile_target import GeneratedTable

    drawn = chosen_distribution(
        distribution, alpha=alpha, percentage=hot_key_percentage, coverage=hot_key_coverage, weights=histogram
    )
    share = 0.2 if gpucacheper is None else gpucacheper
    generated = GeneratedTable(rows=rows or 1_000_000, dim=dim or 32, gpucacheper=share, seed=seed, max_batch=max(sizes))
    with _waiting(json_file):
        report = Profile(
            config=config,
            generated=generated,
            model=model,
            table=table,
            device=device,
            allow_code=allow_code,
            modes=modes,
            sizes=sizes,
            calls=Calls(iterations=iterations, warmup=warmup_iterations, threads=threads),
            refreshes=max(1, int(refresh_embeddingcache * iterations)) if refresh_embeddingcache else refreshes,
            distribution=drawn,
            table_size=table_size,
            keys_file=keys,
            seed=seed,
        ).run()
    if not write_json(report, json_file):
        _show(report)
    if not report["ok"]:
        raise typer.Exit(1)


PLUGIN = profile


def _check_options_of(what: str, used: bool, given: dict[str, Any]) -> None:
    """Reject options that would have no effect."""
    for name, value in given.items():
        if value is not None and not used:
            raise typer.BadParameter(f"is an option for {what} only", param_hint=name)


def _waiting(json_file: Path | None) -> AbstractContextManager[Any]:
    return nullcontext() if json_file == STDOUT else console(stderr=True).status("measuring", refresh_per_second=2)


# -- the report ---------------------------------------------------------------------


def _show(report: dict[str, Any]) -> None:
    results = report["results"]
    timing = {result["mode"]: f"{result['timing']}; {result['calls']:,} calls" for result in results}
    print_facts(
        [
            ("table", _table(report)),
            ("keys", _keys(report["keys"])),
            ("machine", ", ".join([*report["gpus"], f"{report['cpu']} ({report['cores']} cores)"])),
            ("threads", f"{report['threads']}, each with {report['warmup_iterations']:,} calls before that are not timed"),
            *((f"time of {mode}", text) for mode, text in timing.items()),
        ]
    )
    typer.echo("")
    cached = any("cache_hit_rate" in result for result in results)
    hits = ("in cache", "in host") if cached else ("in host",)
    print_table(
        ("mode", "keys", "mean", *_TIMES, "keys/s", "rows/s", *hits),
        [(result["mode"], *_numbers(result), *_hits(result, cached=cached)) for result in results],
    )
    typer.echo("")
    for line in _remarks(report):
        typer.echo(line)
    typer.echo(_verdict(report))


def _table(report: dict[str, Any]) -> str:
    where = "host memory" if report["device"] is None else f"device {report['device']}"
    return f"{report['model']}/{report['table']}, {report['rows']:,} rows x {report['dim']} {report['dtype']}, from {where}"


def _keys(facts: dict[str, Any]) -> str:
    if "keys_file" in facts:
        return f"{facts['keys_in_file']:,} of {facts['keys_file']}, in order"
    arguments = ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("distribution", "table_size"))
    return f"{facts['distribution']}{f' ({arguments})' if arguments else ''} over {facts['table_size']:,} keys"


def _numbers(result: dict[str, Any]) -> list[str]:
    times = [human_seconds(result[f"{name}_seconds"]) for name in ("mean", *_TIMES)]
    if "num_keys" not in result:
        return ["", *times, "", ""]
    rates = [human_rate(result[f"{what}_per_second"], "").strip() for what in ("keys", "rows")]
    return [f"{result['num_keys']:,}", *times, *rates]


def _hits(result: dict[str, Any], *, cached: bool) -> list[str]:
    shares = [result.get(name) for name in (("cache_hit_rate", "host_hit_rate") if cached else ("host_hit_rate",))]
    return ["" if share is None else f"{share:.1%}" for share in shares]


def _remarks(report: dict[str, Any]) -> Iterator[str]:
    """What a reader of the figures needs to know."""
    results = report["results"]
    if report["device"] is None and {"session", "host"} <= {result["mode"] for result in results}:
        yield "Without a GPU, modes session and host are the same lookups."
    for line in shown_rates(report["miss_rates"]):
        yield f"Missed rows on {line}."
    defaults = max((result.get("default_rate", 0.0) for result in results), default=0.0)
    if defaults:
        yield f"Up to {defaults:.2%} of the keys had no row and got the default value."
    hits = min((result.get("cache_hit_rate", 1.0) for result in results if result["mode"] == "cache"), default=1.0)
    if hits < 1:
        yield f"Mode cache had {hits:.2%} hits: some keys of a call were evicted from the cache."


def _verdict(report: dict[str, Any]) -> str:
    checked, wrong = (sum(result[name] for result in report["results"]) for name in ("checked_rows", "wrong_rows"))
    if wrong:
        return f"FAILED: {wrong:,} of {checked:,} rows differ from {report['compared_with']}"
    return f"{checked:,} rows were compared with {report['compared_with']}: all are equal, bit by bit."
