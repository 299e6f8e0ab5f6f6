"""How a parameter server answers: keys of any kind, where they are, one table or several, rows or bags.

Keys in host memory: ``HPS.lookup`` (server/hps.py) -> ``Lookups.lookup`` (here) -> ``ServedTable.lookup`` (server/table.py) ->
``HostStore.lookup`` (storage/host/store.py) -> ``host_lookup`` (kernels/host/lookup.py). A small batch in arrays as kernels
take them: ``Lookups.lookup`` -> ``PlainLookups`` (storage/host/plain.py) -> ``host_lookup_plain``. Keys on a GPU:
``Lookups.lookup`` -> ``ServedTable.lookup_cached`` -> ``EmbeddingCache.lookup`` (cache/cache.py) -> ``lookup_kernel``
(kernels/cache/lookup.py). The caller's arrays are opened and the answer is handed over by ``arrays.batch``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np

from hps_numba.arrays.bags import COMBINERS, MAX_KEYS, as_device_bags, as_host_bags
from hps_numba.arrays.batch import DeviceBatch, HostBatch, check_rows
from hps_numba.arrays.cuda import device_of_array
from hps_numba.arrays.dlpack import is_capsule
from hps_numba.arrays.dlpack_moves import MovedBatch, keys_on_host, settle, write_rows
from hps_numba.arrays.encodings import as_key
from hps_numba.arrays.host import as_keys, as_rows
from hps_numba.arrays.plain_tensors import PlainTensors
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.config.arguments import as_device, as_flag, as_max_norm, as_padding, as_word
from hps_numba.errors import ArrayError, ClosedError, KeyDtypeError
from hps_numba.server.catalog import Catalog
from hps_numba.server.fused_tables import FusedLookup
from hps_numba.server.model import ServedModel
from hps_numba.server.recordings import Recordings
from hps_numba.server.replays import Replaying
from hps_numba.server.table import PlainLookup, ServedTable
from hps_numba.storage.host.content import apart
from hps_numba.storage.host.pooling import Bags, without_padding

__all__ = ["Lookups"]

_MAX_PLAIN = 10_000  # names of tables: with keys on a GPU, any number may stand for the device
T = TypeVar("T")


class Lookups:
    """Lookups of a server; ``server.hps.HPS`` says what each takes, returns and raises.

    Args:
        catalog: where models and tables are found.   recordings: told of the keys that are looked up.

    Thread safety: every method from any thread; none takes a lock.
    """

    def __init__(self, catalog: Catalog, recordings: Recordings) -> None:
        self._catalog = catalog
        self._recordings = recordings
        self._key_bits = catalog.key_bits

    def lookup(
        self,
        keys: Any,
        model_name: str,
        table_id: int | str,
        device_id: int | None = 0,
        out: Any = None,
        stream: Any = None,
    ) -> Any:
        """As ``HPS.lookup``."""
        kind = type(keys)
        device = None if kind is np.ndarray else device_of_array(keys)
        if not self._recordings.active:
            named = model_name, table_id, type(table_id), device_id, type(device_id), device, kind
            try:
                plain = self._catalog.models.plain.get(named)
            except TypeError:  # the name of no table
                plain = None
            rows = (plain or self._find_plain(named))(keys, out, stream)
            if rows is not None:
                return rows
        model = self._catalog.model(model_name, device_id if device is None else device)
        return self._answer(model, model.table(table_id), keys, device, out, stream)

    def _find_plain(self, named: tuple[Any, ...]) -> PlainLookup:
        """The plain lookup for keys of a kind on a device, which is known from now on."""
        model_name, table_id, _, device_id, _, device, kind = named
        models = self._catalog.models
        model = self._catalog.model(model_name, device_id if device is None else device)
        plain = model.table(table_id).plain_lookup(kind, device, self._key_bits) or _not_plain
        lasting = type(table_id) in (int, str) and type(device_id) in (int, type(None))  # of others the value may change
        lasting = lasting and (plain is not _not_plain or kind is np.ndarray)  # others are rare, or there is no end of them
        if lasting and models.get(model_name) is model and len(models.plain) < _MAX_PLAIN:
            models.plain[named] = plain
        return plain

    def _answer(
        self,
        model: ServedModel,
        table: ServedTable,
        keys: Any,
        device: int | None,
        out: Any = None,
        stream: Any = None,
        larger: bool = False,
        out_name: str = "out",
    ) -> Any:
        """The rows of keys that are on a GPU, or for ``device`` None in host memory."""
        cache = None if device is None else table.cache_on(device)
        if cache is not None:
            type_, bits = table.output_type, self._key_bits
            there = DeviceBatch(keys, table.spec.dim, type_, bits, out, stream, larger=larger, out_name=out_name)
            return self._launch(model, table, cache, there)
        since = table.cached_lookups.begin()
        batch = HostBatch(keys, table.spec.dim, table.output_type, self._key_bits, out, larger=larger, out_name=out_name)
        self._fill(model, table, batch.keys, batch.rows)
        rows = batch.result()
        if since:
            table.cached_lookups.end(since)
        return rows

    def _launch(self, model: ServedModel, table: ServedTable, cache: EmbeddingCache, batch: DeviceBatch | MovedBatch) -> Any:
        """The rows of a batch on a GPU, or of its bags; returns when the work is on the stream."""
        since = 0 if table.slow_path is None else cache.calls.begin()  # else the cache times its calls itself
        try:
            if batch.bags is None:
                table.lookup_cached(cache, batch.keys, batch.address, batch.stream)
            else:
                table.pool_cached(cache, batch.bags, batch.address, batch.stream)
        except ClosedError as problem:
            self._catalog.explain(model, problem)
        if self._recordings.active:
            self._recordings.record_on_device(table, batch.keys, batch.stream)
        if since:
            cache.calls.end(since)
        return batch.result()

    def _fill(self, model: ServedModel, table: ServedTable, keys: np.ndarray, rows: np.ndarray) -> None:
        """Write the row of each key, int64 ``[n]``, to float32 ``[n, dim]``."""
        recording = self._recordings.active
        if recording:
            keys = apart(keys, rows)
        try:
            table.lookup(keys, rows)
        except ClosedError as problem:
            self._catalog.explain(model, problem)
        if recording:
            self._recordings.record(table, keys)

    def lookup_fromdlpack(self, keys: Any, out_tensor: Any, model_name: str, table_id: int | str, device_id: int = 0) -> None:
        """As ``HPS.lookup_fromdlpack``."""
        model = self._catalog.model(model_name, device_id)
        table = model.table(table_id)
        device, there = device_of_array(keys), device_of_array(out_tensor)
        settle(keys, out_tensor)
        cache = None if device is None else table.cache_on(device)
        how = table.spec.dim, table.output_type, self._key_bits
        if cache is not None and device != there:
            self._launch(model, table, cache, MovedBatch(keys, *how, out_tensor, out_name="out_tensor"))
        elif cache is None and there is not None and is_capsule(out_tensor):
            batch, finish = write_rows(keys_on_host(keys), *how, out_tensor, out_name="out_tensor")
            self._fill(model, table, batch.keys, batch.rows)
            finish()
        else:
            given = keys if cache is not None else keys_on_host(keys)
            self._answer(model, table, given, device if given is keys else None, out_tensor, larger=True, out_name="out_tensor")
        settle(keys, out_tensor)

    def lookup_into(self, keys: np.ndarray, model_name: str, table_id: int | str, out: np.ndarray) -> None:
        """As ``DirectAccess.lookup_into``."""
        if not self._recordings.active:
            named = model_name, table_id, type(table_id), None, type(None), None, np.ndarray
            plain = self._catalog.models.plain.get(named) or self._find_plain(named)
            some, rows = keys, out
            if keys.ndim != 1 and out.flags.c_contiguous and out.shape[:-1] == keys.shape:
                some, rows = keys.reshape(-1), out.reshape(-1, out.shape[-1])
            if plain(some, rows, None) is not None:
                return
        model = self._catalog.model(model_name)
        table = model.table(table_id)
        since = table.cached_lookups.begin()
        flat, shape, _ = as_keys(keys, key_bits=self._key_bits)
        dim = table.spec.dim
        check_rows(out, (*shape, dim))
        self._fill(model, table, flat, out if out.ndim == 2 else out.reshape(-1, dim))
        if since:
            table.cached_lookups.end(since)

    def prefetch(self, keys: Any, model_name: str, table_id: int | str, device_id: int | None, *, wait: bool) -> bool:
        """As ``HPS.prefetch``."""
        model = self._catalog.model(model_name, device_id)
        table = model.table(table_id)
        flat = as_keys(keys, key_bits=self._key_bits).flat
        caches: list[EmbeddingCache] = []
        if table.caches is not None:
            chosen = [table.cache_on(device_id) or table.cache_on(None)] if device_id is not None else table.caches
            caches = [cache for cache in chosen if cache is not None]
        if not len(flat):
            return True
        if not wait:
            return model.prefetches.request(table, flat.copy(), caches)
        try:
            model.prefetches.run(table, flat, caches)
        except ClosedError as problem:
            self._catalog.explain(model, problem)
        return True

    def replaying(self, model_name: str, device_id: int, stream: Any) -> Replaying:
        """As ``HPS.replaying``."""
        device = as_device(device_id)
        model = self._catalog.model(model_name, device)
        work = model.replays.work_on(device, model.tables)
        return Replaying(model.replays, work, stream, partial(self._catalog.explain, model))

    # -- bags ---------------------------------------------------------------------

    def lookup_pooled(
        self,
        keys: Any,
        offsets: Any,
        model_name: str,
        table_id: int | str,
        device_id: int | None = 0,
        *,
        weights: Any = None,
        combiner: str = "sum",
        max_norm: float | None = None,
        padding: int | None = None,
        include_last_offset: bool = True,
        out: Any = None,
        stream: Any = None,
    ) -> Any:
        """As ``HPS.lookup_pooled``."""
        device = None if type(keys) is np.ndarray else device_of_array(keys)
        model = self._catalog.model(model_name, device_id if device is None else device)
        table = model.table(table_id)
        cache = None if device is None else table.cache_on(device)
        bits = self._key_bits
        if cache is not None and max_norm is None and table.pools_on(cache, math.prod(keys.shape)):
            bags = as_device_bags(
                keys,
                offsets,
                weights,
                as_word(combiner, "combiner", COMBINERS),
                None if padding is None else as_padding(padding),
                key_bits=bits,
                include_last_offset=as_flag(include_last_offset, "include_last_offset"),
                stream=stream,
            )
            there = DeviceBatch(keys, table.spec.dim, table.output_type, bits, out, stream, bags=bags)
            return self._launch(model, table, cache, there)
        ends = as_flag(include_last_offset, "include_last_offset")
        given = as_host_bags(keys, offsets, weights, key_bits=bits, include_last_offset=ends)
        flat, starts, factors = given
        if padding is not None:
            flat, starts, factors = without_padding(flat, starts, factors, as_key(as_padding(padding), key_bits=bits))
        return self._pool(
            model, table, Bags(flat, starts, factors, as_word(combiner, "combiner", COMBINERS), as_max_norm(max_norm)), out
        )

    def _pool(self, model: ServedModel, table: ServedTable, bags: Bags, out: np.ndarray | None) -> np.ndarray:
        shape = (len(bags), table.spec.dim)
        rows = np.empty(shape, np.float32) if out is None else out
        if not isinstance(rows, np.ndarray):
            raise ArrayError(f"out: expected contiguous writable float32{list(shape)} of NumPy, got {type(out).__name__}")
        check_rows(rows, shape)
        if out is not None:
            bags = bags.apart_from(out)
        try:
            table.lookup_pooled(bags, rows)
        except ClosedError as problem:
            self._catalog.explain(model, problem)
        if self._recordings.active:
            self._recordings.record(table, bags.keys)
        return rows

    # -- versions ---------------------------------------------------------------------

    def of_version(self, model_name: str, number: int, answer: Callable[[], T]) -> T:
        """What ``answer`` returns, all of version ``number`` of a model; it is called again if a switch overtakes it.

        Raises:
            VersionError: another one is in force.   UnknownModelError, ClosedError: as ``HPS.lookup``.
        """
        model = self._catalog.model(model_name)

        def read() -> T:
            model.versions.check(number)
            return answer()

        return model.switch.read_one_version(read)

    # -- several tables ---------------------------------------------------------------------

    def lookup_many(self, keys: Any, model_name: str, device_id: int = 0, *, flat: bool = False) -> Any:
        """As ``HPS.lookup_many``."""
        model = self._catalog.model(model_name, device_id)
        named = not isinstance(keys, (list, tuple)) and isinstance(keys, Mapping)  # asking an abstract class takes long
        if not named and not hasattr(keys, "__iter__"):
            raise KeyDtypeError(f"keys: expected a sequence or mapping with the keys of each table, got {type(keys).__name__}")
        try:
            parts = list(keys.items() if named else enumerate(keys))
        except Exception as problem:  # whatever a foreign sequence raises
            raise KeyDtypeError(f"keys: expected the keys of each table, got {type(problem).__name__}") from problem
        tables = [(model.table(table_id), some) for table_id, some in parts]
        answers = model.switch.read_one_version(partial(self._answer_many, model, tables))
        if flat is not False and as_flag(flat, "flat"):
            return np.concatenate([_on_host(rows).reshape(-1) for rows in answers] or [np.empty(0, np.float32)])
        return dict(zip(keys, answers, strict=True)) if named else answers

    def _answer_many(self, model: ServedModel, tables: Sequence[tuple[ServedTable, Any]]) -> list[Any]:
        """Rows of several tables: those with keys on one GPU in as few launches as possible."""
        devices = [device_of_array(some) for _, some in tables]
        device = devices[0] if len(tables) > 1 and not self._recordings.active else None
        if device is not None and set(devices) == {device} and len({table.output_type for table, _ in tables}) == 1:
            deployed = self._catalog.model(model.name, device)
            fused = deployed.groups.on(device, [table for table, _ in tables])
            if fused is not None:
                return self._answer_fused(model, device, fused, tables)
        return [self._answer_one(model, table, some, where) for (table, some), where in zip(tables, devices)]

    def _answer_one(self, model: ServedModel, table: ServedTable, keys: Any, device: int | None) -> Any:
        """The rows of one of several tables."""
        plain = None if self._recordings.active else table.plain_lookup(type(keys), device, self._key_bits)
        rows = None if plain is None else plain(keys, None, None)
        return self._answer(model, table, keys, device) if rows is None else rows

    def _answer_fused(
        self, model: ServedModel, device: int, fused: FusedLookup, tables: Sequence[tuple[ServedTable, Any]]
    ) -> list[Any]:
        """Rows of tables with keys on one GPU: together, or one by one where keys differ in kind or are too many."""
        plain = self._launch_plain(device, fused, tables)
        if plain is not None:
            return plain
        batches = [DeviceBatch(some, table.spec.dim, table.output_type, self._key_bits) for table, some in tables]
        first = batches[0].keys
        alike = all(batch.keys.form == first.form and batch.keys.kind == first.kind for batch in batches)
        small = max(batch.keys.n for batch in batches) <= MAX_KEYS
        if alike and small and _launch_fused(fused, batches, tables[0][0].output_type):
            return [batch.result() for batch in batches]
        rows = []
        for (table, _), batch in zip(tables, batches):
            cache = table.cache_on(device)
            assert cache is not None  # it is one of those that are fused
            rows.append(self._launch(model, table, cache, batch))
        return rows

    def _launch_plain(self, device: int, fused: FusedLookup, tables: Sequence[tuple[ServedTable, Any]]) -> list[Any] | None:
        """``_answer_fused`` of plain tensors; None if some are not, or differ, or if it could not be launched."""
        lookups = [table.plain_lookup(type(some), device, self._key_bits) for table, some in tables]
        opened: list[tuple[Any, int, int, int, str]] = []
        for lookup, (_, some) in zip(lookups, tables):
            found = lookup.open(some) if isinstance(lookup, PlainTensors) else None
            if found is None or found[1] > MAX_KEYS or (opened and found[4] != opened[0][4]):
                return None
            opened.append(found)
        rows, counts, keys, outs, forms = zip(*opened)
        first = cast("PlainTensors", lookups[0])
        try:
            fused.lookup(keys, counts, outs, first.stream(), key_form=forms[0], out_type=tables[0][0].output_type)
        except ClosedError:
            return None
        return list(rows)


def _launch_fused(fused: FusedLookup, batches: Sequence[DeviceBatch], output_type: str) -> bool:
    """Look up all batches; False if the policy changed, and with it what is fused, or if a cache was closed, which says so."""
    try:
        fused.lookup(
            [batch.keys.address for batch in batches],
            [batch.keys.n for batch in batches],
            [batch.address for batch in batches],
            batches[0].stream,
            key_form=batches[0].keys.form,
            out_type=output_type,
        )
    except ClosedError:
        return False
    return True


def _not_plain(keys: Any, out: Any, stream: Any) -> None:
    """Where no call is plain."""


def _on_host(rows: Any) -> np.ndarray:
    """An answer as NumPy's."""
    return np.asarray(rows) if device_of_array(rows) is None else as_rows(rows, tuple(rows.shape))
