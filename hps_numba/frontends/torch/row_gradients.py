"""``Rows``: the parameter by which Torch sees the trained rows of a table.

Problem: rows live in a server, a table may have more of them than a tensor has room for, and any int64 is a key; yet loss
scalers, clipping and learning rates expect parameters with a ``grad``. Choice: one parameter a table, without elements, whose
``grad`` is float32 ``[m, dim]``: the gradients of the ``m`` rows that backwards touched since ``zero_grad``, equal keys summed;
``touched`` has their keys. It is computed when it is read: a backward pass only keeps what it got, and waits for no device.
Turned down: a sparse ``grad`` (``clip_grad_norm_`` does not take it, and indices cannot be negative); the parameters of a model
(``torch.optim.Adam(model.parameters())`` would take what it cannot train, and DistributedDataParallel would wait for it).
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from hps_numba.errors import ArrayError, ClosedError, ConfigError
from hps_numba.frontends._queries import tables_of
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.server.hps import HPS
from hps_numba.training.initializers import Initializer
from hps_numba.training.trainer import BLOCK, summed_rows

__all__ = ["Rows", "on_host", "parameter_of"]

log = logging.getLogger(__name__)

_PENDING = 8  # backward passes whose gradients are kept before they are summed


class _Part(NamedTuple):
    """Keys, equal ones allowed, and their gradients, ready when the event is past."""

    keys: torch.Tensor
    gradients: torch.Tensor
    ready: Any = None


class Rows(torch.nn.Parameter):
    """The trained rows of one table of a server, shared by all layers on that table in the process.

    Attributes:
        model, table, width: of the table; ``width`` is of a row.

    ``torch.nn.utils.clip_grad_norm_([*head.parameters(), layer.rows], 1.0)`` and ``GradScaler.unscale_(optimizer)`` read
    and change its ``grad``. The parameter itself has no elements, and copying it returns the same object.

    Thread safety: backward passes may run in any thread.
    """

    model: str
    table: str
    width: int

    def __new__(cls, server: HPS, model: str, table: str, width: int) -> Rows:
        return super().__new__(cls, torch.empty(0))  # of a shape that no other optimizer takes for that of ``grad``

    def __init__(self, server: HPS, model: str, table: str, width: int) -> None:
        self.model, self.table, self.width = model, table, width
        self.key_bits = server.direct.key_bits
        self._server = weakref.ref(server)
        self._pending: list[_Part] = []
        self._sum: _Part | None = None
        self._reduced = False
        #: no optimizer has them, and no warning was logged yet
        self.unclaimed = True
        #: of rows that do not exist when their first gradient comes; None: the table's default value
        self.initializer: Initializer | None = None
        #: how gradients of the processes of ``torch.distributed`` become one, and of which group; None: each keeps its own
        self.reduction: tuple[str, Any] | None = None
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """A new lock, as a forked child needs it."""
        self._lock = threading.RLock()

    @property
    def server(self) -> HPS:
        """The server that holds the rows.

        Raises:
            ClosedError: the server is closed.
        """
        server = self._server()
        if server is None or server.closed:
            raise ClosedError(f"rows of {self.model}, {self.table}: their server is closed")
        return server

    # -- gradients ---------------------------------------------------------------------

    def add_gradient(self, keys: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add gradients of rows: keys of any shape ``S`` and integer type, and ``S + [dim]``; both are copied."""
        part = _Part(as_int64(keys, key_bits=self.key_bits), gradients.detach().reshape(-1, self.width))
        if part.gradients.is_cuda:  # to sum them would wait for the device
            copy = part.gradients.to(torch.float32, copy=True)
            part = _Part(part.keys.to(copy.device), copy, torch.cuda.current_stream(copy.device).record_event())
        else:
            part = _summed([part])
        with self._lock:
            if self.unclaimed:
                self.unclaimed = False
                log.warning("%r: got gradients, but no optimizer of hps_numba has these rows: they do not move", self)
            self._pending.append(part)
            self._reduced = False
            if len(self._pending) >= _PENDING:
                self._pending = [_summed(self._pending)]

    @property
    def grad(self) -> torch.Tensor | None:
        """float32 ``[m, dim]``, on the device of the first keys; None if there was no backward pass since ``zero_grad``.

        If an optimizer trains this table in several processes, the first to read it after a backward pass waits for the
        others, which must read it too.
        """
        return self.gathered()[1]

    @grad.setter
    def grad(self, gradients: torch.Tensor | None) -> None:
        with self._lock:
            if gradients is None:
                self._pending, self._sum, self._reduced = [], None, False
                return
            self._gather()
            expected = [0 if self._sum is None else len(self._sum.keys), self.width]
            if self._sum is None or list(gradients.shape) != expected:
                got = list(gradients.shape)
                raise ArrayError(f"grad of rows: expected {expected}, a row for each touched key, got {got}")
            self._sum = self._sum._replace(gradients=gradients)

    @property
    def touched(self) -> torch.Tensor:
        """int64 ``[m]``: the keys of the rows of ``grad``, ascending; 32-bit keys without a sign."""
        return self.gathered()[0]

    def gathered(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``touched`` and ``grad`` of one moment."""
        with self._lock:
            self._gather()
            if self._sum is None:
                return torch.empty(0, dtype=torch.int64), None
            return self._sum.keys, self._sum.gradients

    def _gather(self) -> None:
        new: _Part | None = None
        if self._pending:
            summed = len(self._pending) == 1 and not self._pending[0].gradients.is_cuda
            new = self._pending[0] if summed else _summed(self._pending)
        if self.reduction is not None and not self._reduced and torch.distributed.is_initialized():
            new = _of_all_processes(new, self.width, *self.reduction)
            self._reduced = True
        self._pending = []
        if new is not None:
            self._sum = new if self._sum is None else _summed([self._sum, new])

    # -- copying and showing ---------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> Rows:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigError(f"{self!r} belongs to the server of its process; pickle the layer, or save a checkpoint")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<Rows of {self.model}, {self.table} [{self.width}]>"


def as_int64(keys: torch.Tensor, *, key_bits: int) -> torch.Tensor:
    """A copy of keys as the server knows them: int64 ``[n]``; 32-bit keys are zero-extended."""
    flat = keys.detach().reshape(-1)
    if flat.dtype == torch.uint64:
        flat = flat.view(torch.int64)
    elif flat.dtype == torch.uint32:
        flat = flat.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    elif flat.dtype == torch.int32 and key_bits == 32:
        flat = flat.to(torch.int64) & 0xFFFFFFFF
    return flat.to(torch.int64, copy=True)


def _summed(parts: list[_Part]) -> _Part:
    """One part with each key once, ascending; gradients are added in the order of parts and positions, on every device."""
    device = parts[0].gradients.device
    for part in parts:
        if part.ready is not None:
            stream = torch.cuda.current_stream(part.gradients.device)
            stream.wait_event(part.ready)
            part.keys.record_stream(stream)
            part.gradients.record_stream(stream)
    keys = _joined([part.keys.to(device) for part in parts])
    gradients = _joined([part.gradients.to(device, torch.float32) for part in parts])
    if not len(keys):
        return _Part(keys, gradients)
    ordered, order = torch.sort(keys, stable=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=begins[1:])
    firsts = begins.nonzero().flatten()
    distinct = ordered[firsts]
    if device.type == "cpu":
        starts = torch.cat([firsts, torch.tensor([len(keys)])])
        return _Part(distinct, torch.from_numpy(summed_rows(gradients.numpy(), order.numpy(), starts.numpy())))
    sums = _sums_in_order(gradients[order], firsts)
    return _Part(distinct, sums, torch.cuda.current_stream(device).record_event())


def _sums_in_order(rows: torch.Tensor, firsts: torch.Tensor) -> torch.Tensor:
    """Sums of groups of rows, in blocks as ``summed_rows``: the same bits every time.

    On a GPU a thread goes through a block of a column. Torch's sums by index add atomically there, or sort without keeping the
    order; and a thread for a group would go through all of a key that is in a tenth of the batch.

    Args:
        firsts: int64 ``[m]``: where each group begins, ascending from 0.
    """
    while True:
        positions = torch.arange(len(rows), device=rows.device)
        group = torch.zeros_like(positions).index_fill_(0, firsts, 1).cumsum(0) - 1  # ``cummax`` is one block on a GPU
        starts = ((positions - firsts[group]) % BLOCK == 0).nonzero().flatten()
        ends = torch.cat([starts, starts.new_full((1,), len(rows))])
        rows = torch.segment_reduce(rows, "sum", lengths=ends.diff(), axis=0, unsafe=True)
        if len(rows) == len(firsts):
            return rows
        firsts = torch.searchsorted(starts, firsts)


class OnHost(NamedTuple):
    """Keys int64 ``[m]`` and gradients float32 ``[m, dim]`` as arrays.

    Attributes:
        copied: the gradients are a copy.   arrived: waits until they are there, if they are on their way; keys are.
    """

    keys: np.ndarray
    gradients: np.ndarray
    copied: bool
    arrived: Callable[[], object] | None


def on_host(keys: torch.Tensor, gradients: torch.Tensor) -> OnHost:
    """From a GPU both go to pinned memory, which Torch keeps for the next time."""
    gradients = gradients.detach().to(torch.float32).contiguous()
    if not gradients.is_cuda:
        return OnHost(keys.cpu().numpy(), gradients.cpu().numpy(), False, None)
    with torch.cuda.device(gradients.device):
        copies, there = [], []
        for some in (keys, gradients):
            copies.append(torch.empty(some.shape, dtype=some.dtype, pin_memory=True))
            copies[-1].copy_(some, non_blocking=True)
            there.append(torch.cuda.current_stream().record_event())
        there[0].synchronize()
    return OnHost(copies[0].numpy(), copies[1].numpy(), True, there[1].synchronize)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _of_all_processes(own: _Part | None, dim: int, kind: str, group: Any) -> _Part | None:
    """The sum or mean of the gradients of all processes of a group; the same bits in each. A collective call."""
    world = torch.distributed.get_world_size(group)
    if world == 1:
        return own
    where = own.gradients.device if own is not None else torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device()) if _wants_cuda(group) else torch.device("cpu")
    keys = torch.empty(0, dtype=torch.int64) if own is None else own.keys
    gradients = torch.empty(0, dim) if own is None else own.gradients
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    torch.distributed.all_gather(counts, torch.tensor([len(keys)], device=device), group=group)
    lengths = [int(count) for count in counts]
    most = max(lengths)
    if not most:
        return own
    parts = []
    for mine in (keys, gradients):
        padded = mine.new_zeros((most, *mine.shape[1:]), device=device)
        padded[: len(mine)] = mine
        theirs = [torch.empty_like(padded) for _ in range(world)]
        torch.distributed.all_gather(theirs, padded, group=group)
        parts.append([some[:length].to(where) for some, length in zip(theirs, lengths, strict=True)])
    total = _summed([_Part(*some) for some in zip(*parts, strict=True)])
    return total if kind == "sum" else total._replace(gradients=total.gradients / world)


def _wants_cuda(group: Any) -> bool:
    backend = str(torch.distributed.get_backend(group)).lower()
    return "nccl" in backend and "gloo" not in backend


_known: weakref.WeakKeyDictionary[HPS, dict[str, Rows]] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def parameter_of(request: str, number: int = 0) -> Rows:
    """The trained rows of one of the tables of a request (``frontends/_queries.py``).

    Raises:
        As ``HPS``.
    """
    server, query = tables_of(request)[number]
    spec = server.direct.table_spec(query.model, query.table)
    tables = _known.get(server)
    rows = None if tables is None else tables.get(spec.tag)
    if rows is None:
        with _making:
            tables = _known.setdefault(server, {})
            if spec.tag not in tables:
                tables[spec.tag] = Rows(server, spec.model, spec.name, spec.dim)
            rows = tables[spec.tag]
    return rows
