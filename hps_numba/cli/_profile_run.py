"""A run of the profiler: opens the table, measures every mode with every number of keys, and reports."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hps_numba import __version__
from hps_numba.cli._hardware import inspect_hardware
from hps_numba.cli._profile_keys import Distribution, DrawnKeys, KeySource, ReplayedKeys
from hps_numba.cli._profile_measure import Calls, measure, measure_refresh
from hps_numba.cli._profile_options import NEEDS_CACHE
from hps_numba.cli._profile_target import GeneratedTable, Target, config_target, generated_target, keys_of_model
from hps_numba.server.miss_rates import used_miss_rates

__all__ = ["Profile"]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What to measure and how.

    Attributes:
        config: path of a config, or None to generate ``generated``.
        model, table, device: select a table of the config; None for the first.
        allow_code: permit the config to name Python modules and files, which are run.
        modes, sizes: measured in all combinations; refresh once.
        distribution, table_size: of drawn keys: over 0 .. table_size - 1, or by default over the keys of the table.
        keys_file: keys to replay instead.
        seed: of the keys.
    """

    config: Path | None
    generated: GeneratedTable
    model: str | None
    table: str | None
    device: int | None
    allow_code: bool
    modes: tuple[str, ...]
    sizes: tuple[int, ...]
    calls: Calls
    refreshes: int
    distribution: Distribution
    table_size: int | None
    keys_file: Path | None
    seed: int

    def run(self) -> dict[str, Any]:
        """Measure everything; the report, ready for JSON.

        Raises:
            HpsError: an error in the config, the table or the keys, or a mode that needs a cache without one.
        """
        replayed = None if self.keys_file is None else ReplayedKeys(self.keys_file)
        with self._target() as target:
            source = replayed or self._drawn(target)
            results = [
                measure(target, mode, source, size, self.calls, seed=self.seed)
                for mode in self.modes
                if mode != "refresh"
                for size in self.sizes
            ]
            if "refresh" in self.modes:
                calls = Calls(iterations=self.refreshes, warmup=min(self.calls.warmup, 1))
                results.append(measure_refresh(target, source, calls))
            ok = not any(result["wrong_rows"] for result in results)
            return {"ok": ok, **self._facts(target, source), "miss_rates": used_miss_rates(), "results": results}

    @contextmanager
    def _target(self) -> Iterator[Target]:
        cached = next((mode for mode in self.modes if mode in NEEDS_CACHE), None)
        if self.config is not None:
            which = (self.model, self.table, self.device)
            with config_target(self.config, *which, allow_code=self.allow_code, cached=cached) as target:
                yield target
            return
        with (
            tempfile.TemporaryDirectory(prefix="hps_profile_") as folder,
            generated_target(self.generated, Path(folder), self.device, cached=cached) as target,
        ):
            yield target

    def _drawn(self, target: Target) -> KeySource:
        if self.table_size is not None:
            return DrawnKeys(self.distribution, self.table_size, self.seed)
        if self.config is None:
            return DrawnKeys(self.distribution, self.generated.rows, self.seed)
        return DrawnKeys(self.distribution, keys_of_model(target.spec), self.seed)

    def _facts(self, target: Target, source: KeySource) -> dict[str, Any]:
        hardware = inspect_hardware()
        return {
            "version": __version__,
            "cpu": hardware.cpu,
            "cores": hardware.cores,
            "gpus": [gpu.name for gpu in hardware.gpus],
            "config": self.config,
            "model": target.spec.model,
            "table": target.spec.name,
            "rows": target.rows(),
            "dim": target.spec.dim,
            "dtype": str(target.dtype),
            "device": target.device if target.on_device else None,
            "keys": source.facts(),
            "seed": self.seed,
            "threads": self.calls.threads,
            "warmup_iterations": self.calls.warmup,
            "compared_with": target.compared_with,
        }
