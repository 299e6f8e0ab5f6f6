"""``hps-numba benchmark``: measures what a deployment is made of, and a server that runs (checklist O06)."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hps_numba.cli import _profile_options as draws
from hps_numba.cli import _serve_options as options
from hps_numba.cli._output import (
    STDOUT,
    AsJson,
    check_output_file,
    console,
    human_rate,
    human_seconds,
    print_facts,
    print_json,
    print_table,
    write_json,
)
from hps_numba.cli._tiers import AllowCode, ConfiguredTier, TierName, chosen_tiers, configured_tiers, done_tiers, label

if TYPE_CHECKING:
    from hps_numba.config import ServerConfig

__all__ = ["PLUGIN"]

PLUGIN = typer.Typer(no_args_is_help=True, help="Measure storage tiers, and servers.")

_MAX_BATCH = 10_000_000


@PLUGIN.callback()
def benchmark() -> None:
    """Measure the storage tiers of this machine and network, and servers."""


@PLUGIN.command("tiers")
def tiers(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="A ps_config JSON file, or --type instead.")] = None,
    type: Annotated[str | None, typer.Option(help="Type of one tier to measure instead of those of a config.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Key of the section of that tier; may be given several times.")
    ] = None,
    tier: TierName = None,
    rows: Annotated[int, typer.Option(min=1, max=2**31, help="Most rows in the table.")] = 100_000,
    dim: Annotated[int, typer.Option(min=1, max=1 << 20, help="Floats in a row.")] = 32,
    batch_size: Annotated[list[str] | None, typer.Option(help="Keys in a call, by default 1,64,1024,16384.")] = None,
    seconds: Annotated[float, typer.Option(min=0.001, max=3600, help="Most seconds for one measurement.")] = 2.0,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure how fast tiers insert, overwrite, fetch and erase rows.

    A table of its own is written in each tier that can be written, and removed afterwards. Some rows are compared with what
    was written: the exit code is 1 if one is wrong.
    """
    source = config if type is None else _config_of(type, option or [], dim)
    if source is None or (config is not None and type is not None):
        raise typer.BadParameter("expected either a config or --type", param_hint="CONFIG")
    if option and type is None:
        raise typer.BadParameter("is an option for --type only", param_hint="--option")
    sizes = _sizes(batch_size)
    chosen = chosen_tiers(configured_tiers(source, allow_code=allow_code), tier)
    results = [_measured(one, rows, dim, sizes, seconds, show=not as_json) for one in chosen]
    measured = done_tiers(results, "measure")
    wrong = sum(one["wrong_rows"] for one in measured)
    if as_json:
        print_json({"rows": rows, "dim": dim, "ok": not wrong, "tiers": results})
    else:
        _show(measured, dim)
    if wrong:
        raise typer.Exit(1)


def _config_of(kind: str, options: list[str], dim: int) -> ServerConfig:
    """A config with one tier, and a model that is never opened, as a config has to have one."""
    from hps_numba.config import read_config

    section: dict[str, Any] = {"type": kind}
    for text in options:
        key, equals, value = text.partition("=")
        if not (key and equals) or key == "type":
            raise typer.BadParameter(f"expected KEY=VALUE, got {text!r}", param_hint="--option")
        try:
            section[key] = json.loads(value)
        except (ValueError, RecursionError):
            section[key] = value
    model = {
        "model": "benchmark",
        "sparse_files": ["benchmark.model"],
        "embedding_vecsize_per_table": [dim],
        "maxnum_catfeature_query_per_table_per_sample": [1],
        "default_value_for_each_table": [0.0],
        "deployed_device_list": [],
    }
    return read_config({"supportlonglong": True, "models": [model], "tiers": [section]})


def _sizes(given: list[str] | None) -> tuple[int, ...]:
    words = [word.strip() for text in given or ["1,64,1024,16384"] for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdigit() and len(word) < 9 and 0 < int(word) <= _MAX_BATCH):
            raise typer.BadParameter(f"expected a number in 1..{_MAX_BATCH}, got {word!r}", param_hint="--batch-size")
    return tuple(int(word) for word in words)


def _measured(
    tier: ConfiguredTier, rows: int, dim: int, sizes: tuple[int, ...], seconds: float, *, show: bool
) -> dict[str, Any]:
    from hps_numba.cli._tier_rates import TierRates

    if getattr(tier.section, "read_only", False):
        return tier.skipped("it is read only")
    with tier.open(read_only=False) as opened, console(stderr=True).status(tier.name) if show else nullcontext() as status:
        if opened.read_only:
            return tier.skipped("it is read only")
        say = (lambda text: None) if status is None else (lambda text: status.update(f"{tier.name}: {text}"))
        rates = TierRates(rows=rows, dim=dim, sizes=sizes, seconds=seconds, key_bits=tier.key_bits, say=say)
        return {**tier.facts, "results": rates.run(opened), "wrong_rows": rates.wrong}


