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

# what is simulated
TraceFile = Annotated[Path, typer.Argument(help="Keys in the order of their requests: .npy, .csv, .parquet, ...")]
FormatName = Annotated[
    str | None, typer.Option("--format", help="npy, csv, parquet, oracle_general or text; by default, the file name decides.")
]
Column = Annotated[
    str | None, typer.Option(help="Column of a CSV or Parquet file: its name or, for CSV, its number, counted from 0.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Read only this many requests, from the beginning.")]
Sample = Annotated[float, typer.Option(help="Simulate this share of the keys and estimate the rest, for large traces.")]
Policies = Annotated[
    list[str] | None,
    typer.Option("--policy", help="Names, file.py:NAME or module:NAME, separated by commas. By default, the usual ones."),
]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Permit a policy to be Python code of yours, which is run.")]

# how it is simulated
Sizes = Annotated[
    list[str] | None,
    typer.Option("--size", help="Cache sizes: 10000, 10k, 5% (of the keys), 1%:20%:5 (a range of 5), separated by commas."),
]
Geometry = Annotated[str, typer.Option(help="gpu (sets and calls as in the GPU cache), associative, or both.")]
Batch = Annotated[int, typer.Option(min=1, help="Keys in a call.")]
Warmup = Annotated[
    float | None, typer.Option(help="Requests that are not counted: a share or a number. By default 0; with --advise, 0.2.")
]
NoBounds = Annotated[bool, typer.Option("--no-bounds", help="Leave out Belady's optimum and the infinite cache.")]
Dim = Annotated[int, typer.Option(min=1, help="Elements in a row, for sizes in bytes.")]
RowDtype = Annotated[str, typer.Option(help="Type of stored rows: float32, float16, bfloat16, int8, float8_e4m3.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Caches simulated at a time; by default, one per core.")]

# advice
Advise = Annotated[bool, typer.Option("--advise", help="Find the policy and size for a hit rate with the least GPU memory.")]
TargetHitRate = Annotated[float | None, typer.Option(help="Hit rate for --advise, by default 0.95.")]

# results
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write all results to FILE; - prints the JSON only.")
]
CsvFile = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Also write a CSV line for each run to FILE.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Also plot to FILE: .png, .svg or .pdf.")]
HtmlFile = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Also write a page with plots and tables to FILE.")
]


def words_of(given: list[str] | None) -> list[str]:
    """Values of an option that may be repeated, and may hold several values separated by commas."""
    return [word.strip() for text in given or [] for word in text.split(",") if word.strip()]
