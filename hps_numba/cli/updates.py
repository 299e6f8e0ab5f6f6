"""``hps-numba updates``: serves a config and shows what its sources of online updates do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from hps_numba.cli._live import Interval, Once, Seconds, shown, ticks, until_interrupted
from hps_numba.cli._output import AsJson, console, human_rate, human_seconds, print_json
from hps_numba.cli._tiers import AllowCode, Config
from hps_numba.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hps_numba.server.update_stats import SourceStats, TableUpdates

__all__ = ["PLUGIN"]

_COLUMNS = ("source", "table", "offset", "lag", "rows/s", "freshness", "age", "skipped", "retries")
_TEXTS = 2  # of them, to the left


def updates(
    config: Config,
    interval: Interval = 1.0,
    seconds: Seconds = None,
    once: Once = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Serve a config in this process, and show what its sources of online updates do: one line a source and table.

    This is a server like any other: it loads the models, applies updates to the tiers of the config and commits them. Where
    the config names a group or a position for a server, it needs one of its own. With --json, each look is a line.
    """
    import hps_numba
    from hps_numba.config import read_config

    read = read_config(config)
    if not read.source_sections():
        raise ConfigError(f"{config}: expected a config with an update_source, got none")
    with hps_numba.HPS(config, allow_code=allow_code) as server:
        if once:
            for _ in ticks(interval, interval):
                _print_once(server.update_stats(), as_json)
            return
        with until_interrupted(), shown(None if as_json else _table) as show:
            for _ in ticks(interval, seconds):
                stats = server.update_stats()
                show([asdict(one) for one in stats] if as_json else stats)


PLUGIN = updates


def _print_once(stats: Sequence[SourceStats], as_json: bool) -> None:
    if as_json:
        print_json([asdict(one) for one in stats])
    else:
        console().print(_table(stats))


def _table(stats: Sequence[SourceStats]) -> RenderableType:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, column in enumerate(_COLUMNS):
        table.add_column(Text(column), justify="left" if number < _TEXTS else "right", overflow="fold")
    for one in stats:
        for cells in _lines(one):
            table.add_row(*map(Text, cells))
    return Group(table, *(Text(note) for one in stats for note in _notes(one)))


def _lines(one: SourceStats) -> list[tuple[str, ...]]:
    """One for each table, and one of the source if there are none."""
    if not one.tables:
        lag = _number(one.lag_messages)
        return [
            (one.name, "-", _offset(one.positions, one.type), lag, "-", "-", "-", _reasons(one.skipped), f"{one.retries:,}")
        ]
    return [(one.name, tag, *_cells(updates, one.type)) for tag, updates in sorted(one.tables.items())]


def _cells(updates: TableUpdates, kind: str) -> tuple[str, ...]:
    lag = _number(updates.lag_messages)
    if updates.lag_seconds:
        lag += f" ({human_seconds(updates.lag_seconds)})"
    return (
        _offset(updates.positions, kind),
        lag,
        human_rate(updates.rows_per_second, "").strip(),
        _seconds(updates.freshness_seconds),
        _seconds(updates.age_seconds),
        _reasons(updates.skipped),
        f"{updates.retries:,}",
    )


def _notes(one: SourceStats) -> list[str]:
    """What the lines of a source do not say."""
    notes = [] if one.running else [f"{one.name}: ended"]
    if one.lost:
        answer = f"files were loaded again {one.reloads} times" if one.reloads else "load the last snapshot"
        notes.append(f"{one.name}: at least {one.lost:,} messages were gone from the bus before they were read: {answer}")
    if one.held_rows:
        notes.append(f"{one.name}: {one.held_rows:,} rows are held until a slower tier can take them")
    others = sum(one.skipped.values()) - sum(sum(updates.skipped.values()) for updates in one.tables.values())
    if others > 0 and one.tables:
        notes.append(f"{one.name}: {others:,} messages of other tables were skipped")
    if one.last_skipped:
        notes.append(f"{one.name}: skipped last: {one.last_skipped}")
    if one.last_problem:
        notes.append(
            f"{one.name}: {one.failed_reads + one.failed_commits:,} failures of the bus; last problem: {one.last_problem}"
        )
    return notes


def _offset(positions: Mapping[int | str, int], kind: str) -> str:
    """The newest; of a stream of Redis by its id, which is shorter."""
    if not positions:
        return "-"
    from hps_numba.updates._redis_streams.entries import id_of

    newest = (id_of if kind == "redis_streams" else str)(max(positions.values()))
    return newest if len(positions) == 1 else f"{newest} (of {len(positions)})"


def _number(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else human_seconds(seconds) if seconds else "0 ms"


def _reasons(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items())) or "0"
