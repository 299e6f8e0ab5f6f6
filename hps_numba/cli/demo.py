"""``hps-numba demo``: generates a model, deploys and serves it, and checks every row."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hps_numba.cli._output import AsJson, console, human_rate, human_seconds, print_facts, print_json, print_table

__all__ = ["PLUGIN"]

_MAX_SECONDS = 86_400


def demo(
    folder: Annotated[
        Path | None, typer.Option(help="Directory for model and config, which are kept; by default a temporary one.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the temporary directory.")] = False,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the model.")] = 1_000_000,
    dim: Annotated[int, typer.Option(min=1, help="Floats in a row.")] = 32,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads that send requests; by default one per core.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Duration of serving and checking.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the values and of the requests.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Plot latencies and throughput to this file (.png, .svg, .pdf).")] = None,
    as_json: AsJson = False,
) -> None:
    """Generate a model, serve it from host memory, check every row.

    Several threads send requests of 1 to 1024 samples with 26 power-law keys each; 2 % of the keys do not exist. Every row is
    compared bit by bit with the generated one. The exit code is 1 if any row is wrong.
    """
    from hps_numba.cli._demo_plot import save_plot
    from hps_numba.cli._demo_run import Demo
    from hps_numba.cli._hardware import inspect_hardware
    from hps_numba.simulate.plots import check_plot

    if not seconds <= _MAX_SECONDS:  # nor NaN
        raise typer.BadParameter(f"expected 0.1 to {_MAX_SECONDS:,} seconds, got {seconds}", param_hint="--seconds")
    if plot is not None:
        check_plot(plot)
    hardware = inspect_hardware()
    with _work_folder(folder, keep) as work:
        report, traffic = Demo(
            folder=work,
            rows=rows,
            dim=dim,
            threads=threads or hardware.cores,
            seconds=seconds,
            seed=seed,
            say=_silent if as_json else _say,
            waiting=nullcontext if as_json else partial(console(stderr=True).status, refresh_per_second=2),
        ).run(hardware)
    if folder is not None or keep:
        report["folder"] = work
    if plot is not None:
        save_plot(plot, traffic, _headline(report))
        report["plot"] = plot
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not report["ok"]:
        raise typer.Exit(1)


PLUGIN = demo


@contextmanager
def _work_folder(folder: Path | None, keep: bool) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    elif keep:
        yield Path(tempfile.mkdtemp(prefix="hps_demo_"))
    else:
        with tempfile.TemporaryDirectory(prefix="hps_demo_") as temporary:
            yield Path(temporary)


def _silent(name: str, text: str) -> None:
    del name, text


def _say(name: str, text: str) -> None:
    typer.echo(f"{name:<10}  {text}")


def _headline(report: dict[str, Any]) -> str:
    rate = human_rate(report["keys_per_second"], "keys/s")
    return f"{report['rows']:,} rows x {report['dim']} in host memory, {report['threads']} threads, {report['cpu']}: {rate}"


def _show(report: dict[str, Any]) -> None:
    from hps_numba.cli._latency import PERCENTILES

    typer.echo("")
    print_table(("batch", "keys", "requests", *PERCENTILES, "max"), [_cells(line, PERCENTILES) for line in report["latency"]])
    typer.echo("")
    rate = f"{human_rate(report['keys_per_second'], 'keys/s')}, {human_rate(report['bytes_per_second'], 'B/s')} of rows"
    print_facts(
        [
            ("requests", f"{report['requests']:,} with {report['keys']:,} keys"),
            ("throughput", f"{rate}, over {human_seconds(report['lookup_seconds'])} of lookups by all threads"),
            ("hits", f"{report['hits']:,}"),
            ("defaults", f"{report['defaults']:,}, for {report['strangers']:,} keys that do not exist"),
            ("memory", _memory(report)),
            *((name, str(report[name])) for name in ("plot", "folder") if name in report),
            ("wrong rows", f"{report['wrong_rows']:,}"),
        ]
    )
    typer.echo(_verdict(report))


def _cells(line: dict[str, Any], percentiles: dict[str, int]) -> tuple[str, ...]:
    samples = f"{line['samples']:,} sample{'s' * (line['samples'] > 1)}"
    times = [human_seconds(line[f"{name}_seconds"]) for name in (*percentiles, "max")]
    return samples, f"{line['keys']:,}", f"{line['requests']:,}", *times


def _memory(report: dict[str, Any]) -> str:
    from hps_numba.device.host_memory import human_bytes

    text = f"{human_bytes(report['planned_bytes'])} planned, {human_bytes(report['used_bytes'])} used"
    if report["process_grew_bytes"] is None:
        return text
    return f"{text}; the process grew by {human_bytes(report['process_grew_bytes'])} while loading"


def _verdict(report: dict[str, Any]) -> str:
    if report["wrong_rows"]:
        return "FAILED: some rows differ from the generated ones"
    if not report["ok"]:
        return "FAILED: the counters of the server do not agree with the requests"
    return f"All {report['keys']:,} rows equal the generated ones, bit by bit."
