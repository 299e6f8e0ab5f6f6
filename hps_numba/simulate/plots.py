"""Plots of a simulation: hit rate by cache size, hit rate over time, popularity of keys over time. Needs matplotlib."""

from __future__ import annotations

import io
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hps_numba.config.arguments import as_count
from hps_numba.config.messages import show
from hps_numba.errors import ConfigError, HpsError
from hps_numba.runtime.paths import checked_path
from hps_numba.runtime.replacing import Judge, check_target, file_judge, replace_file
from hps_numba.simulate.results import Run, Simulation

__all__ = ["GEOMETRY_NAMES", "check_matplotlib", "check_plot", "figures", "save_figure", "to_svg", "write_plot"]

_STARTS = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml ", ".pdf": b"%PDF-"}
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d1f", "#56b4e9", "#7a4bb7", "#3c3c3c", "#b22222", "#5f8f2f")
_MARKS = "osD^vPX*<>"
_GREY, _PALE = "#555555", "#9a9a9a"
GEOMETRY_NAMES = {"gpu": "GPU sets", "associative": "associative"}
_LINES: dict[str, Any] = {"gpu": "-", "associative": (0, (3, 2))}


def check_matplotlib() -> None:
    """
    Raises:
        HpsError: it is not installed.
    """
    if find_spec("matplotlib") is None:
        raise HpsError('plots need matplotlib: pip install "hps-numba[plot]"')


def check_plot(path: str | os.PathLike[str]) -> Path:
    """``path``; raises, before any work is done, if a plot could not be saved there.

    Raises:
        HpsError: matplotlib is missing.   ConfigError: not a path, an unknown ending, no such directory, or there is something
            else than a picture of this kind.
    """
    check_matplotlib()
    place = checked_path(path, "plot", error=ConfigError)
    if place.suffix.lower() not in _STARTS:
        raise ConfigError(f"plot: expected a file name that ends in {', '.join(_STARTS)}, got {place}")
    if not place.absolute().parent.is_dir():
        raise ConfigError(f"plot: expected a file in an existing directory, got {place}")
    target = Path(os.path.realpath(place))
    check_target(place, target, True, _judge(place), ConfigError)
    return place


def _judge(path: Path) -> Judge:
    ending = path.suffix.lower()
    return file_judge(f"a {ending} picture", lambda head: head.startswith(_STARTS[ending]))


def save_figure(figure: Any, path: Path) -> None:
    """Save a matplotlib figure at a path that ``check_plot`` has checked; only a picture of the same kind is replaced.

    Raises:
        ConfigError: there is something else, or it cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower())
    replace_file(path, content.getvalue(), _judge(path), error=ConfigError)


def write_plot(simulation: Simulation, path: str | os.PathLike[str], *, rows: int | None = None) -> None:
    """Draw all plots into one PNG, SVG or PDF file.

    Args:
        rows: cache size of the plot over time; by default the middle one.

    Raises:
        As ``check_plot``; ConfigError if no cache of this size was simulated.
    """
    place = check_plot(path)
    _runs_of_size(simulation, rows)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 12.5), dpi=130, layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, height_ratios=(5, 3.4, 3))
    figure.suptitle(_title(simulation), x=0.01, ha="left", fontsize=12, fontweight="bold")
    _draw_curves(top, simulation)
    _draw_over_time(middle, simulation, rows)
    _draw_heat(bottom, simulation)
    save_figure(figure, place)


def figures(simulation: Simulation, rows: int | None = None) -> dict[str, Any]:
    """The plots as separate matplotlib figures: ``curves``, ``time`` and ``heat``."""
    check_matplotlib()
    _runs_of_size(simulation, rows)
    from matplotlib.figure import Figure

    drawn: dict[str, Any] = {}
    for name, height in (("curves", 5.2), ("time", 3.8), ("heat", 3.4)):
        figure = drawn[name] = Figure(figsize=(11, height), layout="constrained")
        axes = figure.subplots()
        if name == "curves":
            _draw_curves(axes, simulation)
        elif name == "time":
            _draw_over_time(axes, simulation, rows)
        else:
            _draw_heat(axes, simulation)
    return drawn


def to_svg(figure: Any) -> str:
    """A figure as an ``<svg>`` element, reproducible from run to run."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "hps-numba", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _title(simulation: Simulation) -> str:
    sampled = "" if simulation.rate == 1 else f", estimated from {simulation.rate:.3g} of the keys"
    return f"{simulation.trace}: {simulation.requests:,} requests for {simulation.distinct:,} keys{sampled}"


