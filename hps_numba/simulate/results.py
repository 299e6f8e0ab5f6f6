"""The results of a simulation: one run for each policy, geometry and cache size; as dict, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hps_numba.config.arguments import as_count, as_optional
from hps_numba.config.messages import show
from hps_numba.errors import ConfigError
from hps_numba.runtime.paths import checked_path
from hps_numba.runtime.replacing import write_report

__all__ = ["Run", "Simulation"]


@dataclass(frozen=True)
class Run:
    """One policy in a cache of one size.

    Attributes:
        policy: its name.   geometry: ``gpu`` (sets, batches) or ``associative`` (one order of all rows, one request at a time).
        bound: an upper bound on all policies: Belady's optimum, the infinite cache.
        rows: capacity of the cache; for ``gpu``, rounded up to whole sets. With sampling, the capacity for the whole trace.
        requests, hits: after the warm-up, of the simulated keys.
        batch_keys, batch_key_hits: the same, with each key counted once per batch.
        admissions, evictions: after the warm-up.   resident: rows at the end.
        hit_rate: share of requests; with sampling, the estimate for the whole trace.
        error: half the width of the 95 % confidence interval of ``hit_rate``; 0 without sampling.
        row_bytes: size of a row.   gpu_bytes: GPU memory of the cache, without the buffers of calls; 0 for ``associative``.
        seconds: duration of the simulation.   by_window: int64, hits in each window of the trace, warm-up included.
    """

    policy: str
    geometry: str
    bound: bool
    rows: int
    requests: int
    hits: int
    batch_keys: int
    batch_key_hits: int
    admissions: int
    evictions: int
    resident: int
    hit_rate: float
    error: float
    row_bytes: int
    gpu_bytes: int
    seconds: float
    by_window: np.ndarray = field(repr=False)

    @property
    def misses(self) -> int:
        """Requests that the cache did not answer."""
        return self.requests - self.hits

    @property
    def key_hit_rate(self) -> float:
        """Share of the distinct keys of batches that hit: the rate for a lookup that removes duplicates first."""
        return self.batch_key_hits / self.batch_keys if self.batch_keys else 0.0

    @property
    def bytes_from_host(self) -> int:
        """Bytes of missed rows, which cross the bus."""
        return self.misses * self.row_bytes

    @property
    def bytes_into_cache(self) -> int:
        """Bytes of admitted rows."""
        return self.admissions * self.row_bytes

    @property
    def bytes_from_cache(self) -> int:
        """Bytes of rows that hit."""
        return self.hits * self.row_bytes

    def to_dict(self) -> dict[str, Any]:
        """All figures by name, the windows as a list."""
        names = [name for name in self.__dataclass_fields__ if name != "by_window"]
        more = ("misses", "key_hit_rate", "bytes_from_host", "bytes_into_cache", "bytes_from_cache")
        return {**{name: getattr(self, name) for name in (*names, *more)}, "by_window": self.by_window.tolist()}


@dataclass(frozen=True)
class Simulation:
    """All runs over one trace.

    Attributes:
        trace: its name.   format: of the file.
        requests: of the whole trace.   distinct: number of its keys; with sampling, an estimate.
        simulated: requests that were simulated; fewer with sampling.   rate: sampled share of the keys.
        batch: keys of a call.   warmup: requests at the beginning that are not counted.
        dim, row_dtype: of a row.
        window: simulated requests of a window.   windows: int64, requests in each window.
        heat: float64 ``[groups, windows]``: keys are sorted by popularity and cut into groups with equally many requests over
            the whole trace; this is the share of each group in the requests of a window, relative to its average, 1.0.
        group_keys: int64 ``[groups]``, keys in each group.
        runs: one for each policy, geometry and size, in the order of the request.
        skipped: requested policies that could not be simulated, one line each.
    """

    trace: str
    format: str
    requests: int
    distinct: int
    simulated: int
    rate: float
    batch: int
    warmup: int
    dim: int
    row_dtype: str
    window: int
    windows: np.ndarray = field(repr=False)
    heat: np.ndarray = field(repr=False)
    group_keys: np.ndarray = field(repr=False)
    runs: tuple[Run, ...]
    skipped: tuple[str, ...] = ()

    @property
    def sizes(self) -> list[int]:
        """The cache sizes in rows, ascending."""
        return sorted({run.rows for run in self.runs if run.policy != "infinite"})

    def select(self, *, policy: str | None = None, geometry: str | None = None, rows: int | None = None) -> list[Run]:
        """The runs of this policy, geometry and size (None: all), sorted by size.

        Raises:
            ConfigError: an argument is of another type.
        """
        for name, text in (("policy", policy), ("geometry", geometry)):
            if text is not None and not isinstance(text, str):
                raise ConfigError(f"{name}: expected a name or None, got {show(text)}")
        rows = as_optional(rows, as_count, "rows")
        found = [
            run
            for run in self.runs
            if policy in (None, run.policy) and geometry in (None, run.geometry) and rows in (None, run.rows)
        ]
        return sorted(found, key=lambda run: run.rows)

    def curves(self) -> dict[tuple[str, str], list[Run]]:
        """(policy, geometry) -> its runs by size, in the order of the request."""
        named = dict.fromkeys((run.policy, run.geometry) for run in self.runs)
        return {(policy, geometry): self.select(policy=policy, geometry=geometry) for policy, geometry in named}

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        names = [name for name in self.__dataclass_fields__ if name not in ("runs", "windows", "heat", "group_keys", "skipped")]
        arrays = {name: getattr(self, name).tolist() for name in ("windows", "heat", "group_keys")}
        facts = {name: getattr(self, name) for name in names}
        return {**facts, "skipped": list(self.skipped), "runs": [run.to_dict() for run in self.runs], **arrays}

    def write_json(self, path: str | Path) -> None:
        """Write everything as JSON.

        Raises:
            ConfigError: it cannot be written, or there is a file that is none of these.
        """
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        write_report(checked_path(path, "write_json: path", error=ConfigError), text, '{\n "trace"', error=ConfigError)

    def write_csv(self, path: str | Path) -> None:
        """Write a CSV line for each run, the name of the trace first; raises as :meth:`write_json`."""
        lines = [{"trace": self.trace, **run.to_dict()} for run in self.runs]
        text = io.StringIO(newline="")
        names = [name for name in lines[0] if name != "by_window"] if lines else []
        writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        checked = checked_path(path, "write_csv: path", error=ConfigError)
        write_report(checked, text.getvalue(), "trace," if lines else "\n", error=ConfigError)
