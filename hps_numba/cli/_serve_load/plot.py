"""The plot of a benchmark of a server: latency by percentile, and by the rate of requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["save_plot"]

_GREY = "#666666"


def save_plot(path: Path, report: dict[str, Any]) -> None:
    """Draw the plot and save it; raises as ``save_figure``."""
    from matplotlib.figure import Figure

    from hps_numba.simulate.plots import save_figure

    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"{report['url']}, model {report['model']}", x=0.01, ha="left", fontsize=11, fontweight="bold")
    _draw_curves(left, report["results"])
    _draw_rates(right, report["results"])
    for axes in (left, right):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylabel("milliseconds", color=_GREY)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GREY)
        axes.tick_params(colors=_GREY, which="both")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _draw_curves(axes: Any, results: list[dict[str, Any]]) -> None:
    """Latency over percentile: each tenth of the requests that are left takes as much room as the nine before."""
    for line in results:
        if not line["curve"]:
            continue
        shares, seconds = np.array(line["curve"]).T
        load = f"{line['concurrency']} closed" if line["loop"] == "closed" else f"{line['rate']:,.5g}/s"
        axes.plot(-np.log10(1 - shares / 100), seconds * 1e3, linewidth=1.5, label=f"{line['keys']:,} keys, {load}")
    marks = {"0": 0.0, "50": 50.0, "90": 90.0, "99": 99.0, "99.9": 99.9, "99.99": 99.99}
    axes.set_xticks([-np.log10(1 - share / 100) for share in marks.values()], marks)
    axes.set_xlabel("percentile of requests", color=_GREY)
    axes.set_title("Latency by percentile", loc="left", fontsize=10)


def _draw_rates(axes: Any, results: list[dict[str, Any]]) -> None:
    for keys in dict.fromkeys(line["keys"] for line in results):
        opened = [line for line in results if line["keys"] == keys and line["loop"] == "open" and line["curve"]]
        opened.sort(key=lambda line: line["rate"])
        for name, style in (("p50", "-"), ("p99", "--")):
            times = [line[f"{name}_seconds"] * 1e3 for line in opened]
            if times:
                axes.plot(
                    [line["rate"] for line in opened], times, style, marker="o", markersize=3, label=f"{keys:,} keys, {name}"
                )
    axes.set_xlabel("requests a second that were due", color=_GREY)
    axes.set_title("Latency by rate, open loop", loc="left", fontsize=10)
