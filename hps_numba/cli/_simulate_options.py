"""The options of ``hps-numba simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Advise",
    "AllowCode",
    "Batch",
    "Column",
    "CsvFile",
    "Dim",
    "FormatName",
    "Geometry",
    "HtmlFile",
    "JsonFile",
    "Limit",
    "NoBounds",
    "Plot",
    "Policies",
    "RowDtype",
    "Sample",
    "Sizes",
    "TargetHitRate",
    "Threads",
    "TraceFile",
    "Warmup",
    "words_of",
]

# what
TraceFile = Annotated[Path, typer.Argument(help="Keys in the order in which they were asked for: .npy, .csv, .parquet, ...")]
FormatName = Annotated[
    str | None, typer.Option("--format", help="npy, csv, parquet, oracle_general or text; by default by the ending.")
]
Column = Annotated[str | None, typer.Option(help="Of a CSV or Parquet file: name, or for CSV a number from 0.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many requests, from the beginning.")]
Sample = Annotated[float, typer.Option(help="Simulate this share of the keys and estimate, for huge traces.")]
Policies = Annotated[
    list[str] | None,
    typer.Option("--policy", help="Names, file.py:NAME or module:NAME; several with commas. By default the usual ones."),
]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="A policy may be a Python file to run.")]

# how
Sizes = Annotated[
    list[str] | None,
    typer.Option("--size", help="Of the cache: 10000, 10k, 5% (of the keys), 1%:20%:5 (a range of 5); several with commas."),
]
Geometry = Annotated[str, typer.Option(help="gpu (sets and calls as on a GPU), associative, or both.")]
Batch = Annotated[int, typer.Option(min=1, help="Keys in a call.")]
Warmup = Annotated[
    float | None, typer.Option(help="Requests that do not count: a share, or a number. By default 0, with --advise 0.2.")
]
NoBounds = Annotated[bool, typer.Option("--no-bounds", help="Without Belady's optimum and the infinite cache.")]
Dim = Annotated[int, typer.Option(min=1, help="Elements of a row, for what is counted in bytes.")]
RowDtype = Annotated[str, typer.Option(help="How the cache stores a row: float32, float16, bfloat16, int8, float8_e4m3.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Caches simulated at a time; by default one a core.")]

# advice
Advise = Annotated[bool, typer.Option("--advise", help="Say which policy and size reach a hit rate at the least GPU memory.")]
TargetHitRate = Annotated[float | None, typer.Option(help="The hit rate for --advise, by default 0.95.")]

# results
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write all results there; - prints them and nothing else.")
]
CsvFile = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Also write a line a run there.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw: .png, .svg or .pdf.")]
HtmlFile = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write one page with pictures and tables.")]


def words_of(given: list[str] | None) -> list[str]:
    """Values of an option that may come several times and hold several with commas."""
    return [word.strip() for text in given or [] for word in text.split(",") if word.strip()]
