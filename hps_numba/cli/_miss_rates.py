"""What is known of the ways by which missed rows reach a GPU, as lines to read."""

from __future__ import annotations

from typing import Any

from hps_numba.cli._output import human_rate

__all__ = ["shown_rates"]

_WAYS = {"host": "by host threads", "both": "by both", "device": "by the GPU alone"}


def shown_rates(rates: list[dict[str, Any]]) -> list[str]:
    """A line for each of the rates of ``server.miss_rates``."""
    return [_shown(entry) for entry in rates]


def _shown(entry: dict[str, Any]) -> str:
    from hps_numba.device.host_memory import human_bytes

    table = f"a table of about {entry['table_gib']} GiB" + " or more" * (entry["table_gib"] == 16)
    shape = f"{entry['min_keys']:,} to {entry['max_keys']:,} keys, rows of {human_bytes(entry['row_bytes'])}, {table}"
    ways = ", ".join(f"{human_rate(rate, 'rows/s')} {_WAYS[way]}" for way, rate in entry["rows_per_second"].items())
    chosen = "each is still tried" if entry["chosen"] is None else f"chosen: {_WAYS[entry['chosen']]}"
    return f"{entry['gpu']}: {shape}: {ways}; {chosen}"