def _styles(simulation: Simulation) -> dict[str, tuple[str, str]]:
    """Colour and mark of each policy."""
    names = dict.fromkeys(run.policy for run in simulation.runs if not run.bound)
    return {name: (_COLOURS[i % len(_COLOURS)], _MARKS[i % len(_MARKS)]) for i, name in enumerate(names)}


def _draw_curves(axes: Any, simulation: Simulation) -> None:
    """Hit rate by cache size; estimates have a band for their 95 % interval."""
    styles = _styles(simulation)
    for (policy, geometry), runs in simulation.curves().items():
        rows, rates = [run.rows for run in runs], [100 * run.hit_rate for run in runs]
        if policy == "infinite":
            axes.axhline(rates[-1], color=_PALE, linewidth=1.1, linestyle=(0, (1, 2)), label="infinite cache (ceiling)")
            continue
        if runs[0].bound:
            axes.plot(rows, rates, color=_PALE, linewidth=1.6, linestyle=(0, (5, 2, 1, 2)), label=f"{policy} (optimum)")
            continue
        colour, mark = styles[policy]
        label = f"{policy}, {GEOMETRY_NAMES[geometry]}"
        marks = {"marker": mark, "markersize": 4.5, "markerfacecolor": colour if geometry == "gpu" else "white"}
        axes.plot(rows, rates, color=colour, linewidth=1.6, linestyle=_LINES[geometry], label=label, **marks)
        if any(run.error for run in runs):
            errors = [100 * run.error for run in runs]
            axes.fill_between(rows, np.subtract(rates, errors), np.add(rates, errors), color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_ylim(0, 100)
    axes.yaxis.set_major_formatter("{x:g} %")
    sizes = _spread(simulation.sizes)
    axes.set_xticks(sizes, [_rows(size) for size in sizes])
    axes.set_xticks([], minor=True)
    top = axes.secondary_xaxis("top")
    top.set_xticks(sizes, [_percent(size / simulation.distinct) for size in sizes])
    top.set_xticks([], minor=True)
    top.tick_params(colors=_GREY, labelsize=8)
    top.spines["top"].set_visible(False)
    top.set_xlabel("cache size, share of the distinct keys", color=_GREY, fontsize=8.5)
    batches = f"GPU sets: calls of {simulation.batch:,} keys" if simulation.select(geometry="gpu") else ""
    warm = f"first {simulation.warmup:,} requests not counted" if simulation.warmup else "cold start counted"
    note = "; ".join(filter(None, [batches, warm]))
    _finish(axes, "Hit rate by cache size", "cache size, rows", "hit rate, share of requests", note)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def _spread(sizes: list[int], max_ticks: int = 9) -> list[int]:
    """At most ``max_ticks`` of the sizes, evenly spaced on a logarithmic axis, with the first and the last."""
    if len(sizes) < 2:
        return sizes
    ticks = np.geomspace(sizes[0], sizes[-1], min(len(sizes), max_ticks))
    return sorted({min(sizes, key=lambda size: abs(np.log(size / tick))) for tick in ticks})


def _runs_of_size(simulation: Simulation, rows: int | None) -> tuple[int, list[Run]]:
    """The runs of one cache size, by default the middle one."""
    if not isinstance(simulation, Simulation):
        raise ConfigError(f"simulation: expected what simulate.run returned, got {show(simulation)}")
    sizes = simulation.sizes
    if not sizes:
        raise ConfigError("nothing to draw: only the infinite cache was simulated")
    rows = sizes[len(sizes) // 2] if rows is None else as_count(rows, "rows")
    if rows not in sizes:
        raise ConfigError(f"rows: expected a simulated size, one of {', '.join(f'{size:,}' for size in sizes)}, got {rows:,}")
    return rows, [run for run in simulation.runs if run.rows == rows and run.policy != "infinite"]


def _draw_over_time(axes: Any, simulation: Simulation, rows: int | None) -> None:
    size, runs = _runs_of_size(simulation, rows)
    styles = _styles(simulation)
    edges = _edges(simulation)
    for run in runs:
        rates = 100 * run.by_window / simulation.windows
        colour = _PALE if run.bound else styles[run.policy][0]
        style: Any = (0, (5, 2, 1, 2)) if run.bound else _LINES[run.geometry]
        label = f"{run.policy} (optimum)" if run.bound else f"{run.policy}, {GEOMETRY_NAMES[run.geometry]}"
        axes.plot((edges[:-1] + edges[1:]) / 2, rates, color=colour, linewidth=1.4, linestyle=style, label=label)
    if simulation.warmup:
        axes.axvspan(0, simulation.warmup, color="#000000", alpha=0.06, linewidth=0)
        axes.text(simulation.warmup, 2, " warm-up ends", color=_GREY, fontsize=8)
    axes.set_ylim(0, 100)
    axes.set_xlim(0, simulation.requests)
    axes.xaxis.set_major_formatter(lambda value, _: _rows(value))
    axes.yaxis.set_major_formatter("{x:g} %")
    note = f"in windows of {round(edges[1] - edges[0]):,} requests"
    if simulation.rate < 1:
        note += ", sampled keys only"
    _finish(axes, f"Hit rate over time, cache of {size:,} rows", "requests so far", "hit rate, share of requests", note)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def _draw_heat(axes: Any, simulation: Simulation) -> None:
    """Popularity of keys over time: a row of one colour means that its keys are equally popular all the time."""
    from matplotlib.colors import TwoSlopeNorm

    heat = np.clip(simulation.heat, 0, 3)
    groups = len(heat)
    edges = _edges(simulation)
    mesh = axes.pcolormesh(edges, np.arange(groups + 1), heat, cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, 3.0), rasterized=True)
    last = np.cumsum(simulation.group_keys)
    parts = zip(simulation.group_keys, last)
    labels = [f"{stop - n + 1:,} to {stop:,}" if n > 1 else f"{stop:,}" for n, stop in parts]
    axes.set_yticks(np.arange(groups) + 0.5, labels, fontsize=7.5)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: _rows(value))
    bar = axes.figure.colorbar(mesh, cax=axes.inset_axes((1.015, 0, 0.014, 1)), ticks=[0, 0.5, 1, 2, 3])
    bar.ax.set_yticklabels(["none", "half", "average", "twice", "3 times +"], fontsize=7.5)
    bar.outline.set_visible(False)
    ranks = "keys by popularity" if simulation.rate == 1 else "sampled keys by popularity"
    _finish(axes, "Popularity of keys over time", "requests so far", ranks, "", grid=False)
    axes.set_title("share of the requests of a window, relative to the whole trace", loc="right", fontsize=8.5, color=_GREY)


def _edges(simulation: Simulation) -> np.ndarray:
    """Boundaries of the windows, in requests of the whole trace."""
    counts = np.concatenate([[0], np.cumsum(simulation.windows)])
    return counts * (simulation.requests / max(1, simulation.simulated))


def _finish(axes: Any, title: str, x: str, y: str, note: str, *, grid: bool = True) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    if note:
        axes.annotate(
            note, (1, 0), (-4, 4), xycoords="axes fraction", textcoords="offset points", ha="right", fontsize=8, color=_GREY
        )
    axes.set_xlabel(x, color=_GREY, fontsize=9)
    axes.set_ylabel(y, color=_GREY, fontsize=9)
    axes.tick_params(colors=_GREY, which="both", labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_PALE)
    if grid:
        axes.grid(axis="y", color="#000000", alpha=0.09, linewidth=0.8)
        axes.set_axisbelow(True)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def _rows(value: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g}"
