"""The plot of the demo: latency of requests, and throughput over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hps_numba.cli._demo_traffic import KEYS_PER_SAMPLE, Round, Traffic

__all__ = ["save_plot"]

_COLOURS = ("#4c78a8", "#2a9d8f", "#e9a03b", "#c8553d")
_GREY = "#666666"
_POINTS = 40  # in the throughput curve


def save_plot(path: Path, traffic: Traffic, title: str) -> None:
    """Draw the plot and save it; raises as ``save_figure``."""
    from matplotlib.figure import Figure

    from hps_numba.simulate.plots import save_figure

    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    _draw_latencies(left, traffic.latencies)
    _draw_throughput(right, traffic.rounds)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GREY)
        axes.tick_params(colors=_GREY, which="both")
    save_figure(figure, path)


def _draw_latencies(axes: Any, latencies: dict[int, np.ndarray]) -> None:
    """A histogram for each batch size with its median, on one logarithmic axis."""
    from matplotlib.patheffects import withStroke

    pooled = np.concatenate(list(latencies.values())) * 1e6
    edges = np.geomspace(pooled.min() * 0.9, np.quantile(pooled, 0.9995) * 1.3, 90)
    for (samples, seconds), colour in zip(latencies.items(), _COLOURS, strict=True):
        micros = seconds * 1e6
        share = np.histogram(micros, edges)[0] / len(micros) * 100
        axes.stairs(share, edges, fill=True, color=colour, alpha=0.35)
        axes.stairs(share, edges, color=colour, linewidth=1.2)
        label = f"{samples:,} sample{'s' * (samples > 1)}\n{samples * KEYS_PER_SAMPLE:,} keys\np50 {_micros(np.median(micros))}"
        peak = int(share.argmax())
        where = (np.sqrt(edges[peak] * edges[peak + 1]), share[peak])
        axes.annotate(
            label, where, (0, 5), textcoords="offset points", ha="center", color=colour, fontsize=8.5,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: _micros(value))
    axes.margins(y=0.25)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.set_title("Latency of a request, by batch size", loc="left", fontsize=10)
    axes.set_ylabel("share of requests", color=_GREY)


def _draw_throughput(axes: Any, rounds: list[Round]) -> None:
    """Keys per second while lookups ran, over the time of the demo, and their mean."""
    parts = [part for part in np.array_split(np.arange(len(rounds)), min(_POINTS, len(rounds))) if len(part)]
    times = [np.mean([rounds[i].start for i in part]) for part in parts]
    rates = [sum(rounds[i].keys for i in part) / sum(rounds[i].seconds for i in part) / 1e6 for part in parts]
    mean = sum(part.keys for part in rounds) / sum(part.seconds for part in rounds) / 1e6
    axes.plot(times, rates, color=_COLOURS[0], linewidth=1.6, marker="o", markersize=3)
    axes.axhline(mean, color=_GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_ylim(0, max(rates) * 1.25)
    axes.set_xlim(left=0)
    axes.set_title(f"Throughput of all threads, mean {mean:.3g} M keys/s", loc="left", fontsize=10)
    axes.set_ylabel("million keys per second", color=_GREY)
    axes.set_xlabel("seconds", color=_GREY)


def _micros(value: float) -> str:
    return f"{value:.3g} µs" if value < 1000 else f"{value / 1000:.3g} ms"
