"""Optimizer steps on rows of a table, whatever framework the gradients are from.

A step is a write like any other: it reads rows past the caches and writes them to every tier and every cache before it
returns. The optimizer state of a row is kept under the same key in a host store of its own. A row that does not exist at its
first gradient starts from the initializer, with a fresh state.

One pass makes row and state: it reads them where they are in host memory and writes the new ones, on all threads, to slots
that no reader knows of; then the rows become visible and after them the states, all or none (``HostStore.rewriting``). Slower
tiers need the rows in an array, so with those a step reads and writes copies of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from hps_numba.arrays.buffer_pool import aligned_empty
from hps_numba.config import TableSpec
from hps_numba.config.messages import show
from hps_numba.errors import ArrayError, ConfigError
from hps_numba.kernels.host.optimizers import BLOCK, LEVELS, adagrad_rows, adam_rows, sgd_rows, sum_rows
from hps_numba.runtime.interrupts import interrupts_held
from hps_numba.runtime.reentry import ExclusiveLock
from hps_numba.runtime.threads import ranges_of, run_ranges
from hps_numba.server.hps import HPS
from hps_numba.storage.distinct import distinct_keys
from hps_numba.storage.host.bulk import Rewrite
from hps_numba.storage.host.content import address_of
from hps_numba.storage.host.store import HostStore
from hps_numba.training.initializers import Initializer, initial_rows

__all__ = ["BLOCK", "Adagrad", "Adam", "Places", "RowTrainer", "Rule", "Sgd", "create_rows", "summed_rows"]

_MIN_SWEEP = 4096  # states that are kept without asking whether their rows still exist


class Places(NamedTuple):
    """Where rows are before and after a step: int64 ``[n]`` addresses; a place may be the same before and after."""

    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True)
class Rule:
    """How an optimizer changes a row by its gradient.

    Attributes:
        name: of the optimizer, as checkpoints know it.
        lr: learning rate.

    Raises:
        ConfigError: a setting is not a finite number of at least 0.
    """

    name: ClassVar[str]
    lr: float

    def __post_init__(self) -> None:
        for field, value in vars(self).items():
            if not (
                isinstance(value, (int, float, np.integer, np.floating))
                and not isinstance(value, bool)
                and math.isfinite(value)
                and value >= 0
            ):
                raise ConfigError(f"{field}: expected a number of at least 0, got {show(value)}")

    def width(self, dim: int) -> int:
        """Elements of the state of a row."""
        return 0

    @property
    def fresh(self) -> float:
        """The value that the state of a new row is filled with."""
        return 0.0

    def kernel(self, step: int) -> tuple[Any, tuple[Any, ...]]:
        """The kernel, and its arguments after the range of rows, for step 1, 2, ...."""
        raise NotImplementedError

    def apply(self, rows: Places, states: Places | None, gradients: np.ndarray, step: int, *, keep: bool) -> None:
        """Make the rows and states after step 1, 2, ... from those before.

        Args:
            states: None if there are none.   gradients: float32 ``[n, dim]``, contiguous.
            keep: write the new rows over the gradients too.
        """
        kernel, settings = self.kernel(step)
        dim = gradients.shape[1]
        states = rows if states is None else states  # which the kernel then leaves alone
        gradient_address = address_of(gradients)
        row_places, state_places = ([address_of(some) for some in places] for places in (rows, states))

        def apply_range(start: int, stop: int) -> int:
            kernel(*row_places, gradient_address, dim, *state_places, start, stop, keep, *settings)
            return stop - start

        if len(gradients):
            run_ranges(apply_range, ranges_of(len(gradients), 12 * dim + 8 * self.width(dim)))


@dataclass(frozen=True)
class Sgd(Rule):
    """``row -= lr * gradient``."""

    name = "sgd"

    def kernel(self, step: int) -> tuple[Any, tuple[Any, ...]]:
        return sgd_rows, (np.float32(self.lr),)


@dataclass(frozen=True)
class Adagrad(Rule):
    """Row-wise Adagrad: the state of a row is one number, the sum of the mean squares of its gradients."""

    name = "adagrad"
    eps: float = 1e-10
    initial_accumulator_value: float = 0.0

    def width(self, dim: int) -> int:
        return 1

    @property
    def fresh(self) -> float:
        return self.initial_accumulator_value

    def kernel(self, step: int) -> tuple[Any, tuple[Any, ...]]:
        return adagrad_rows, (np.float32(self.lr), np.float32(self.eps))


@dataclass(frozen=True)
class Adam(Rule):
    """Lazy Adam (Kingma and Ba 2014): rows without a gradient keep row and moments; all rows share one step count."""

    name = "adam"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.beta1 < 1 and self.beta2 < 1):
            raise ConfigError(f"betas: expected two numbers of at least 0 and below 1, got {(self.beta1, self.beta2)}")

    def width(self, dim: int) -> int:
        return 2 * dim

    def kernel(self, step: int) -> tuple[Any, tuple[Any, ...]]:
        rate = self.lr * math.sqrt(1 - self.beta2**step) / (1 - self.beta1**step)
        return adam_rows, tuple(np.float32(value) for value in (rate, self.eps, 1 - self.beta1, 1 - self.beta2))


class RowTrainer:
    """Optimizer of one table: applies a rule to rows of the server and keeps their states.

    Args:
        server: has the table.   model: name of its model.   table: its number or name.
        rule: the optimizer; its settings may change from step to step, its class may not.
        initializer: of rows that do not exist at their first gradient; None: the table's default value.

    Attributes:
        steps: how many steps were taken.

    Raises:
        UnknownModelError: there is no such model or table.   ClosedError: the server was closed.

    Thread safety: every method; steps take turns.
    """

    def __init__(self, server: HPS, model: str, table: int | str, rule: Rule, initializer: Initializer | None = None) -> None:
        self.server = server
        self.spec = server.direct.table_spec(model, table)
        self.rule = rule
        self.initializer = initializer
        self.steps = 0
        self._watchers: tuple[tuple[object, Callable[[np.ndarray], object]], ...] = ()
        self._states = self._new_states()
        self._fresh_state = np.full(rule.width(self.spec.dim), rule.fresh, np.float32)
        self._sweep_at = _MIN_SWEEP
        self._lock = ExclusiveLock(f"{self.spec.tag}: {rule.name}")
        self._states_lock = ExclusiveLock(f"{self.spec.tag}: {rule.name}")  # inside the other; changes while steps are paused

    def _new_states(self) -> HostStore | None:
        width = self.rule.width(self.spec.dim)
        return HostStore(width, name=f"{self.spec.tag}: {self.rule.name}") if width else None

    def step(
        self,
        keys: np.ndarray,
        gradients: np.ndarray,
        rule: Rule | None = None,
        *,
        overwrite: bool = False,
        arrived: Callable[[], object] | None = None,
    ) -> None:
        """Change the rows of some keys by their gradients.

        Args:
            keys: distinct, int64 ``[n]``.   gradients: float32 ``[n, dim]``.
            rule: the trainer's with other settings, or None: the trainer's.
            overwrite: ``gradients``, if contiguous, may be overwritten; new rows are then sent to devices from there.
            arrived: waits until ``gradients``, contiguous float32, are there; called when all else is ready for them.

        Raises:
            ConfigError: ``rule`` is of another class.   ArrayError: gradients of another shape.
            ReentryError: from inside another step of this thread.
            Otherwise as ``HPS.read_modify_write``; states are as before, and rows as its errors say.
            KeyboardInterrupt: the step was taken. A second one ends it at once.
        """
        rule = rule or self.rule
        if type(rule) is not type(self.rule):
            raise ConfigError(f"rule: expected {self.rule.name}, by which this table is trained, got {rule.name}")
        given = gradients
        gradients = np.ascontiguousarray(gradients, np.float32)
        keys = np.array(keys, np.int64)  # a copy: tiers and caches read it one after the other
        if keys.ndim != 1 or gradients.shape != (len(keys), self.spec.dim):
            expected, got = f"keys [n] and gradients [n, {self.spec.dim}]", f"{list(keys.shape)} and {list(gradients.shape)}"
            raise ArrayError(f"{self.spec.tag}: step: expected {expected}, got {got}")
        keep = overwrite and (gradients is not given or gradients.flags.writeable)
        with self._lock.held(), self._states_lock.held(), interrupts_held():  # rows and states are written both, or neither
            with self._rewriting(keys) as states:

                def change(before: np.ndarray, after: np.ndarray, found: np.ndarray) -> np.ndarray | None:
                    initial = self._point_to_first_rows(keys, before, found)
                    places = None if states is None else self._places_of(states, found)
                    if arrived is not None:
                        arrived()
                    rule.apply(Places(before, after), places, gradients, self.steps + 1, keep=keep)
                    del initial  # which rows were made from
                    return gradients if keep else None

                self.server.direct.rewrite(keys, change, self.spec.model, self.spec.name)
                self.steps += 1
                if states is not None:
                    states.publish()
            if self._states is not None:
                self._forget_erased()
            for _, told in self._watchers:
                told(keys)

    def watch(self, told: Callable[[np.ndarray], object]) -> Callable[[], None]:
        """Call ``told`` after each step with the keys whose rows it changed, int64 ``[n]``, which nobody changes any more.

        It is called before the next step and must neither fail nor train. Returns what ends the calls.
        """
        mark = object()
        self._watchers = (*self._watchers, (mark, told))

        def end() -> None:
            self._watchers = tuple(pair for pair in self._watchers if pair[0] is not mark)

        return end

    def _rewriting(self, keys: np.ndarray) -> AbstractContextManager[Rewrite | None]:
        return nullcontext() if self._states is None else self._states.rewriting(keys)

    def _point_to_first_rows(self, keys: np.ndarray, places: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Let the places of rows that were not found be those of their first values; returns these, which must be kept."""
        new = ~found
        rows = np.empty((0, self.spec.dim), np.float32)
        if new.any():
            dim, default = self.spec.dim, self.spec.default_value
            made = initial_rows(self.initializer, keys[new], dim, table=self.spec.tag, default=default)
            rows = np.ascontiguousarray(made, np.float32)
            places[new] = address_of(rows) + 4 * dim * np.arange(len(rows))
        return rows

    def _places_of(self, states: Rewrite, found: np.ndarray) -> Places:
        """Where states are; those of rows that were not found, or that have none, are fresh."""
        fresh = self._fresh_state
        return Places(np.where(found & states.found, states.sources, address_of(fresh)), states.targets)

    def _states_of(self, keys: np.ndarray, found: np.ndarray) -> np.ndarray:
        if self._states is None:
            return np.empty((len(keys), 0), np.float32)
        states = np.empty((len(keys), self._states.dim), np.float32)
        self._states.lookup(keys, states, self.rule.fresh)
        states[~found] = self.rule.fresh
        return states

    def _forget_erased(self) -> None:
        """Drop the states of rows that no longer exist, whenever the states have doubled since the last time."""
        states = self._states
        assert states is not None
        if len(states) > self._sweep_at:
            keys = states.keys()
            states.erase(keys[~self.server.contains(keys, self.spec.model, self.spec.name)])
            self._sweep_at = max(_MIN_SWEEP, 2 * len(states))

    # -- states ---------------------------------------------------------------------

    @property
    def state_width(self) -> int:
        """Elements of the state of a row."""
        return self.rule.width(self.spec.dim)

    def state_keys(self) -> np.ndarray:
        """int64 ``[n]``: the keys of the rows that have a state, ascending."""
        return np.empty(0, np.int64) if self._states is None else np.sort(self._states.keys())

    def read_states(self, keys: np.ndarray) -> np.ndarray:
        """float32 ``[n, state_width]``: the states of int64 keys ``[n]``, fresh ones where there are none."""
        return self._states_of(keys, np.ones(len(keys), bool))

    def set_states(self, steps: int, chunks: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Replace the step count and all states.

        Args:
            chunks: int64 keys ``[n]`` and their states, float32 ``[n, state_width]``.

        Raises:
            ConfigError: states of another width; nothing changed.
        """
        self.take_states(steps, self.made_states(chunks))

    def made_states(self, chunks: Iterable[tuple[np.ndarray, np.ndarray]]) -> HostStore | None:
        """States for ``take_states``, made beside those of the trainer; raises as ``set_states``."""
        states = self._new_states()
        for keys, values in chunks:
            self.check_states(len(keys), values.shape)
            if states is not None:
                states.upsert(keys, values)
        return states

    def take_states(self, steps: int, states: HostStore | None) -> None:
        """Replace the step count and all states by what ``made_states`` returned."""
        with self._lock.mutex, self._states_lock.held():
            old, self._states, self.steps = self._states, states, int(steps)
        if old is not None:
            old.close()

    def check_states(self, n: int, shape: tuple[int, ...]) -> None:
        """Compare the shape of the states of ``n`` rows with what this optimizer needs.

        Raises:
            ConfigError: it is another shape.
        """
        expected = [n, self.state_width]
        if list(shape) != expected:
            raise ConfigError(f"{self.spec.tag}: {self.rule.name}: expected state of shape {expected}, got {list(shape)}")

    def paused(self) -> AbstractContextManager[Any]:
        """A block in which no step begins or ends."""
        return self._lock.held()


def summed_rows(rows: np.ndarray, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums of rows in groups: float32 ``[m, dim]``, bit for bit the same with any number of threads.

    A group is summed in blocks of ``kernels.host.optimizers.BLOCK``, as gradients on a device are.

    Args:
        rows: float32 ``[n, dim]``, of any strides.   order: int64 ``[n]``: the rows by group.
        starts: int64 ``[m + 1]``: where in ``order`` each group begins, and the end of the last.
    """
    dim = rows.shape[1]
    rows = rows if rows.strides[1] == 4 and rows.dtype == np.float32 else np.ascontiguousarray(rows, np.float32)
    out = aligned_empty((len(starts) - 1, dim))
    source, target = address_of(rows), address_of(out)

    def sum_range(start: int, stop: int) -> int:
        sums = aligned_empty((LEVELS, dim))  # of Python: a kernel frees its own arrays after their last use by name
        sum_rows(source, rows.strides[0], dim, order, starts, target, address_of(sums), start, stop)
        return stop - start

    if len(out):
        run_ranges(sum_range, ranges_of(len(out), 8 * dim + 16))
    return out


def _first_rows(
    spec: TableSpec, keys: np.ndarray, rows: np.ndarray, found: np.ndarray, initializer: Initializer | None
) -> None:
    """Give the rows of distinct keys that were not found their first values, in place."""
    if not found.all():
        rows[~found] = initial_rows(initializer, keys[~found], spec.dim, table=spec.tag, default=spec.default_value)


def create_rows(server: HPS, model: str, table: int | str, keys: np.ndarray, initializer: Initializer) -> int:
    """Insert rows from the initializer for those int64 keys ``[n]`` that have no row in any tier; returns how many.

    Raises:
        As ``HPS.read_modify_write``, and what the initializer raises.
    """
    spec = server.direct.table_spec(model, table)
    absent = distinct_keys(keys[~server.contains(keys, model, table)])
    if not len(absent):
        return 0

    def change(rows: np.ndarray, found: np.ndarray) -> np.ndarray:
        _first_rows(spec, absent, rows, found, initializer)
        return rows

    return server.read_modify_write(absent, change, model, table)
