"""What ``hps-numba tiers`` finds out about one tier: whether it answers, its tables, and how fast it answers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hps_numba.cli._errors import one_line
from hps_numba.cli._latency import percentiles
from hps_numba.cli._model_samples import random_ranges
from hps_numba.cli._tiers import ConfiguredTier, fetch_all, is_private
from hps_numba.errors import HpsError, ModelFileError, TierNotMade
from hps_numba.storage.model_files import open_model
from hps_numba.storage.tiers._checked import CheckedTier
from hps_numba.storage.tiers._tier import NO_LIMIT

if TYPE_CHECKING:
    from hps_numba.config import TableSpec

__all__ = ["absent_keys", "survey_tier"]

_SECONDS = 5.0  # after which no further fetch of a kind is begun


def survey_tier(tier: ConfiguredTier, *, samples: int, keys_each: int) -> dict[str, Any]:
    """All facts about a tier, ready for JSON; ``error`` is None if it could be opened and answered every call.

    It is also None, and ``made`` is False, if there is nothing where the first server, or the first write, makes the tier.

    Args:
        samples: fetches of each kind whose time is taken.   keys_each: keys in one fetch.
    """
    section = tier.section
    facts: dict[str, Any] = {
        **tier.facts,
        "read_only": bool(getattr(section, "read_only", False)),
        "error": None,
        "made": True,
        "tables": [],
        "latency": {},
    }
    try:
        with tier.open(read_only=True) as opened:
            kind = opened.inner
            facts |= {"shared": kind.shared, "persistent": kind.persistent, "private": is_private(opened)}
            facts["tables"] = _tables(opened, tier)
            facts["latency"] = _latency(opened, tier, facts["tables"], samples, keys_each)
    except HpsError as problem:
        if isinstance(problem, TierNotMade) and not facts["read_only"]:  # a server would make it
            return {**facts, "made": False}
        facts["error"] = tier.public(one_line(problem))
        facts["error_type"] = type(problem).__name__
    return facts


def _tables(opened: CheckedTier, tier: ConfiguredTier) -> list[dict[str, Any]]:
    """The tables of the config, then those that only the tier has."""
    specs = {spec.tag: spec for spec in tier.config.tables()}
    tags = [*specs, *(tag for tag in opened.tables() if tag not in specs)]
    return [_table(opened, tag, specs.get(tag), tier.key_bits // 8) for tag in tags]


def _table(opened: CheckedTier, tag: str, spec: TableSpec | None, key_bytes: int) -> dict[str, Any]:
    rows, capacity = opened.size(tag), opened.capacity(tag)
    dim = spec.dim if spec is not None else next((part.shape[1] for _, part in opened.scan(tag, 1)), 0)
    return {
        "table": tag,
        "in_config": spec is not None,
        "dim": dim,
        "rows": rows,
        "bytes": rows * (key_bytes + 4 * dim),
        "capacity": None if capacity == NO_LIMIT else capacity,
    }


# -- latency ---------------------------------------------------------------------


def _latency(
    opened: CheckedTier, tier: ConfiguredTier, tables: list[dict[str, Any]], samples: int, keys_each: int
) -> dict[str, dict[str, Any]]:
    """Times of fetches from the largest table, of keys that it has and of keys that it lacks."""
    largest = max(tables, key=lambda table: table["rows"])
    tag, dim = largest["table"], max(1, largest["dim"])
    rng, count = np.random.default_rng(), samples * keys_each
    result = {}
    if largest["rows"]:
        present = _present_keys(opened, tier, tag, count, rng)
        result["present"] = _times(opened, tag, dim, present, samples, keys_each)
    absent = absent_keys(opened, tag, count, tier.key_bits, rng)
    result["absent"] = _times(opened, tag, dim, absent, samples, keys_each)
    return result


def _times(opened: CheckedTier, tag: str, dim: int, keys: np.ndarray, samples: int, keys_each: int) -> dict[str, Any]:
    seconds, found = [], 0
    fetch_all(opened, tag, keys[:1], np.empty((1, dim), np.float32))  # kernels are loaded, and connections opened
    started = time.perf_counter()
    for number in range(samples):
        some = np.take(keys, range(number * keys_each, (number + 1) * keys_each), mode="wrap")
        rows = np.empty((keys_each, dim), np.float32)
        before = time.perf_counter()
        there = fetch_all(opened, tag, some, rows)
        seconds.append(time.perf_counter() - before)
        found += int(np.count_nonzero(there))
        if time.perf_counter() - started > _SECONDS:
            break
    fetches = len(seconds)
    return {"table": tag, "fetches": fetches, "keys_each": keys_each, "found": found, **percentiles(np.array(seconds))}


def _present_keys(opened: CheckedTier, tier: ConfiguredTier, tag: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Keys at random places of the sparse model, if the tier has some of them; else the first ones that it lists."""
    spec = next((spec for spec in tier.config.tables() if spec.tag == tag), None)
    if spec is not None:
        keys = _keys_of_model(spec.source, spec.dim, count, rng)
        keys = keys[opened.contains(tag, keys)] if len(keys) else keys
        if len(keys):
            return rng.permutation(keys)
    return rng.permutation(next(iter(opened.scan(tag, count)))[0])


def _keys_of_model(path: str | Path, dim: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """About ``count`` keys of a sparse model; none if it cannot be read, as the model is not what is looked at here."""
    found = [np.empty(0, np.int64)]
    try:
        with open_model(path, dim) as model:
            for start, stop in random_ranges(model.rows, count, rng):
                keys = np.empty(stop - start, np.int64)
                model.read(start, stop, keys, None)
                found.append(keys)
    except ModelFileError:
        return found[0]
    return np.concatenate(found)


def absent_keys(opened: CheckedTier, tag: str, count: int, key_bits: int, rng: np.random.Generator) -> np.ndarray:
    """int64 ``[count]``: random keys that a table lacks."""
    limit = 2**62 if key_bits == 64 else 2**32
    keys = np.empty(0, np.int64)
    for _ in range(100):
        more = rng.integers(0, limit, count)
        keys = np.concatenate([keys, more[~opened.contains(tag, more)]])
        if len(keys) >= count:
            return keys[:count]
    return np.resize(keys, count) if len(keys) else rng.integers(0, limit, count)
