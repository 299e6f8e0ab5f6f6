"""Internal: what the front ends of this package need of a server beyond its public methods. It may change in any version.

Choice: a part that a front end asks for (``server.direct``), so that ``HPS`` lists what users need. Turned down: front ends
that find tables and caches themselves, which would tie them to the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from hps_numba.cache.cache import EmbeddingCache
from hps_numba.config.spec import TableSpec
from hps_numba.server.catalog import Catalog
from hps_numba.server.fused_tables import FusedLookup
from hps_numba.server.lookups import Lookups
from hps_numba.server.recordings import Recordings
from hps_numba.server.table_writes import RowsChange
from hps_numba.server.writes import Writes

__all__ = ["DirectAccess"]

T = TypeVar("T")


class DirectAccess:
    """Lookups into memory that a front end owns, and the caches that it may call with addresses.

    Attributes:
        key_bits: of the server's keys: 64 or 32 (``supportlonglong``).
        recordings: while ``recordings.active`` is not empty, keys are being recorded (``record_trace``): whoever keeps a cache
            asks the server instead.
        lookup_into, rewrite: see below.

    Thread safety: every method.
    """

    def __init__(self, catalog: Catalog, lookups: Lookups, recordings: Recordings, writes: Writes) -> None:
        self._catalog, self._lookups = catalog, lookups
        self.key_bits = catalog.key_bits
        self.recordings = recordings
        #: ``lookup_into(keys, model_name, table_id, out)``: keys are integers of any shape ``S``, NumPy's; rows are written to
        #: ``out``, float32 ``S + (dim,)``, contiguous, whatever the model's ``output_dtype``. Raises as ``HPS.lookup``, and
        #: ArrayError for ``out``.
        self.lookup_into: Callable[[np.ndarray, str, int | str, np.ndarray], None] = lookups.lookup_into
        #: ``rewrite(keys, change, model_name, table_id)``: as ``HPS.read_modify_write`` of int64 keys ``[n]``, which nobody
        #: changes meanwhile, but the change gets the addresses of rows (``server.table_writes.RowsChange``), and if host memory
        #: is the only tier, all new rows are seen or none.
        self.rewrite: Callable[[np.ndarray, RowsChange, str, int | str], int] = writes.rewrite

    def table_spec(self, model_name: str, table_id: int | str) -> TableSpec:
        """Name, width and default value of a table.

        Raises:
            UnknownModelError: no such model or table.   ClosedError: the server was closed.
        """
        return self._catalog.table(model_name, table_id).spec

    def tables(self, model_name: str) -> tuple[TableSpec, ...]:
        """Name, width and default value of every table of a model, by number.

        Raises:
            UnknownModelError: no such model.   ClosedError: the server was closed.
        """
        return tuple(table.spec for table in self._catalog.model(model_name).tables)

    def loaded(self, model_name: str) -> object:
        """What stands for a model from its load to its unload: hooks of ``HPS.on_version`` last as long.

        Raises:
            UnknownModelError: no such model.   ClosedError: the server was closed.
        """
        return self._catalog.model(model_name).versions

    def has_slower_tiers(self, model_name: str) -> bool:
        """Whether a lookup may wait for tiers that are slower than host memory.

        Raises:
            UnknownModelError: no such model.   ClosedError: the server was closed.
        """
        return self._catalog.model(model_name).has_slower_tiers

    def read_one_version(self, model_name: str, read: Callable[[], T]) -> tuple[T, int]:
        """What ``read`` returns of several tables, all of one version of the model, and its number.

        Raises:
            UnknownModelError, ClosedError: as ``HPS.lookup``.
        """
        model = self._catalog.model(model_name)
        return model.switch.read_one_version(lambda: (read(), model.version))

    def of_version(self, model_name: str, number: int, answer: Callable[[], T]) -> T:
        """What ``answer`` returns, all of version ``number`` of a model; it is called again if a switch overtakes it.

        Raises:
            VersionError: another one is in force.   UnknownModelError, ClosedError: as ``HPS.lookup``.
        """
        return self._lookups.of_version(model_name, number, answer)

    def read(self, keys: np.ndarray, model_name: str, table_id: int | str) -> tuple[np.ndarray, np.ndarray]:
        """Rows past the caches, of int64 keys ``[n]``: float32 ``[n, dim]``, and bool ``[n]``, which keys have one.

        Raises:
            UnknownModelError, ClosedError: as ``HPS.lookup``.   TierError: a slower tier failed, so that this is not known.
        """
        return self._catalog.table(model_name, table_id).writes.read(keys)

    def cache_on(self, device: int, model_name: str, table_id: int | str) -> EmbeddingCache | None:
        """The cache of a table on a GPU; None if there is none, if lookups may have to wait for slower tiers, or if answers are
        not float32.

        Once server or model are closed it raises ClosedError; then ``HPS.lookup`` says why.

        Raises:
            UnknownModelError, DeviceError, ClosedError: as ``HPS.lookup``.
        """
        table = self._catalog.table(model_name, table_id, device)
        cache = table.cache_on(device)
        return cache if table.pools_on(cache, 0) and table.output_type == "float32" else None

    def fused_lookup_on(self, device: int, model_name: str, tables: Sequence[int | str]) -> FusedLookup | None:
        """``cache_on`` for several tables of a model, which are then looked up in as few launches as possible.

        Raises:
            UnknownModelError, DeviceError, ClosedError: as ``HPS.lookup``.
        """
        model = self._catalog.model(model_name, device)
        served = [model.table(table) for table in tables]
        if any(table.output_type != "float32" for table in served):
            return None
        return model.groups.on(device, served)

    def can_pool_on(self, device: int, model_name: str, table_id: int | str, n: int) -> bool:
        """``HPS.lookup_pooled`` serves ``n`` keys in the memory of this GPU there, unless ``max_norm`` is given.

        Raises:
            UnknownModelError, DeviceError, ClosedError: as ``HPS.lookup``.
        """
        table = self._catalog.table(model_name, table_id, device)
        return table.pools_on(table.cache_on(device), n)
