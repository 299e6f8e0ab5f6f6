"""How a parameter server answers: keys of any kind, where they lie, one table or several, rows or bags.

Keys in host memory: ``HPS.lookup`` (here) -> ``ServedTable.lookup`` (table.py) -> ``HostStore.lookup``
(storage/host/store.py) -> ``kernels.host.lookup`` (kernels/host/lookup.py). Keys on a GPU: ``HPS.lookup`` ->
``ServedTable.lookup_cached`` -> ``EmbeddingCache.lookup`` (cache/lookup.py) -> ``lookup_kernel`` (kernels/cache/lookup.py) and
``insert_kernel``.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from hps_numba.arrays.bags import MAX_KEYS, DeviceBags, as_device_bags, as_key
from hps_numba.arrays.cuda import (
    DeviceKeys,
    as_device_keys,
    as_device_output,
    device_of_array,
    new_device_output,
    stream_handle,
)
from hps_numba.arrays.host import NUMPY, as_keys, as_output, as_rows, new_output, wrap_output
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.device import driver
from hps_numba.errors import ArrayError, ClosedError, DeviceError, KeyDtypeError, UnknownModelError
from hps_numba.server.fused_tables import FusedLookup
from hps_numba.server.model import ServedModel
from hps_numba.server.table import ServedTable
from hps_numba.storage.host.pooling import Bags, without_padding
from hps_numba.traces.recording import TraceRecording

__all__ = ["ServerLookups"]


class ServerLookups:
    """Lookups of a parameter server; ``server.hps.HPS`` builds and changes what is looked up."""

    _models: dict[str, ServedModel]
    _recordings: tuple[tuple[ServedTable, TraceRecording], ...]
    _changing: threading.RLock
    _wide: bool
    _closed: bool

    def lookup(
        self,
        keys: Any,
        model_name: str,
        table_id: int | str,
        device_id: int | None = 0,
        *,
        out: Any = None,
        stream: Any = None,
    ) -> Any:
        """The rows of a batch of keys.

        Args:
            keys: integers of any shape ``S``: a list, a NumPy, Torch, TF, CuPy or JAX array, anything with DLPack. 64-bit
                servers take any integer dtype; 32-bit servers (``supportlonglong`` false) the bits of int32 and uint32, and
                wider integers that fit.
            model_name: a deployed model.
            table_id: number of the table in its model, or its name.
            device_id: one of the model's ``deployed_device_list``, or None: any; keys in the memory of a GPU are looked up on
                that GPU.
            out: array of shape ``S + (dim,)`` and of the dtype of the answer, to write to and return.
            stream: CUDA stream to work on (a handle, or a stream of any framework); by default the current one of the keys'
                framework. Ignored for keys in host memory, which are answered from host memory.

        Returns:
            float32 (or the model's ``output_dtype``) ``S + (dim,)``, an array of the same kind as ``keys`` (NumPy for
            lists), or ``out``. A key that no tier has gets the table's default value.

        Raises:
            KeyDtypeError: keys are not integers or do not fit the key width.
            UnknownModelError: no such model or table.   DeviceError: ``device_id`` is not deployed.
            TierError: the answer of a slower tier breaks its contract.
            ClosedError: the server was closed.
        """
        device = None if type(keys) is np.ndarray else device_of_array(keys)
        deployment = self._deployment(model_name, device_id if device is None else device)
        return self._lookup(deployment, deployment.table(table_id), keys, out, device, stream)

    def _lookup(
        self,
        deployment: ServedModel,
        table: ServedTable,
        keys: Any,
        out: Any = None,
        device: int | None = None,
        stream: Any = None,
    ) -> Any:
        cache = None if device is None else table.cache_on(device)
        if cache is not None:
            there = as_device_keys(keys, wide=self._wide, stream=stream)
            return self._answer_on_device(deployment, table, cache, there, (*there.shape, table.spec.dim), out, stream)
        batch = as_keys(keys, wide=self._wide)
        shape = (*batch.shape, table.spec.dim)
        if out is None:
            rows = new_output(batch.kind, shape, table.output_dtype)
            self._answer(deployment, table, batch.flat, rows)
            return rows if batch.kind is NUMPY else wrap_output(rows, batch.kind)
        rows, finish = as_output(out, shape, table.output_dtype)
        self._answer(deployment, table, batch.flat, rows)
        finish()
        return out

    def _answer_on_device(
        self,
        deployment: ServedModel,
        table: ServedTable,
        cache: EmbeddingCache,
        keys: DeviceKeys,
        shape: tuple[int, ...],
        out: Any,
        stream: Any,
        bags: DeviceBags | None = None,
        larger: bool = False,
    ) -> Any:
        """The rows of keys in the memory of a GPU, or of ``bags`` of them; returns when the work is on the stream."""
        handle = stream_handle(stream, keys.kind, keys.device)
        if out is None:
            rows, address = new_device_output(keys.kind, shape, table.output_type, stream=stream)
            finish, keep = None, rows
        else:
            rows = out
            address, finish, keep = as_device_output(out, shape, table.output_type, keys.device, larger=larger, stream=handle)
        try:
            if bags is None:
                table.lookup_cached(cache, keys, address, handle)
            else:
                table.pool_cached(cache, bags, address, handle)
        except ClosedError as problem:
            self._say_who_closed(deployment, problem)
        if self._recordings:
            self._record_on_device(table, keys, handle)
        if finish is not None:
            finish()
        del keep
        return rows

    def _say_who_closed(self, deployment: ServedModel, problem: ClosedError) -> NoReturn:
        """Raise what a caller is to know: the server was closed, or a model was unloaded meanwhile."""
        if self._closed:
            raise ClosedError("the server is closed") from problem
        if self._models.get(deployment.name) is deployment:
            raise problem
        raise UnknownModelError(f"model_name: {deployment.name!r} was unloaded during the lookup") from problem

    def _answer(self, deployment: ServedModel, table: ServedTable, keys: np.ndarray, rows: np.ndarray) -> None:
        """Look up into ``rows``, which may be of another dtype than float32."""
        flat = rows.reshape(-1, table.spec.dim)
        wide = flat if rows.dtype == np.float32 else np.empty(flat.shape, np.float32)
        try:
            table.lookup(keys, wide)
        except ClosedError as problem:
            self._say_who_closed(deployment, problem)
        if self._recordings:
            self._record(table, keys)
        if wide is not flat:
            flat[:] = wide

    def lookup_into(self, keys: np.ndarray, model_name: str, table_id: int | str, out: np.ndarray) -> None:
        """``lookup`` for front ends: keys and rows are NumPy's, and rows are float32 whatever the model's ``output_dtype``.

        Args:
            keys: integers of any shape ``S``.   out: float32 ``S + (dim,)``, contiguous; all of it is written.

        Raises:
            As ``lookup``; ArrayError for ``out``.
        """
        deployment = self._deployment(model_name)
        table = deployment.table(table_id)
        batch = as_keys(keys, wide=self._wide)
        shape = (*batch.shape, table.spec.dim)
        _check_rows(out, shape)
        self._answer(deployment, table, batch.flat, out)

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
        open_end: bool = False,
        out: Any = None,
        stream: Any = None,
    ) -> Any:
        """The rows of each bag of keys, combined to one row in the pass that reads them (spec 2.3).

        Args:
            keys: integers ``[n]``, as for ``lookup``.
            offsets: integers ``[bags + 1]``: where each bag begins, and the end of the last; ascending from 0 to ``n``.
            weights: numbers ``[n]``, or None: all are 1.
            combiner: ``sum``; ``mean``, over the sum of weights; ``sqrtn``, over the root of the sum of their squares (0 where
                the divisor is 0); ``max``, whatever the weights.
            max_norm: rows are clipped to this Euclidean norm before they are weighted, or None.
            padding: a key that does not count, or None.
            open_end: ``offsets`` are without the last, ``[bags]``.
            out: ``[bags, dim]``, contiguous, to write to and return: NumPy float32, or as for ``lookup`` on a GPU.
            stream: as for ``lookup``.

        Returns:
            NumPy float32 ``[bags, dim]``: sums in float32 in the order of keys. A bag without keys gets 0; a key that no tier
            has counts with the table's default value.

        Keys in the memory of a GPU that has a cache of the table are served there, with offsets and weights that are there
        too: an array of the keys' framework, of the model's ``output_dtype``, in stream order; offsets are then not checked.
        Tables with slower tiers, and ``max_norm``, take keys to the host.

        Raises:
            As ``lookup``; ConfigError (a ValueError) if offsets, combiner or bound do not fit; ArrayError for ``weights`` and
            ``out``.
        """
        device = None if type(keys) is np.ndarray else device_of_array(keys)
        deployment = self._deployment(model_name, device_id if device is None else device)
        table = deployment.table(table_id)
        cache = None if device is None else table.cache_on(device)
        if cache is not None and max_norm is None and table.pools_on(cache, math.prod(keys.shape)):
            bags = as_device_bags(keys, offsets, weights, combiner, padding, wide=self._wide, open_end=open_end, stream=stream)
            shape = (bags.count, table.spec.dim)
            return self._answer_on_device(deployment, table, cache, bags.keys, shape, out, stream, bags)
        flat = as_keys(keys, wide=self._wide).flat
        starts = as_keys(offsets, wide=True, place="offsets").flat
        if weights is not None:
            weights = as_rows(weights, (len(flat),), place="weights")
        if open_end:
            starts = np.append(starts, len(flat))
        if padding is not None:
            flat, starts, weights = without_padding(flat, starts, weights, as_key(padding, wide=self._wide))
        host_bags = Bags(flat, starts, weights, combiner, None if max_norm is None else float(max_norm))
        shape = (len(host_bags), table.spec.dim)
        out = np.empty(shape, np.float32) if out is None else out
        _check_rows(out, shape)
        try:
            table.lookup_pooled(host_bags, out)
        except ClosedError as problem:
            self._say_who_closed(deployment, problem)
        if self._recordings:
            self._record(table, flat)
        return out

    def cache_on(self, device: int, model_name: str, table_id: int | str) -> EmbeddingCache | None:
        """The cache of a table on a GPU, for callers with addresses that ask again and again; None if there is none, if
        lookups may have to wait for slower tiers, or if answers are not float32.

        Once server or model are closed it raises ClosedError; then ``lookup`` says why.

        Raises:
            UnknownModelError, DeviceError, ClosedError: as ``lookup``.
        """
        table = self._table(model_name, table_id, device)
        cache = table.cache_on(device)
        return cache if table.pools_on(cache, 0) and table.output_type == "float32" else None

    @property
    def records(self) -> bool:
        """Keys that are looked up are being recorded (``record_trace``): who keeps a ``cache_on`` asks ``lookup`` meanwhile."""
        return bool(self._recordings)

    @property
    def wide(self) -> bool:
        """Keys have 64 bits (``supportlonglong``)."""
        return self._wide

    def pools_where(self, device: int, model_name: str, table_id: int | str, n: int) -> bool:
        """``lookup_pooled`` serves ``n`` keys in the memory of this GPU there, unless ``max_norm`` is given.

        Raises:
            UnknownModelError, DeviceError, ClosedError: as ``lookup``.
        """
        table = self._table(model_name, table_id, device)
        return table.pools_on(table.cache_on(device), n)

    def lookup_many(self, keys: Any, model_name: str, device_id: int = 0, *, flat: bool = False) -> Any:
        """The rows of several tables of one model, all of the same version of the model.

        A call that a switch of versions overtakes looks up once more, and ``stats`` counts it twice.

        Args:
            keys: a sequence with the keys of each table in table order, or a mapping from table number or name to keys.
                A shorter sequence asks the first tables only.
            flat: return one NumPy vector: the rows of all tables, one after the other in the given order. Rows on a GPU are
                copied to it as float32.

        Returns:
            A list, or a dict with the keys of the mapping, of what ``lookup`` returns.

        Raises:
            As ``lookup``; UnknownModelError if a sequence is longer than the model has tables.
        """
        deployment = self._deployment(model_name, device_id)
        if not isinstance(keys, Iterable):
            raise KeyDtypeError(
                f"keys: {type(keys).__name__} came, a sequence or mapping with the keys of each table is wanted"
            )
        wanted: list[tuple[Any, Any]]
        if isinstance(keys, Mapping):
            wanted = list(keys.items())
        else:
            wanted = list(enumerate(keys))
        tables = [(deployment.table(table_id), some) for table_id, some in wanted]
        while True:
            before = deployment.switches
            if before % 2:
                time.sleep(1e-4)  # a switch of versions takes about as long
                continue
            answers = self._lookup_together(deployment, tables)
            if before == deployment.switches:
                break
        if flat:
            return np.concatenate([_on_host(rows).reshape(-1) for rows in answers] or [np.empty(0, np.float32)])
        if isinstance(keys, Mapping):
            return dict(zip(keys, answers, strict=True))
        return answers

    def _lookup_together(self, deployment: ServedModel, tables: Sequence[tuple[ServedTable, Any]]) -> list[Any]:
        """Rows of several tables: those with keys on one GPU in as few launches as they can be."""
        devices = [device_of_array(some) for _, some in tables]
        device = devices[0] if len(tables) > 1 and not self._recordings else None
        if device is None or set(devices) != {device} or len({table.output_type for table, _ in tables}) > 1:
            return [self._lookup(deployment, table, some, None, place) for (table, some), place in zip(tables, devices)]
        deployment = self._deployment(deployment.name, device)
        together = deployment.groups.on(device, [table for table, _ in tables])
        batches = [as_device_keys(some, wide=self._wide) for _, some in tables]
        first = batches[0]
        alike = all(batch.form == first.form and batch.kind == first.kind for batch in batches)
        if together is None or not alike or max(batch.n for batch in batches) > MAX_KEYS:
            return [self._lookup(deployment, table, some, None, device) for table, some in tables]
        shapes = [(*batch.shape, table.spec.dim) for batch, (table, _) in zip(batches, tables)]
        out_type = tables[0][0].output_type
        outs = [new_device_output(first.kind, shape, out_type) for shape in shapes]
        try:
            together.lookup(
                [batch.address for batch in batches],
                [batch.n for batch in batches],
                [address for _, address in outs],
                stream_handle(None, first.kind, device),
                key_form=first.form,
                out_type=out_type,
            )
        except ClosedError:  # a policy changed, and with it what goes together; or a cache was closed, which it will say itself
            return [self._lookup(deployment, table, some, None, device) for table, some in tables]
        return [rows for rows, _ in outs]

    def fused_lookup_on(self, device: int, model_name: str, tables: Sequence[int | str]) -> FusedLookup | None:
        """``cache_on`` for several tables of a model, which are then looked up in as few launches as they can be.

        Raises:
            UnknownModelError, DeviceError, ClosedError: as ``lookup``.
        """
        deployment = self._deployment(model_name, device)
        sessions = [deployment.table(table) for table in tables]
        if any(session.output_type != "float32" for session in sessions):
            return None
        return deployment.groups.on(device, sessions)

    def lookup_fromdlpack(self, keys: Any, out_tensor: Any, model_name: str, table_id: int | str, device_id: int = 0) -> None:
        """As ``lookup``, from one DLPack capsule to another (spec 4.1). The capsules are not consumed.

        Args:
            keys: capsule (or object with ``__dlpack__``) of integers of any shape and strides, n in all.
            out_tensor: capsule of float32 with room for ``n * dim`` elements; the first are written, in C order.

        Raises:
            As ``lookup``; ArrayError (a ValueError) if ``out_tensor`` is too small, of another dtype or read-only.
        """
        deployment = self._deployment(model_name, device_id)
        table = deployment.table(table_id)
        device = device_of_array(keys)
        cache = None if device is None else table.cache_on(device)
        if cache is not None:
            there = as_device_keys(keys, wide=self._wide)
            shape = (*there.shape, table.spec.dim)
            self._answer_on_device(deployment, table, cache, there, shape, out_tensor, None, larger=True)
            return
        batch = as_keys(keys, wide=self._wide)
        shape = (*batch.shape, table.spec.dim)
        rows, finish = as_output(out_tensor, shape, table.output_dtype, larger=True, place="out_tensor")
        self._answer(deployment, table, batch.flat, rows)
        finish()

    # -- recording what is asked for -------------------------------------------------------

    def record_trace(
        self,
        path: str | Path,
        model_name: str,
        table_id: int | str,
        *,
        rate: float = 1.0,
        every: int = 1,
        limit: int = 10_000_000,
    ) -> TraceRecording:
        """Record the keys that lookups of a table ask for, as a trace for ``hps_numba.simulate``.

        Args:
            path: of the trace, an ``.npy`` file of int64; facts about it go to a JSON file beside it.
            rate: share of the keys to record, chosen by a hash, each with all its requests.
            every: only each so-many-th call counts.
            limit: it ends by itself after so many recorded keys, 8 bytes each.

        Returns:
            The recording, to be closed: ``with server.record_trace("trace.npy", "model", 0, rate=0.01): ...``

        Cost: off, one test a lookup; on, a copy of the keys, or of those chosen, and every 131,072 of them a write. A call with
        keys in the memory of a GPU is waited for if it counts: with ``every`` few are. Replays of a graph are not seen.

        Raises:
            UnknownModelError: no such model or table.   ConfigError: an argument makes no sense.
            TraceError: the file cannot be written.
        """
        table = self._deployment(model_name).table(table_id)
        name = f"{model_name}/{table.spec.name}"
        made = TraceRecording(path, table=name, rate=rate, every=every, limit=limit, on_done=self._stop_recording)
        with self._changing:
            self._recordings = (*self._recordings, (table, made))
        return made

    def _stop_recording(self, done: TraceRecording) -> None:
        with self._changing:
            self._recordings = tuple(entry for entry in self._recordings if entry[1] is not done)

    def _record(self, table: ServedTable, keys: np.ndarray) -> None:
        for recorded, recording in self._recordings:
            if recorded is table:
                recording.saw(keys)

    def _record_on_device(self, table: ServedTable, keys: DeviceKeys, stream: int) -> None:
        with driver.current(keys.device):
            for recorded, recording in self._recordings:
                if recorded is table and not driver.is_capturing(stream):
                    recording.saw_on_device(keys.address, keys.n, keys.form, stream)

    # -- finding tables ---------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the server is closed")

    def _deployment(self, model_name: str, device_id: int | None = None) -> ServedModel:
        deployment = self._models.get(model_name) if isinstance(model_name, str) else None
        if deployment is None:
            self._check_open()
            raise UnknownModelError(f"model_name: {model_name!r} is not deployed, deployed are {', '.join(self._models)}")
        devices = deployment.model.deployed_device_list
        if device_id is not None and device_id not in (devices or (0,)):
            raise DeviceError(
                f"device_id: model {model_name!r} is deployed on {list(devices) or 'the CPU'}, not on {device_id}"
            )
        return deployment

    def _table(self, model_name: str, table_id: int | str, device_id: int | None = None) -> ServedTable:
        return self._deployment(model_name, device_id).table(table_id)


def _check_rows(out: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise ArrayError unless rows can be written to ``out`` as they are."""
    if out.dtype != np.float32 or out.shape != shape or not out.flags.carray:
        raise ArrayError(f"out: {out.dtype}{list(out.shape)} came, contiguous writable float32{list(shape)} is wanted")


def _on_host(rows: Any) -> np.ndarray:
    """An answer as NumPy's."""
    return np.asarray(rows) if device_of_array(rows) is None else as_rows(rows, tuple(rows.shape))
