"""What is known of the ways by which missed rows reach a GPU, for reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hps_numba.cli._output import human_rate
from hps_numba.device.host_memory import human_bytes

if TYPE_CHECKING:
    from hps_numba.cache.kept_rates import RateKey
    from hps_numba.cache.shares import Learned

__all__ = ["rates_of", "shown_rates"]

_WAYS = {"host": "by host threads", "both": "by both", "device": "by the GPU alone"}


def rates_of(known: Mapping[RateKey, Learned]) -> list[dict[str, Any]]:
    """A dict for each device and shape of batches, ready for JSON.

    ``rows_per_second`` has the ways that were measured; ``chosen`` is the way that lookups take, None while each is tried;
    ``host_share`` the share of the host when both bring rows.
    """
    rows = []
    for key, learned in sorted(known.items()):
        if learned.costs:
            rows.append(
                {
                    "gpu": key.gpu,
                    "driver": key.driver,
                    "machine": key.machine,
                    "version": key.version,
                    "row_bytes": key.row_bytes,
                    "table_gib": key.span_gib,
                    "min_keys": 1 << (key.key_bits - 1),
                    "max_keys": (1 << key.key_bits) - 1,
                    "rows_per_second": {way: 1e9 / cost for way, cost in learned.costs.items()},
                    "chosen": learned.best,
                    "host_share": learned.share,
                }
            )
    return rows


def shown_rates(rates: list[dict[str, Any]]) -> list[str]:
    """A line for each of ``rates_of``."""
    return [_shown(entry) for entry in rates]


def _shown(entry: dict[str, Any]) -> str:
    table = f"a table of about {entry['table_gib']} GiB" + " or more" * (entry["table_gib"] == 16)
    shape = f"{entry['min_keys']:,} to {entry['max_keys']:,} keys, rows of {human_bytes(entry['row_bytes'])}, {table}"
    ways = ", ".join(f"{human_rate(rate, 'rows/s')} {_WAYS[way]}" for way, rate in entry["rows_per_second"].items())
    chosen = "each is still tried" if entry["chosen"] is None else f"chosen: {_WAYS[entry['chosen']]}"
    return f"{entry['gpu']}: {shape}: {ways}; {chosen}"
