"""Shared by all device benchmarks: options, progress, tables of microseconds and ratios, independent sections."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import Machine, machine_of

sys.path.append(str(Path(__file__).parents[1] / "host"))
from report import finish, print_machine, print_table, verdict

__all__ = ["Run", "compact", "dims_option", "median", "parser_of", "print_table", "ratio_cells", "ratios", "verdict"]

Times = Mapping[str, Mapping[int, float]]  # candidate -> batch size -> microseconds


def parser_of(description: str, dims: Sequence[int]) -> argparse.ArgumentParser:
    """The options of all device benchmarks, with ``dims`` as the default of ``--dims``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the machine and the results to this file")
    parser.add_argument("--dims", type=dims_option, default=list(dims), metavar="N,N", help="widths to measure")
    parser.add_argument("--on-cpu", action="store_true", help="tiny sizes on the CPU backend: shows that the program runs")
    return parser


def dims_option(text: str) -> list[int]:
    """Parse ``16,32`` into widths; multiples of 4, because the plain gather copies 16 bytes at a time."""
    try:
        dims = [int(part) for part in text.split(",")]
    except ValueError:
        dims = []
    if not dims or any(dim < 4 or dim % 4 for dim in dims):
        raise argparse.ArgumentTypeError(f"expected multiples of 4 such as 16,32,128, got {text!r}")
    return dims


class Run:
    """One run of a benchmark: its machine, its figures so far, and its failed sections."""

    def __init__(self, title: str, options: argparse.Namespace) -> None:
        self._options = options
        self._start = time.perf_counter()
        self.figures: dict[str, Any] = {}
        self.failed: list[str] = []
        self.machine: Machine = machine_of(on_cpu=options.on_cpu)
        print_machine(title, quick=options.on_cpu)
        self.say(self.machine.describe())

    def say(self, text: str) -> None:
        """Print a line of progress with the seconds since the start."""
        print(f"[{time.perf_counter() - self._start:6.1f} s] {text}", flush=True)

    def section(self, name: str, work: Callable[[], Any]) -> None:
        """Run ``work`` and keep its figures as ``name``; if it fails, report that and continue with the next section."""
        self.say(name)
        try:
            self.figures[name] = work()
        except Exception as problem:
            traceback.print_exc(file=sys.stdout)
            print(f"FAILED: {name}: {type(problem).__name__}: {problem}\n", flush=True)
            self.failed.append(name)
        self._save()

    def _save(self) -> None:
        """Write the file after every section, so that an aborted run leaves its figures."""
        quick = self._options.quick or self._options.on_cpu
        finish(self._options.json, quick=quick, device=self.machine.describe(), figures=self.figures, failed=self.failed)

    def end(self) -> int:
        """Report failed sections; returns the exit code."""
        self.say(f"{len(self.failed)} sections failed: {'; '.join(self.failed)}" if self.failed else "all sections done")
        return 1 if self.failed else 0


def compact(microseconds: float) -> str:
    """About three digits: ``1.84``, ``12.3``, ``281``."""
    return f"{microseconds:.{2 if microseconds < 10 else 1 if microseconds < 100 else 0}f}"


def ratios(times: Times, base: str) -> dict[str, dict[int, float]]:
    """The time of each candidate relative to that of ``base``, if both were measured."""
    return {
        name: {n: some[n] / times[base][n] for n in some if n in times[base]} for name, some in times.items() if name != base
    }


def ratio_cells(title: str, times: Times, base: str, *, note: Callable[[str, int, float], str] | None = None) -> None:
    """Print a table of microseconds and a table of ratios to ``base``; ``note`` may append text to a ratio."""
    sizes = sorted({n for some in times.values() for n in some})
    head = ["us", *(f"{n:,}" for n in sizes)]
    print_table(title, head, [[name, *_cells(some, sizes, compact)] for name, some in times.items()])
    if base in times:
        rows = []
        for name, some in ratios(times, base).items():
            marks = {n: f"{ratio:.2f}{note(name, n, ratio) if note else ''}" for n, ratio in some.items()}
            rows.append([name, *(marks.get(n, "") for n in sizes)])
        print_table(f"{title}: ratio to {base}", ["", *head[1:]], rows)


def _cells(some: Mapping[int, float], sizes: Iterable[int], show: Callable[[float], str]) -> list[str]:
    return [show(some[n]) if n in some else "" for n in sizes]


def median(times: Sequence[float]) -> float:
    """The median of some times."""
    return statistics.median(times)
