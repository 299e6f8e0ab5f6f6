"""What is known of the ways by which missed rows reach a GPU, for reports: of this process, and of all before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hps_numba.cache.kept_rates import RateKey, kept_rates
from hps_numba.cache.shares import Learned

__all__ = ["kept_miss_rates", "used_miss_rates"]


def kept_miss_rates() -> dict[str, Any]:
    """What processes of this user have left, ready for JSON: ``file``, None where there is no folder for it, and ``rates``.

    Each entry of ``rates`` is for one device and one shape of batches and tables: ``rows_per_second`` has the ways that were
    measured (host, both, device), ``chosen`` is the way that lookups take, None while each is tried, and ``host_share`` the
    share of the host when both bring rows.
    """
    return {"file": kept_rates.file, "rates": _rates_of(kept_rates.read())}


def used_miss_rates() -> list[dict[str, Any]]:
    """``rates`` of ``kept_miss_rates``, as the lookups of this process know them now."""
    return _rates_of(kept_rates.used)


def _rates_of(known: Mapping[RateKey, Learned]) -> list[dict[str, Any]]:
    return [_facts(key, learned) for key, learned in sorted(known.items(), key=lambda item: item[0]) if learned.costs]


def _facts(key: RateKey, learned: Learned) -> dict[str, Any]:
    return {
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
