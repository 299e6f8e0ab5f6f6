"""How missed rows of large batches are shared out between threads of the host and the device, from how long batches took.

Rows may come by way of the host, by the device alone, or by both. The way that takes least time a row is kept, and now and
then another one is tried. With both, the next batch of a size gives each what it would have needed to end at the same time. So
nothing has to be known of the machine: on an H200 in a virtual machine the host alone was best for rows of 128 bytes, and both
for a million keys of rows of 512.

Where a batch missed few rows, as in a cache that holds nearly all that is asked for, the device reads them alone: to ask the
host would cost more than that. Now and then batches are looked at again.

What was learned outlives the process (``cache.kept_rates``). It is learned from batches of users, not from a calibration
before the first lookup: rates depend on what else the bus and the cores do at the time, a calibration needs a table of some
GiB in pinned memory, and would delay the first lookup or be disturbed by it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

from hps_numba.errors import ConfigError

__all__ = ["ALONE", "BOTH", "DEVICE", "FULL_SHARE", "HOST", "LEAST_ROWS", "SHARE_VARIABLE", "Learned", "Shares", "forced_share"]

FULL_SHARE = 1 << 16
LEAST_ROWS = 1024  # for which the host is asked: below, the device is done before the threads have begun
ALONE = -1  # instead of a share: the device reads all rows
HOST, BOTH, DEVICE = "host", "both", "device"
SHARE_VARIABLE = "HPS_NUMBA_HOST_SHARE"
_LEAST_SHARE, _FIRST_SHARE = 1 / 32, 3 / 4
_TRIES = 4  # of each way, before the best is known
_LOOK_AGAIN = 64  # batches after which another way is tried, or one is looked at again
_FEW = 16  # times fewer rows than by the other way are as good as none
_PULL = 0.5  # of a new measurement
_FEW_MISSED = LEAST_ROWS  # rows: after a batch that missed fewer, the host is not asked
_AS_BEFORE = 1.25  # costs that differ by less are not worth being written down again


def forced_share() -> float | None:
    """The share of the host that the environment variable HPS_NUMBA_HOST_SHARE names; None: as is fastest.

    Raises:
        ConfigError: it is not a number from 0 to 1.
    """
    text = os.environ.get(SHARE_VARIABLE, "").strip()
    if not text:
        return None
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise ConfigError(f"environment variable {SHARE_VARIABLE}: expected a number from 0 to 1, got {text!r}")
    return share


@dataclass
class _Way:
    """What is known of one way to bring missed rows: nanoseconds a row, and how often it was tried."""

    cost: float = math.inf
    tries: int = 0


class Learned:
    """What is known for batches of about one size.

    Attributes:
        share: of the host, when both bring rows.   rates: rows a second of host and device then, or zeros.

    Thread safety: all methods; of two measurements in the same moment one may be lost.
    """

    def __init__(self) -> None:
        self._ways = {HOST: _Way(), BOTH: _Way(), DEVICE: _Way()}
        self.share = _FIRST_SHARE
        self.rates = 0.0, 0.0
        self._batches = 0

    @classmethod
    def remembered(cls, costs: dict[str, float], share: float, rates: tuple[float, float]) -> Learned:
        """What another process has learned: ways with a known cost count as tried.

        Args:
            costs: nanoseconds a row of each way that is known.   share, rates: as the attributes.

        Raises:
            ValueError: no process learns this.
        """
        learned = cls()
        for name, cost in costs.items():
            if name not in learned._ways or not 0 < cost < math.inf:
                raise ValueError(f"{name}: {cost} ns a row")
            learned._ways[name] = _Way(cost, _TRIES)
        if not (_LEAST_SHARE <= share <= 1 - _LEAST_SHARE and all(0 <= rate < math.inf for rate in rates)):
            raise ValueError(f"share {share}, rates {rates}")
        learned.share, learned.rates = share, rates
        return learned

    @property
    def costs(self) -> dict[str, float]:
        """Nanoseconds a row of each way that was measured."""
        return {name: way.cost for name, way in self._ways.items() if way.cost < math.inf}

    @property
    def best(self) -> str | None:
        """The way that is taken but for a try of another now and then; None while each of them is tried."""
        if any(way.tries < _TRIES or way.cost == math.inf for way in self._ways.values()):
            return None
        return min(self._ways, key=lambda name: self._ways[name].cost)

    def is_news(self, before: Learned | None) -> bool:
        """Whether this is worth more than what was known ``before``: another best way, or a cost that has changed."""
        costs, known = self.costs, {} if before is None else before.costs
        if before is None or costs.keys() != known.keys() or self.best != before.best:
            return bool(costs)
        return any(not 1 / _AS_BEFORE < cost / known[name] < _AS_BEFORE for name, cost in costs.items())

    def copy(self) -> Learned:
        """The same, which does not learn with it."""
        return Learned.remembered(self.costs, self.share, self.rates)

    def next_share(self) -> int:
        """Of the next batch, as ``Shares.of``: by the best way, now and then by another one, at first by each of them."""
        self._batches += 1
        looks_again = self._batches % _LOOK_AGAIN == 0
        names = sorted(self._ways, key=lambda name: self._ways[name].cost)
        name = next((name for name in (BOTH, HOST, DEVICE) if self._ways[name].tries < _TRIES), names[0])
        if looks_again:  # at the best one too: the device alone is not measured otherwise
            name = names[self._batches // _LOOK_AGAIN % len(names)]
        way = self._ways[name]
        way.tries += 1
        if name == DEVICE and way.tries > _TRIES and not looks_again:
            return ALONE
        return round({HOST: 1.0, BOTH: self.share, DEVICE: 0.0}[name] * FULL_SHARE)

    def learn(self, rows: int, ns: int, others: int, others_ns: int) -> None:
        """Look at a batch: rows by way of the host, nanoseconds until all were there; rows that the device read, the same."""
        way = HOST if others * _FEW < rows else DEVICE if rows * _FEW < others else BOTH
        took, cost = self._ways[way], max(ns, others_ns) / (rows + others)
        if cost <= 0:
            return
        took.cost = cost if took.cost == math.inf else took.cost + _PULL * (cost - took.cost)
        if way == BOTH and ns > 0 and others_ns > 0:
            host, direct = rows / ns, others / others_ns
            share = self.share + _PULL * (host / (host + direct) - self.share)
            self.share = min(max(share, _LEAST_SHARE), 1 - _LEAST_SHARE)
            self.rates = host * 1e9, direct * 1e9


class Shares:
    """How many of the missed rows the host gathers, by size of the batch.   Thread safety: all methods.

    Args:
        forced: the share of the host; None: as is fastest.
        known: what is known for batches of so many keys, in bits, for all caches that have that in common; or nothing is.
    """

    def __init__(self, forced: float | None, known: Callable[[int], Learned] = lambda bits: Learned()) -> None:
        self.forced, self._known = forced, known
        self._sizes: dict[int, Learned] = {}
        self._unasked: dict[int, int] = {}  # of sizes whose last batch missed few rows: batches until the next look

    def of(self, n: int) -> int:
        """For a batch of ``n`` keys, in 1/65,536; negative: the device is to read all rows, and nothing is measured."""
        if self.forced is not None:
            return round(self.forced * FULL_SHARE) or ALONE
        return 0 if n.bit_length() in self._unasked else self._of_size(n).next_share()

    def skips(self, n: int) -> bool:
        """Whether a batch of ``n`` keys is not worth to be looked at, as others of its size have missed few rows."""
        left = self._unasked.get(n.bit_length(), 0)
        if left > 0:  # another thread may have learned meanwhile: then some batches more are skipped
            self._unasked[n.bit_length()] = left - 1
        return left > 0

    def skips_next(self, n: int) -> bool:
        """Whether ``skips`` says so of the next batch."""
        return self._unasked.get(n.bit_length(), 0) > 0

    def _of_size(self, n: int) -> Learned:
        bits = n.bit_length()
        learned = self._sizes.get(bits)
        return learned if learned is not None else self._sizes.setdefault(bits, self._known(bits))

    def learn(self, n: int, last: tuple[int, int, int, int]) -> None:
        """Look at a batch that has ended, of about ``n`` keys (0: not known): as ``Learned.learn``."""
        rows, _, others, _ = last
        if self.forced is not None or not n:
            return
        if rows + others < _FEW_MISSED:
            self._unasked[n.bit_length()] = _LOOK_AGAIN
        else:
            self._unasked.pop(n.bit_length(), None)
        if rows + others >= LEAST_ROWS:
            self._of_size(n).learn(*last)

    def ask_again(self) -> None:
        """What is known has changed: the table has outgrown it."""
        self._sizes = {}

    @property
    def rates(self) -> dict[int, tuple[float, float]]:
        """Rows a second by way of the host and read by the device at the same time, by bits of the number of keys."""
        return {size: learned.rates for size, learned in self._sizes.items() if learned.rates[0]}

    @property
    def costs(self) -> dict[int, dict[str, float]]:
        """Nanoseconds a row of each way that was measured, by bits of the number of keys."""
        return {size: learned.costs for size, learned in self._sizes.items()}
