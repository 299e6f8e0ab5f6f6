"""The short path on a GPU: a request bound to the cache that answers it, until that is closed. Knows no framework.

The first call for a request finds its server, its tables and their caches; later calls call the cache with addresses. Whatever
takes more than the kernels of caches (slower tiers, answers that are not float32, keys that are being recorded) is left to the
server: the binding is missing then, or its call returns False.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from hps_numba.errors import ClosedError
from hps_numba.frontends._queries import TableQuery, tables_of
from hps_numba.server.direct_access import DirectAccess
from hps_numba.server.hps import HPS

__all__ = ["Binding", "Bindings", "FusedCaches", "TableCache", "can_pool", "find_cache", "find_fused"]


class TableCache(Protocol):
    """The cache of one table on a GPU, called with addresses; ClosedError if it is closed."""

    @property
    def dim(self) -> int:
        """Elements of a row."""

    def lookup(self, keys: int, n: int, out: int, stream: int, *, key_form: str) -> object:
        """Write the row of each of ``n`` keys to ``out``, float32, in the order of a stream."""

    def pool(
        self,
        keys: int,
        n: int,
        offsets: int,
        bags: int,
        out: int,
        stream: int,
        *,
        combiner: str,
        weights: int,
        options: int,
        key_form: str,
    ) -> object:
        """Write the pooled row of each bag to ``out``, float32, in the order of a stream."""


class FusedCaches(Protocol):
    """The caches of several tables on a GPU, called with lists of addresses and counts; ClosedError if one is closed."""

    def lookup(self, keys: Sequence[int], counts: Sequence[int], outs: Sequence[int], stream: int, *, key_form: str) -> object:
        """``TableCache.lookup`` for every table."""

    def lookup_stacked(
        self, keys: int, key_step: int, n: int, out: int, out_step: int, stream: int, *, key_form: str
    ) -> object:
        """``lookup`` of ``n`` keys of every table, one table after the other, so many bytes apart."""


Cache = TypeVar("Cache", TableCache, FusedCaches)
Encodings = Mapping[int, Mapping[Any, str]]
At = tuple[str, int]  # the text of a request and the number of a GPU


class Binding(Generic[Cache]):
    """A request bound to what answers it on one GPU.

    Attributes:
        dim: elements of a row of the first table.
        encodings: key encoding by the front end's dtype of the keys.

    Thread safety: every method.
    """

    __slots__ = ("_at", "_cache", "_known", "_look_up", "_recordings", "dim", "encodings")

    def __init__(
        self, known: dict[At, Binding[Cache]], at: At, direct: DirectAccess, dim: int, cache: Cache, encodings: Encodings
    ) -> None:
        self._known: dict[At, Binding[Cache]] = known
        self._at, self._recordings = at, direct.recordings
        self._cache: Cache = cache
        self._look_up: Callable[..., object] = cache.lookup
        self.dim = dim
        self.encodings = encodings[direct.key_bits]

    def lookup(self, keys: Any, n: Any, out: Any, stream: int, form: str) -> bool:
        """Call ``lookup`` of the cache or the caches.

        Returns:
            False if the server has to be asked instead: keys are being recorded, or the cache was closed meanwhile; the server
            then says who was closed, or a new cache answers.
        """
        if self._recordings.active:
            return False
        try:
            self._look_up(keys, n, out, stream, key_form=form)
        except ClosedError:
            self._unbind()
            return False
        return True

    def lookup_stacked(
        self: Binding[FusedCaches], keys: int, key_step: int, n: int, out: int, out_step: int, stream: int, form: str
    ) -> bool:
        """Call ``lookup_stacked`` of the caches; returns as ``lookup``."""
        if self._recordings.active:
            return False
        try:
            self._cache.lookup_stacked(keys, key_step, n, out, out_step, stream, key_form=form)
        except ClosedError:
            self._unbind()
            return False
        return True

    def pool(
        self: Binding[TableCache],
        keys: int,
        n: int,
        offsets: int,
        bags: int,
        out: int,
        stream: int,
        form: str,
        combiner: str,
        weights: int,
        options: int,
    ) -> bool:
        """Call ``pool`` of the cache of a table; returns as ``lookup``."""
        if self._recordings.active:
            return False
        try:
            self._cache.pool(
                keys, n, offsets, bags, out, stream, combiner=combiner, weights=weights, options=options, key_form=form
            )
        except ClosedError:
            self._unbind()
            return False
        return True

    def _unbind(self) -> None:
        self._known.pop(self._at, None)


class Bindings(dict[At, "Binding[Cache]"]):
    """Bindings by the text of a request and the number of a GPU: ``bindings[text, device]`` binds what is not bound yet.

    Gives None, and keeps nothing, where an answer takes more than the kernels of caches.

    Args:
        find: the caches of the tables of a request on a GPU, or None.
        encodings: by key bits, then by the front end's dtype of keys: the key encoding.

    Raises (when asked for one):
        As ``HPS``.
    """

    def __init__(self, find: Callable[[int, list[tuple[HPS, TableQuery]]], Cache | None], encodings: Encodings) -> None:
        super().__init__()
        self._find: Callable[[int, list[tuple[HPS, TableQuery]]], Cache | None] = find
        self._encodings = encodings

    def __missing__(self, at: At) -> Binding[Cache] | None:
        request, device = at
        tables = tables_of(request)
        cache = self._find(device, tables)
        if cache is None:
            return None
        server, query = tables[0]
        made = self[at] = Binding(self, at, server.direct, query.dim, cache, self._encodings)
        return made


def find_cache(device: int, tables: list[tuple[HPS, TableQuery]]) -> TableCache | None:
    """The cache of the one table of a request on a GPU."""
    ((server, query),) = tables
    return server.direct.cache_on(device, query.model, query.table)


def find_fused(device: int, tables: list[tuple[HPS, TableQuery]]) -> FusedCaches | None:
    """The caches of the tables of a request on a GPU, if they are of one model."""
    server, model = tables[0][0], tables[0][1].model
    if any(other is not server or query.model != model for other, query in tables):
        return None
    return server.direct.fused_lookup_on(device, model, [query.table for _, query in tables])


def can_pool(request: str, device: int, n: int) -> bool:
    """A server pools ``n`` keys of a request for one table on their GPU: by its binding, or by ``HPS.lookup_pooled``.

    Raises:
        As ``HPS``.
    """
    ((server, query),) = tables_of(request)
    return server.direct.can_pool_on(device, query.model, query.table, n)
