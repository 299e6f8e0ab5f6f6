"""Training of rows for frameworks that hand gradients over as NumPy arrays: they are accumulated here, and applied."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hps_numba.arrays.host import as_keys
from hps_numba.errors import ConfigError
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.server.hps import HPS
from hps_numba.training import trainer as row_training
from hps_numba.training.initializers import Initializer

__all__ = ["GradientAccumulator", "RowOptimizer", "accumulator_of"]


class GradientAccumulator:
    """Gradients of the rows of one table, accumulated until an optimizer takes them.

    Thread safety: every method.
    """

    def __init__(self, server: HPS, model: str, table: str, dim: int) -> None:
        self.model, self.table, self.dim = model, table, dim
        self.key_bits = server.direct.key_bits
        self.server = weakref.ref(server)
        self.initializer: Initializer | None = None
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """A new lock, as a forked child needs it."""
        self._lock = threading.RLock()  # a signal handler may come here too

    def add(self, keys: np.ndarray, gradients: np.ndarray) -> None:
        """Add gradients: keys of any shape ``S`` and float32 ``S + (dim,)``; both are copied."""
        flat = as_keys(keys, key_bits=self.key_bits).flat
        part = _summed(flat, np.ascontiguousarray(gradients, np.float32).reshape(len(flat), self.dim))
        with self._lock:
            self._parts.append(part)

    def take(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Distinct keys, ascending, and the sums of their gradients in the order in which they were added; leaves none."""
        with self._lock:
            parts, self._parts = self._parts, []
        if len(parts) < 2:
            return parts[0] if parts else None
        return _summed(np.concatenate([keys for keys, _ in parts]), np.concatenate([rows for _, rows in parts]))


def _summed(keys: np.ndarray, gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    begins = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1]))) if len(keys) else np.empty(0, np.int64)
    return ordered[begins], row_training.summed_rows(gradients, order, np.append(begins, len(keys)))


_known: weakref.WeakKeyDictionary[HPS, dict[str, GradientAccumulator]] = weakref.WeakKeyDictionary()
_making = threading.RLock()  # also for a signal handler


def accumulator_of(server: HPS, model: str, table: int | str) -> GradientAccumulator:
    """The gradients of a table of a server.

    Raises:
        UnknownModelError: no such table.
    """
    spec = server.direct.table_spec(model, table)
    with _making:
        tables = _known.setdefault(server, {})
        if spec.tag not in tables:
            tables.setdefault(spec.tag, GradientAccumulator(server, spec.model, spec.name, spec.dim))
        return tables[spec.tag]


class RowOptimizer:
    """Applies accumulated gradients to the rows of some tables.

    Args:
        tables: their gradients.
        rule: built for each step from the settings, which may change between steps: ``optimizer.lr = 0.1``.

    Thread safety: steps take turns; gradients are accumulated meanwhile.
    """

    def __init__(
        self, tables: Sequence[GradientAccumulator], rule: Callable[..., row_training.Rule], **settings: float
    ) -> None:
        if not tables:
            expected = "layers with train_rows=True and not read_only, or models with such layers"
            raise ConfigError(f"layers: expected {expected}, got none")
        self._rule, self._names = rule, tuple(settings)
        self.__dict__.update(settings)
        self.tables = tuple(tables)
        made = rule(**settings)
        self.trainers: list[row_training.RowTrainer] = []
        for rows in tables:
            server = rows.server()
            assert server is not None  # the caller, who found the rows, holds it
            self.trainers.append(row_training.RowTrainer(server, rows.model, rows.table, made))

    def step(self) -> None:
        """Apply the gradients since the last step; every lookup that starts after it returns sees the new rows.

        Raises:
            As ``HPS.insert``.
        """
        rule = self._rule(**{name: float(getattr(self, name)) for name in self._names})
        for rows, trainer in zip(self.tables, self.trainers, strict=True):
            taken = rows.take()
            if taken is not None:
                trainer.initializer = rows.initializer
                trainer.step(*taken, rule)

    def zero_grad(self) -> None:
        """Drop the accumulated gradients."""
        for rows in self.tables:
            rows.take()

    def __repr__(self) -> str:
        settings: dict[str, Any] = {name: getattr(self, name) for name in self._names}
        tables = ", ".join(f"{rows.model}.{rows.table}" for rows in self.tables)
        return f"{type(self).__name__}({tables}; {', '.join(f'{name}={value}' for name, value in settings.items())})"
