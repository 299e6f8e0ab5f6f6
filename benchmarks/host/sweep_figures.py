"""What the published sweeps on the CPU and on a GPU share: sizes, published times, clocks, tables and plots.

The sweep is that of HugeCTR's DLRM benchmark: batches of 32 to 131,072 samples with 26 keys each in rows of 128 floats; HugeCTR
published hits only, as the same batch was sent again and again (checklist O14). Here every call has another batch, of which a
given share of the keys is in the fast tier.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from report import print_table, verdict

__all__ = [
    "BATCHES", "DENSE", "HIT_RATES", "SLOTS", "SMALL", "WIDTH", "Dlrm", "Figure", "Sweep", "plot", "quick_of", "show", "timed",
    "updating",
]  # fmt: skip

BATCHES = (32, 64, 256, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
SMALL = (32, 64)  # of which the framework's own lookup must not be faster
HIT_RATES = (100.0, 95.0, 80.0)
SLOTS, WIDTH, DENSE = 26, 128, 13
#: microseconds that HugeCTR published for the whole DLRM on an A100 and two EPYC 7742: TensorFlow alone, and with HPS
PUBLISHED = {
    "TensorFlow, published": (551, 608, 832, 1911, 4580, 9872, 19_643, 35_292, 54_090, 107_742, 213_990),
    "TensorFlow and HPS, published": (612, 667, 639, 849, 1059, 1459, 2490, 4131, 7795, 15_036, 29_374),
}
_WARMUPS, _FEWEST, _MOST = 2, 5, 300
_TICK = 0.01  # seconds between two batches of updates

Call = Callable[[int], Any]


@dataclass(frozen=True)
class Sweep:
    """How much is measured.

    Attributes:
        rows: of the table, of which ``fast`` are in the fast tier.
        seconds: for each candidate, batch and hit rate.
        update_rate: rows written a second, where updates run beside.
    """

    rows: int = 1 << 20
    fast: int = 1 << 19
    slots: int = SLOTS
    dim: int = WIDTH
    batches: tuple[int, ...] = BATCHES
    hit_rates: tuple[float, ...] = HIT_RATES
    seconds: float = 1.0
    update_rate: int = 100_000
    different: int = 8

    def numbers(self, rng: np.random.Generator, batch: int, hit_rate: float) -> np.ndarray:
        """Row numbers of a batch, int64 ``[batch * slots]``: so many per cent of them below ``fast``, in random order."""
        n = batch * self.slots
        slow = round(n * (100.0 - hit_rate) / 100.0)
        found = np.concatenate([rng.integers(0, self.fast, n - slow), rng.integers(self.fast, self.rows, slow)])
        rng.shuffle(found)
        return found


def quick_of(sweep: Sweep) -> Sweep:
    """Tiny sizes."""
    return Sweep(
        rows=2000, fast=1000, slots=3, dim=sweep.dim, batches=(32, 64), seconds=0.02, update_rate=2000, different=3
    )  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """Microseconds of one candidate.

    Attributes:
        hits: per cent of the keys that were in the fast tier, as counted by the server; None if it does not count.
    """

    who: str
    batch: int
    hit_rate: float
    updates: bool
    median: float
    p99: float
    hits: float | None = None


def timed(
    calls: Mapping[str, Call], seconds: float, wait: Callable[[], None], prepare: Callable[[int], None] | None = None
) -> dict[str, tuple[float, float]]:
    """Median and p99 in microseconds, by the clock of the host from an idle device to an idle device.

    Candidates take turns, so that what else the machine does falls on all of them. Each call has a number of its own.

    Args:
        prepare: called with that number before the call, outside of its time.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, number, turn = list(calls), 0, -_WARMUPS
    end = time.perf_counter() + seconds * len(calls)
    while turn < _FEWEST or (time.perf_counter() < end and turn < _MOST):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if prepare is not None:
                prepare(number)
            wait()
            began = time.perf_counter()
            calls[name](number)
            wait()
            taken = (time.perf_counter() - began) * 1e6
            number += 1
            if turn >= 0:
                times[name].append(taken)
        turn += 1
    return {name: (statistics.median(some), float(np.percentile(some, 99))) for name, some in times.items()}


@contextmanager
def updating(update: Callable[[np.ndarray], None], sweep: Sweep) -> Iterator[None]:
    """A thread that calls ``update`` with the numbers of random rows, ``update_rate`` rows a second.

    They are rows of the fast tier: others would come into it, and the share of hits would grow.
    """
    stop, problems = Event(), []

    def work() -> None:
        rng = np.random.default_rng(5)
        try:
            while not stop.wait(_TICK):
                update(rng.integers(0, sweep.fast, max(1, round(sweep.update_rate * _TICK))))
        except Exception as problem:
            problems.append(problem)

    thread = Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if problems:
        raise problems[0]


