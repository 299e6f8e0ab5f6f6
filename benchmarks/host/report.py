"""Shared by all host benchmarks: options, the description of the machine, printed tables, the JSON file."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["TABLES", "add_options", "cache_bytes", "child_environment", "finish", "print_machine", "print_table", "verdict"]

ROOT = Path(__file__).parents[2]
TABLES: list[dict[str, Any]] = []
"""What ``print_table`` printed, for benchmarks whose JSON file holds the tables as they are."""


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--quick`` and ``--json``, the options of every benchmark."""
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs; the figures are meaningless")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the machine and the results to this file")
    return parser


def child_environment(**more: str) -> dict[str, str]:
    """The environment for child processes: they import this checkout."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **more}


def machine() -> dict[str, Any]:
    """CPU, cores, caches, memory, huge pages, versions, and the load average of the last minute."""
    return {
        "cpu": _line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "l3": _read("/sys/devices/system/cpu/cpu0/cache/index3/size") or "unknown",
        "ram": _line("/proc/meminfo", "MemTotal") or "unknown",
        "transparent_hugepage": _read("/sys/kernel/mm/transparent_hugepage/enabled") or "unknown",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("numpy", "numba", "torch")},
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else "unknown",
        "system": f"{platform.system()} {platform.release()}",
    }


def cache_bytes() -> int | None:
    """Bytes of the last-level cache; None if the system does not tell."""
    text = _read("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(text[:-1]) << 10 if text[:-1].isdigit() and text.endswith("K") else None


def print_machine(title: str, *, quick: bool) -> None:
    print(title + ("   (--quick: the sizes are too small for conclusions)" if quick else ""))
    print("; ".join(f"{name} {value}" for name, value in machine().items()), end="\n\n")


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is left-aligned."""
    TABLES.append({"title": title, "head": list(head), "rows": [list(row) for row in rows]})
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(title)
    for row in [head, ["-" * width for width in widths], *rows]:
        first, *others = zip(row, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip())
    print(flush=True)


def verdict(value: float, *, at_least: float | None = None, at_most: float | None = None) -> str:
    """``met`` or ``missed``, with the target."""
    if at_least is not None:
        return f"{'met' if value >= at_least else 'missed'} (>= {at_least:g})"
    assert at_most is not None
    return f"{'met' if value <= at_most else 'missed'} (<= {at_most:g})"


def finish(path: Path | None, *, quick: bool, **results: Any) -> None:
    """Write the machine and the results to ``path``, if it is given."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "quick": quick, **results}, indent=2) + "\n")


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text().strip() if file.exists() else ""


def _line(path: str, name: str) -> str:
    found = (line.split(":", 1)[1].strip() for line in _read(path).splitlines() if line.startswith(name))
    return next(found, "")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
