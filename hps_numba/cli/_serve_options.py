"""The options of ``hps-numba benchmark serve``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hps_numba.cli._request_options import whole_numbers

if TYPE_CHECKING:
    from hps_numba.cli._serve_load.load import Case

__all__ = [
    "Arrivals",
    "Ca",
    "Concurrency",
    "Config",
    "Connections",
    "Distinct",
    "Duration",
    "Encoding",
    "Header",
    "JsonFile",
    "Keys",
    "Model",
    "OutputDtype",
    "Pid",
    "Plot",
    "Protocol",
    "Rate",
    "Table",
    "TableSize",
    "Timeout",
    "Url",
    "Warmup",
    "chosen_cases",
    "chosen_headers",
    "chosen_keys",
    "one_of",
]

Url = Annotated[str, typer.Argument(metavar="URL", help="http://HOST:PORT, https://, grpc:// or grpcs:// of the server.")]

# what is asked for
Model = Annotated[str | None, typer.Option(help="Model on the server; by default, its only one.")]
Protocol = Annotated[str, typer.Option(help="auto, named (an input for each table) or flat (KEYS, NUMKEYS).")]
Table = Annotated[
    list[str] | None,
    typer.Option(help="Tables of a request, also separated by commas; flat: all tables of the model in order."),
]
Keys = Annotated[
    str, typer.Option("--keys", metavar="N,N", help="Keys of a request, over all its tables; several are measured.")
]
OutputDtype = Annotated[str | None, typer.Option(help="FP32 or FP16, as a parameter of requests; by default, none.")]
Encoding = Annotated[str, typer.Option(help="http: binary or json tensors.")]
Config = Annotated[Path | None, typer.Option(help="A ps_config JSON file, whose sparse models hold the keys to ask for.")]
TableSize = Annotated[
    int | None, typer.Option("--table-size", "--table_size", min=1, help="Ask for keys 0 to N - 1 (by default 100,000).")
]
Distinct = Annotated[int, typer.Option(min=1, max=1_000_000, help="Most different requests, sent in turn.")]

# how it is sent
Concurrency = Annotated[
    str | None,
    typer.Option(metavar="N,N", help="Closed loops: each of N connections sends when its last request was answered."),
]
Rate = Annotated[
    str | None,
    typer.Option(metavar="R,R", help="Open loops: requests a second, or with % a share of what closed loops have reached."),
]
Arrivals = Annotated[str, typer.Option(help="Open loops: poisson or constant.")]
Connections = Annotated[
    int, typer.Option(min=1, max=4096, help="Open loops: connections; a request that finds none free waits.")
]
Duration = Annotated[float, typer.Option(min=0.01, max=86_400, help="Seconds of each measurement.")]
Warmup = Annotated[float, typer.Option(min=0, max=3600, help="Seconds before each, without a record.")]
Timeout = Annotated[float, typer.Option(min=0.01, max=3600, help="Seconds after which a request counts as not answered.")]
Header = Annotated[
    list[str] | None, typer.Option(metavar="NAME: VALUE", help="A header of each request; may be given several times.")
]
Ca = Annotated[Path | None, typer.Option(help="File with the certificates to trust; by default, those of the system.")]

# what is reported
Pid = Annotated[int | None, typer.Option(min=1, max=1 << 30, help="Process of the server here: also report its CPU time.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the report to FILE; - prints the report only.")
]
Plot = Annotated[Path | None, typer.Option(help="Draw latencies into a PNG, SVG or PDF file (needs matplotlib).")]

_MOST_RATE = 1e7


def chosen_cases(concurrency: str | None, rate: str | None) -> list[Case]:
    """Closed loops, then open ones; by default 1 and 16 connections, and half and four fifths of what they reach.

    Raises:
        typer.BadParameter: not numbers, or a share without a closed loop.
    """
    from hps_numba.cli._serve_load.load import Case

    if concurrency is None and rate is None:
        concurrency, rate = "1,16", "50%,80%"
    closed = [] if concurrency is None else whole_numbers("--concurrency", concurrency, most=4096)
    opened = [] if rate is None else [_rate(word.strip()) for word in rate.split(",")]
    if not closed and any(case.share for case in opened):
        raise typer.BadParameter("expected --concurrency too, of which % takes a share", param_hint="--rate")
    return [*(Case(concurrency=number) for number in closed), *opened]


def _rate(word: str) -> Case:
    from hps_numba.cli._serve_load.load import Case

    text, percent = (word[:-1], True) if word.endswith("%") else (word, False)
    try:
        value = float(text) if text.isascii() and len(text) < 20 else 0.0
    except ValueError:
        value = 0.0
    if not 0.001 <= value <= (1000 if percent else _MOST_RATE):
        raise typer.BadParameter(f"expected requests a second such as 500,1000 or 50%, got {word!r}", param_hint="--rate")
    return Case(share=value / 100) if percent else Case(rate=value)


def chosen_headers(given: Sequence[str] | None) -> dict[str, str]:
    """``NAME: VALUE`` -> headers.

    Raises:
        typer.BadParameter: one is no header.
    """
    headers = {}
    for text in given or ():
        name, colon, value = text.partition(":")
        name = name.strip()
        token = bool(name) and name.isascii() and all(letter.isalnum() or letter in "-_" for letter in name)
        if not colon or not token or not value.isascii() or not value.strip().isprintable():
            raise typer.BadParameter("expected NAME: VALUE in printable ASCII", param_hint="--header")
        headers[name] = value.strip()
    return headers


def chosen_keys(text: str) -> tuple[int, ...]:
    """``32,8192`` -> numbers of keys."""
    return whole_numbers("--keys", text, most=1 << 26)


def one_of(option: str, given: str, *known: str) -> str:
    """``given`` in lower case.

    Raises:
        typer.BadParameter: it is not one of ``known``.
    """
    if given.lower() not in known:
        raise typer.BadParameter(f"expected one of {', '.join(known)}, got {given!r}", param_hint=option)
    return given.lower()