def _show(measured: list[dict[str, Any]], dim: int) -> None:
    print_facts((one["tier"], label(one)) for one in measured)
    typer.echo("")
    print_table(
        ("tier", "operation", "batch", "calls", "found", "keys/s", "rows", "p50", "p99"),
        [_line(one["tier"], line) for one in measured for line in one["results"]],
        left=2,
    )
    typer.echo("")
    typer.echo(f"rows: bytes of rows of {dim} float32 that were written or found in a second. p50, p99: of a call.")
    wrong = sum(one["wrong_rows"] for one in measured)
    typer.echo(f"FAILED: {wrong:,} rows differ from what was written" if wrong else "every row that was checked is right")


def _line(tier: str, line: dict[str, Any]) -> tuple[str, ...]:
    share = line["found"] / max(1, line["keys"])
    seconds = [human_seconds(line[f"{name}_seconds"]) for name in ("p50", "p99")]
    rate = human_rate(line["keys_per_second"], "").strip()
    return (
        tier, line["operation"], f"{line['batch_size']:,}", f"{line['calls']:,}", f"{share:.0%}",
        rate, human_rate(line["bytes_per_second"], "B/s") if line["bytes_per_second"] else "", *seconds,
    )  # fmt: skip


# -- serve ---------------------------------------------------------------------


@PLUGIN.command("serve")
def serve(
    url: options.Url,
    model: options.Model = None,
    protocol: options.Protocol = "auto",
    table: options.Table = None,
    keys: options.Keys = "32",
    output_dtype: options.OutputDtype = None,
    encoding: options.Encoding = "binary",
    config: options.Config = None,
    table_size: options.TableSize = None,
    distribution: draws.DistributionName = "powerlaw",
    alpha: draws.Alpha = 1.2,
    hot_key_percentage: draws.HotKeyPercentage = 0.2,
    hot_key_coverage: draws.HotKeyCoverage = 0.8,
    histogram: draws.Histogram = "0.4,0.3,0.2,0.1",
    distinct: options.Distinct = 1000,
    concurrency: options.Concurrency = None,
    rate: options.Rate = None,
    arrivals: options.Arrivals = "poisson",
    connections: options.Connections = 64,
    duration: options.Duration = 10.0,
    warmup: options.Warmup = 1.0,
    timeout: options.Timeout = 10.0,
    header: options.Header = None,
    ca: options.Ca = None,
    pid: options.Pid = None,
    seed: draws.Seed = 0,
    json_file: options.JsonFile = None,
    plot: options.Plot = None,
) -> None:
    """Send requests to a server of the Open Inference Protocol, and measure how fast they are answered.

    Open loops (--rate) send requests when they are due, whether or not others were answered, and count latencies from then:
    those are the percentiles that clients will see. Closed loops (--concurrency) send when an answer has come, as Perf
    Analyzer does. The exit code is 1 if all requests of a measurement failed.
    """
    check_output_file("--json", json_file)
    cases, headers = options.chosen_cases(concurrency, rate), options.chosen_headers(header)
    is_json = options.one_of("--encoding", encoding, "binary", "json") == "json"
    wanted = options.one_of("--protocol", protocol, "auto", "named", "flat")
    dtype = output_dtype and options.one_of("--output-dtype", output_dtype, "fp32", "fp16").upper()
    if model is not None and not (model and model.isprintable()):
        raise typer.BadParameter(f"expected the name of a model, got {model!r}", param_hint="--model")
    if config is not None and table_size is not None:
        raise typer.BadParameter("expected either --config or --table-size", param_hint="--table-size")

    from hps_numba.cli._profile_keys import chosen_distribution
    from hps_numba.cli._serve_load.benchmark import Benchmark
    from hps_numba.cli._serve_load.connection import Access
    from hps_numba.cli._serve_load.load import Settings
    from hps_numba.simulate.plots import check_plot

    if plot is not None:
        check_plot(plot)
    benchmark = Benchmark(
        url=url,
        access=Access(headers, ca, timeout, is_json),
        cases=cases,
        settings=Settings(
            seconds=duration,
            warmup=warmup,
            arrivals=options.one_of("--arrivals", arrivals, "poisson", "constant"),
            connections=connections,
            distinct=distinct,
            timeout=timeout,
            seed=seed,
            pid=pid,
        ),
        distribution=chosen_distribution(
            distribution, alpha=alpha, percentage=hot_key_percentage, coverage=hot_key_coverage, weights=histogram
        ),
        model=model,
        protocol=wanted,
        tables=[name for text in table or () for name in text.split(",") if name],
        keys=options.chosen_keys(keys),
        config=config,
        table_size=table_size,
        parameters={"output_dtype": dtype} if dtype else {},
    )
    with nullcontext() if json_file == STDOUT else console(stderr=True).status(url, refresh_per_second=2) as status:
        report = benchmark.run(lambda text: None if status is None else status.update(f"{url}: {text}"))
    _write(report, json_file, plot)
    if not all(line["answered"] or not line["requests"] for line in report["results"]):
        raise typer.Exit(1)


def _write(report: dict[str, Any], json_file: Path | None, plot: Path | None) -> None:
    if plot is not None:
        from hps_numba.cli._serve_load.plot import save_plot

        save_plot(plot, report)
    if write_json(report, json_file):
        return
    from hps_numba.cli._serve_load.report import show

    show(report)