class Dlrm(torch.nn.Module):
    """The dense part of DLRM: bottom MLP 512-256-128, products of all pairs of vectors, top MLP 1024-1024-512-256-1."""

    def __init__(self, slots: int, dim: int) -> None:
        super().__init__()
        self.bottom = self._layers((DENSE, 512, 256, dim))
        pairs = torch.combinations(torch.arange(slots + 1)).T
        self.register_buffer("pairs", pairs)
        self.top = self._layers((dim + pairs.shape[1], 1024, 1024, 512, 256, 1))

    @staticmethod
    def _layers(widths: Sequence[int]) -> torch.nn.Sequential:
        parts: list[torch.nn.Module] = []
        for before, after in pairwise(widths):
            parts += [torch.nn.Linear(before, after), torch.nn.ReLU()]
        return torch.nn.Sequential(*parts[:-1])

    def forward(self, dense: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Scores ``[batch, 1]`` of dense features ``[batch, 13]`` and rows ``[batch, slots, dim]``."""
        first = self.bottom(dense)
        vectors = torch.cat([first[:, None], rows], 1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))
        return torch.sigmoid(self.top(torch.cat([first, products[:, self.pairs[0], self.pairs[1]]], 1)))


# -- results ---------------------------------------------------------------------


def show(title: str, figures: Sequence[Figure], pairs: Mapping[str, str]) -> list[dict[str, Any]]:
    """Print a table for each hit rate, with and without updates, and the verdicts on small batches.

    Args:
        pairs: our candidate -> the framework's own lookup that it stands beside; a ratio below 1 is in our favour.

    Returns:
        The verdicts.
    """
    verdicts = []
    for hit_rate, updates in sorted({(one.hit_rate, one.updates) for one in figures}, key=lambda one: (one[1], -one[0])):
        some = {(one.who, one.batch): one for one in figures if (one.hit_rate, one.updates) == (hit_rate, updates)}
        whos = list(dict.fromkeys(who for who, _ in some))
        rows, beside = [], {ours: theirs for ours, theirs in pairs.items() if {ours, theirs} <= set(whos)}
        for batch in sorted({batch for _, batch in some}):
            found = {who: some[who, batch] for who in whos if (who, batch) in some}
            ratios = []
            for ours, theirs in beside.items():
                ratio = found[ours].median / found[theirs].median if ours in found and theirs in found else None
                judged = ""
                if ratio is not None and batch in SMALL and hit_rate == 100 and not updates:
                    judged = f" {verdict(ratio, at_most=1.0)}"
                    verdicts.append({"batch": batch, "ours": ours, "theirs": theirs, "ratio": ratio, "target": judged.strip()})
                ratios.append("" if ratio is None else f"{ratio:.2f}{judged}")
            hits = [f"{one.hits:.1f}" for one in found.values() if one.hits is not None]
            cells = [f"{found[who].median:,.0f} ({found[who].p99:,.0f})" if who in found else "" for who in whos]
            rows.append([f"{batch:,}", *cells, hits[0] if hits else "", *ratios])
        head = ["batch", *whos, "hits %", *(f"{ours} / {theirs}" for ours, theirs in beside.items())]
        with_updates = "beside updates" if updates else "no updates"
        print_table(f"{title}: {hit_rate:g} % hits, {with_updates}, us of a batch, median (p99)", head, rows)
    return verdicts


def plot(path: Path, title: str, figures: Sequence[Figure], *, published: bool) -> None:
    """Draw a panel for each hit rate: microseconds over batch size; dashed beside updates."""
    from matplotlib.figure import Figure as Drawing

    rates = sorted({one.hit_rate for one in figures}, reverse=True)
    drawing = Drawing(figsize=(5.2 * len(rates), 4.6), dpi=140, layout="constrained")
    drawing.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    whos = list(dict.fromkeys(one.who for one in figures))
    for axes, rate in zip(np.atleast_1d(drawing.subplots(1, len(rates), sharey=True)), rates, strict=True):
        for number, who in enumerate(whos):
            for updates in (False, True):
                line = sorted(
                    (one.batch, one.median) for one in figures if (one.who, one.hit_rate, one.updates) == (who, rate, updates)
                )
                if line:
                    label = f"{who}, updates" if updates else who
                    axes.plot(
                        *zip(*line, strict=True),
                        "--" if updates else "-",
                        color=f"C{number}",
                        marker="o",
                        markersize=3,
                        label=label,
                    )
        for name, times in PUBLISHED.items() if published and rate == 100 else ():
            axes.plot(BATCHES, times, ":", color="#888888", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(f"{rate:g} % hits", loc="left", fontsize=10)
        axes.set_xlabel("samples in a batch")
        axes.legend(frameon=False, fontsize=7)
    drawing.axes[0].set_ylabel("microseconds")
    drawing.savefig(path)
