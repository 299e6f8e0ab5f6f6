"""The parameter server: a facade over parts that find models and tables in one catalog.

``lookups`` answers, ``writes`` changes rows, ``model_loader`` opens tiers and loads models, ``recordings`` keeps traces,
``direct_access`` is for front ends. The methods here delegate, and document what users need to know.

Why plain delegation: the frame that it costs is less than what opening a call in one place saves (``lookup`` of 16 keys takes
1 % less than before). Bound methods of the parts on the instance were measured too: they save another 1 %, but overrides in
subclasses would be silently ignored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hps_numba.config import ConfigSource, InferenceParams, ModelConfig, ServerConfig, read_config
from hps_numba.config.arguments import as_count, as_flag, as_function, as_number, as_optional, as_path, as_paths, as_place
from hps_numba.errors import ModelFileError, TraceError
from hps_numba.metrics.nvtx import open_ranges, with_ranges
from hps_numba.metrics.prometheus import render
from hps_numba.metrics.registry import Registry
from hps_numba.runtime.reentry import refuse_inside
from hps_numba.server.catalog import Catalog
from hps_numba.server.direct_access import DirectAccess
from hps_numba.server.lookups import Lookups
from hps_numba.server.metrics import ServerMetrics
from hps_numba.server.model_loader import ModelLoader
from hps_numba.server.model_versions import VersionHook
from hps_numba.server.online_updates import OnlineUpdates
from hps_numba.server.plan import Plan, plan_of
from hps_numba.server.recordings import Recordings
from hps_numba.server.stats import TableStats
from hps_numba.server.table_writes import Change
from hps_numba.server.update_stats import SourceStats
from hps_numba.server.update_targets import UpdateTargets
from hps_numba.server.writes import Writes
from hps_numba.traces.recording import TraceRecording

__all__ = ["HPS"]

# what becomes a range of NVTX on request
_LOOKUPS = ("lookup", "lookup_fromdlpack", "lookup_into", "lookup_many", "lookup_pooled", "prefetch")
_WRITES = ("erase", "insert", "read_modify_write", "refresh", "rewrite", "update")
_CHANGES = ("load", "load_all", "replace", "set_policy", "unload")


class HPS:
    """A hierarchical parameter server in this process.

    Args:
        config: path of a ``ps_config`` JSON file, the same as a dict, ``ParameterServerConfig``, or a list of
            ``InferenceParams``.
        strict: unknown config keys are errors instead of warnings.
        allow_code: the config may name Python code to run (``path.py:NAME``, ``package.module:NAME``), such as custom tiers.
        progress: draw a progress bar while loading; by default on a terminal, if there is much to load.
        nvtx: mark calls as NVTX ranges, for Nsight Systems; by default if the environment variable ``HPS_NUMBA_NVTX`` is 1.

    Attributes:
        config: the config as it was read.
        direct: internal: what the front ends of this package use.
        metrics: collectors of the metrics that ``metrics_text`` shows; front ends add theirs (``hps_numba.metrics``).

    Raises:
        ConfigError: a value of the config is missing or wrong.
        ModelFileError: a sparse model is missing or damaged, or its rows are not as wide as its table's.
        CapacityError: the plan does not fit the machine; nothing was allocated.
        PolicyError: a cache policy is missing or breaks its contract; nothing was allocated.
        TierUnavailable: a storage tier is not installed or cannot be reached.
        DeviceError: the config requires a GPU.

    It is a context manager: ``with HPS("ps.json") as server: rows = server.lookup(keys, "model", 0)``.

    Thread safety: any thread may call any method. Lookups take no lock and release the GIL; writes to one table take turns.
    An interrupt (Ctrl-C) during a write is raised when the write is done everywhere, a second one at once.
    Signal handlers, ``__del__`` and callbacks may look up at any time. Where they would change what a call that they interrupt
    works on, they get ReentryError, and nothing is changed.
    """

    def __init__(
        self,
        config: ConfigSource,
        *,
        strict: bool = False,
        allow_code: bool = False,
        progress: bool | None = None,
        nvtx: bool | None = None,
    ) -> None:
        ranges = open_ranges(as_optional(nvtx, as_flag, "nvtx"))
        self.config: ServerConfig = read_config(config, strict=strict)
        self._catalog = catalog = Catalog(64 if self.config.supportlonglong else 32)
        self._recordings = Recordings()
        self._lookups = with_ranges(Lookups, _LOOKUPS, ranges)(catalog, self._recordings)
        loader = with_ranges(ModelLoader, _CHANGES, ranges)
        self._loader = loader(self.config, catalog, strict=strict, allow_code=allow_code, progress=progress)
        self._updates = OnlineUpdates()
        writes = with_ranges(Writes, _WRITES, ranges)
        self._writes = writes(catalog, self._loader.fastest_tier, self.config.volatile_db.max_batch_size)
        self.direct = DirectAccess(catalog, self._lookups, self._recordings, self._writes)
        self.metrics = Registry()
        self.metrics.add(ServerMetrics(catalog, self._updates).collect)
        try:
            self._loader.load_all()
            targets = UpdateTargets(
                catalog, self._loader.host, self._loader.slower, self._loader.replace_by, self._loader.reload
            )
            self._updates.open(self.config, targets, self, allow_code=allow_code)
        except BaseException:
            self.close()
            raise

    # -- looking up rows ---------------------------------------------------------------------

    def lookup(
        self,
        keys: Any,
        model_name: str,
        table_id: int | str,
        device_id: int | None = 0,
        *,
        out: Any = None,
        stream: Any = None,
        version: int | None = None,
    ) -> Any:
        """Look up the rows of a batch of keys.

        Args:
            keys: integers of any shape ``S``: a list, a NumPy, Torch, TensorFlow, CuPy or JAX array, or anything with DLPack.
                64-bit servers take any integer dtype; 32-bit servers (``supportlonglong`` false) take int32 and uint32 by their
                bits, and wider integers that fit.
            model_name: a deployed model.
            table_id: number of the table in its model, or its name.
            device_id: one of the model's ``deployed_device_list``, or None for any; keys in the memory of a GPU are looked up
                on that GPU.
            out: an array of shape ``S + (dim,)`` and the dtype of the answer, to write to and return.
            stream: CUDA stream to work on (a handle, or a stream of any framework); by default the current stream of the keys'
                framework. Ignored for keys in host memory, which are answered from host memory.
            version: answer only if this version of the model is in force (``model_version``); by default whichever is.

        Returns:
            float32 (or the model's ``output_dtype``) ``S + (dim,)``, an array of the same kind as ``keys`` (NumPy for
            lists), or ``out``. A key that no tier has gets the table's default value.

        Raises:
            KeyDtypeError: keys are not integers or do not fit the key width.
            UnknownModelError: no such model or table.   DeviceError: the model is not deployed on ``device_id``.
            VersionError: another version than ``version`` is in force; ``out`` may have been written to.
            TierError: a slower tier broke its contract.
            ClosedError: the server was closed.
        """
        if version is None:
            return self._lookups.lookup(keys, model_name, table_id, device_id, out, stream)
        version = as_count(version, "version", 0)
        return self._lookups.of_version(
            model_name, version, lambda: self._lookups.lookup(keys, model_name, table_id, device_id, out, stream)
        )

    def lookup_many(
        self, keys: Any, model_name: str, device_id: int = 0, *, flat: bool = False, version: int | None = None
    ) -> Any:
        """Look up rows of several tables of one model, all in the same version of the model.

        If the version is switched during the call, it looks up again, and ``stats`` counts it twice.

        Args:
            keys: a sequence with the keys of each table in table order, or a mapping from table number or name to keys.
                A shorter sequence looks up the first tables only.
            flat: return one NumPy vector: the rows of all tables, one after the other in the given order. Rows on a GPU are
                copied to the host as float32.
            version: as for ``lookup``.

        Returns:
            What ``lookup`` returns for each table: as a list, or as a dict with the keys of the mapping.

        Raises:
            As ``lookup``; UnknownModelError if the sequence is longer than the number of tables.
        """
        if version is None:
            return self._lookups.lookup_many(keys, model_name, device_id, flat=flat)
        version = as_count(version, "version", 0)
        return self._lookups.of_version(
            model_name, version, lambda: self._lookups.lookup_many(keys, model_name, device_id, flat=flat)
        )

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
        version: int | None = None,
    ) -> Any:
        """Look up bags of keys, and combine the rows of each bag into one row as they are read.

        Args:
            keys: integers ``[n]``, as for ``lookup``.
            offsets: integers ``[bags + 1]``: where each bag begins, and where the last ends; ascending from 0 to ``n``.
            weights: numbers ``[n]``, or None for all 1.
            combiner: ``sum``; ``mean``, divided by the sum of weights; ``sqrtn``, divided by the root of the sum of their
                squares (0 where the divisor is 0); ``max``, which ignores weights.
            max_norm: rows are clipped to this Euclidean norm before they are weighted, or None.
            padding: a key to leave out, or None.
            include_last_offset: ``offsets`` end with ``n``; if false they are ``[bags]``.
            out: ``[bags, dim]``, contiguous, to write to and return: NumPy float32, or as for ``lookup`` on a GPU.
            stream, version: as for ``lookup``.

        Returns:
            NumPy float32 ``[bags, dim]``, summed in float32 in the order of keys. A bag without keys gets 0; a key that no tier
            has counts with the table's default value.

        Keys in the memory of a GPU that has a cache of the table are served on that GPU, if offsets and weights are there too:
        the answer is then an array of the keys' framework and the model's ``output_dtype``, in stream order, and offsets are
        not checked. For tables with slower tiers, and with ``max_norm``, keys are copied to the host.

        Raises:
            As ``lookup``; ConfigError (a ValueError) if offsets, combiner or bound do not fit; ArrayError for ``weights`` and
            ``out``.
        """
        answer = partial(
            self._lookups.lookup_pooled,
            keys,
            offsets,
            model_name,
            table_id,
            device_id,
            weights=weights,
            combiner=combiner,
            max_norm=max_norm,
            padding=padding,
            include_last_offset=include_last_offset,
            out=out,
            stream=stream,
        )
        return answer() if version is None else self._lookups.of_version(model_name, as_count(version, "version", 0), answer)

    def lookup_fromdlpack(self, keys: Any, out_tensor: Any, model_name: str, table_id: int | str, device_id: int = 0) -> None:
        """Look up rows as ``lookup`` does, from one DLPack capsule to another. The capsules are not consumed.

        Each of them may be of host memory or of any GPU. Keys and output on one GPU of the model are served in place and in the
        order of the current stream of Torch, else of CuPy; otherwise, and where TensorFlow is imported, the call returns when
        the rows are there. Capsules that are not contiguous need CuPy on a GPU.

        Args:
            keys: capsule (or object with ``__dlpack__``) of integers of any shape and strides, n in all.
            out_tensor: capsule of float32 (or the model's ``output_dtype``) with room for ``n * dim`` elements; the first are
                written, in C order.

        Raises:
            As ``lookup``; ArrayError (a ValueError) if ``out_tensor`` is too small, of another dtype or read-only;
            DeviceError if a GPU cannot be reached.
        """
        self._lookups.lookup_fromdlpack(keys, out_tensor, model_name, table_id, device_id)

    def replaying(self, model_name: str, device_id: int = 0, *, stream: Any = None) -> AbstractContextManager[None]:
        """A context manager for replays of CUDA graphs that captured lookups of a model, so that each sees one version of it.

        ``with server.replaying("m"): graph.replay()``. A replay reads the caches, and no code of the host runs in it. So
        ``replace_model`` has to be told: before it switches versions it waits until such blocks are left and their work on the
        GPU is done, and a block that is to be entered meanwhile waits until the caches have the new version (milliseconds,
        or as long as other replays take; they are filled later). All replays in a block see the same version. It costs some
        microseconds on the host, and the GPU nothing.

        Keep the block to the replays: calls that may wait for a replacement (writes, ``refresh``, changes of models, ``close``)
        raise ReentryError in it. Blocks may be nested, and the object may be entered again and by several threads.

        Args:
            device_id: where the graphs are replayed, one of the model's ``deployed_device_list``.
            stream: on which they are replayed, as for ``lookup``; by default the one that is current for Torch, else for CuPy,
                when the block is entered. On a machine without a GPU it is ignored.

        Raises:
            UnknownModelError, ClosedError: as ``lookup``.
            DeviceError: the model is not deployed on ``device_id``, no stream of it, or one that is being captured.
        """
        return self._lookups.replaying(model_name, device_id, stream)

    def prefetch(
        self, keys: Any, model_name: str, table_id: int | str, device_id: int | None = None, *, wait: bool = False
    ) -> bool:
        """Bring the rows of some keys up ahead of lookups: from slower tiers into host memory, and from both into caches.

        It is done in the background, after the prefetches asked for before. Lookups never fail for it, and those that miss the
        same keys meanwhile wait for it instead of asking a slower tier themselves. Rows that are written meanwhile may be left
        out. Host memory with a bound evicts rows for new ones as usual.

        Args:
            keys: as for ``lookup``; they are copied.
            device_id: whose cache to fill; None: those of all devices.
            wait: return when it is done; failures of slower tiers only count in ``stats``.

        Returns:
            False if it was dropped, as too much waits: 64 calls, or 16 million keys.

        Raises:
            KeyDtypeError, UnknownModelError, DeviceError, ClosedError as ``lookup``.
            With ``wait``: TierError if a slower tier broke its contract; CapacityError if there is no memory for the rows.
        """
        return self._lookups.prefetch(keys, model_name, table_id, device_id, wait=as_flag(wait, "wait"))

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
        """Record the keys that are looked up in a table, as a trace for ``hps_numba.simulate``.

        Args:
            path: of the trace, an ``.npy`` file of int64; its rate and size go to a JSON file beside it.
            rate: share of the keys to record, chosen by a hash, each with all its requests.
            every: record only every n-th call.
            limit: stop after this many recorded keys, 8 bytes each.

        Returns:
            The recording, to be closed: ``with server.record_trace("trace.npy", "model", 0, rate=0.01): ...``

        Cost: while nothing is recorded, one test per lookup. While recording, a copy of the chosen keys, and a write for every
        131,072 of them. A recorded call with keys in the memory of a GPU waits for the GPU; ``every`` makes such calls rare.
        Replays of a CUDA graph are not recorded.

        Raises:
            UnknownModelError: no such model or table.   ConfigError: an argument is out of range.
            TraceError: the file cannot be written.
        """
        table = self._catalog.table(model_name, table_id)
        return self._recordings.start(
            as_path(path, "record_trace: path", error=TraceError),
            table,
            name=f"{model_name}/{table.spec.name}",
            rate=as_number(rate, "record_trace: rate"),
            every=as_count(every, "record_trace: every"),
            limit=as_count(limit, "record_trace: limit"),
        )

    # -- changing rows ---------------------------------------------------------------------

    def insert(self, keys: Any, rows: Any, model_name: str, table_id: int | str) -> int:
        """Write a row for each key (upsert) to every tier; lookups that start after it returns see the rows.

        Args:
            keys: integers of any shape ``S``.
            rows: float32 ``S + (dim,)``, or numbers that convert to it, of any array kind; the last of equal keys wins.

        Returns how many keys were new.

        Raises:
            KeyDtypeError, UnknownModelError, ClosedError as ``lookup``; ArrayError for rows of another shape or dtype.
            CapacityError: host memory has no room for more rows; slower tiers, if any, have the new rows and serve them.
            TierError: a slower tier failed, and faster ones were not written; or a key that host memory might evict has a row
                in a read-only tier, which would then be served again.
        """
        return self._writes.insert(keys, rows, model_name, table_id)

    def update(self, keys: Any, rows: Any, model_name: str, table_id: int | str) -> int:
        """Write the rows of those keys that exist; returns how many of ``keys`` did. Otherwise as ``insert``."""
        return self._writes.update(keys, rows, model_name, table_id)

    def read_modify_write(self, keys: Any, change: Change, model_name: str, table_id: int | str) -> int:
        """Replace the rows of some keys by what a function computes from them; no other write to the table comes in between.

        Args:
            keys: distinct integers, n in all.
            change: a function of the rows, NumPy float32 ``[n, dim]`` (the table's default value for absent keys), and of bool
                ``[n]``, which keys exist; it returns new rows ``[n, dim]``. It may write to its arguments, but must not change
                the table.

        Returns how many keys were new.

        Raises:
            As ``insert``; TierError if a slower tier cannot be read.   What ``change`` raises; nothing is written then.
        """
        return self._writes.read_modify_write(keys, as_function(change, "change"), model_name, table_id)

    def locked_table(
        self, model_name: str, table_id: int | str
    ) -> AbstractContextManager[tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]]:
        """A context manager for reading a whole table; writes to the table wait until its block ends.

        It gives all keys, int64 ``[n]``, ascending, and a function from int64 keys ``[m]`` to their rows, float32 ``[m, dim]``.

        Raises:
            As ``lookup``, when the block is entered; TierError if a slower tier cannot be read.
        """
        return self._writes.locked_table(model_name, table_id)

    def erase(self, keys: Any, model_name: str, table_id: int | str) -> int:
        """Remove the rows of the keys from every tier; returns how many distinct keys had one."""
        return self._writes.erase(keys, model_name, table_id)

    def on_evict(self, callback: Callable[[np.ndarray], object], model_name: str, table_id: int | str) -> Callable[[], None]:
        """Call a function with the keys whose rows host memory has evicted to keep its bound (``overflow_margin``).

        It is called inside the write that evicts them, on any thread, and the next write to the table waits for it. It may look
        up rows; changes of the server raise ReentryError in it. What it raises is logged as an error, and changes nothing. Rows
        of a sparse model that do not fit while it is loaded are not told.

        Args:
            callback: a function of int64 keys ``[n]``.

        Returns:
            A function that ends the calls.

        Raises:
            UnknownModelError: no such model or table.   ConfigError: ``callback`` cannot be called.
        """
        return self._writes.on_evict(as_function(callback, "callback"), model_name, table_id)

    def contains(self, keys: Any, model_name: str, table_id: int | str) -> np.ndarray:
        """Which keys have a row in some tier: a bool array of the shape of ``keys``."""
        return self._writes.contains(keys, model_name, table_id)

    def dump(self, path: str | Path, model_name: str, table_id: int | str) -> int:
        """Write the rows of a table in its fastest tier to a ``.bin`` or ``.sst`` file of HugeCTR's form; returns their number.

        Raises:
            ModelFileError: the file cannot be written.   TierError: another ending, or an ``.sst`` file of no rows.
        """
        return self._writes.dump(as_place(path, "path", error=ModelFileError), model_name, table_id)

    def load_dump(self, path: str | Path, model_name: str, table_id: int | str) -> int:
        """Insert the rows of a ``.bin`` or ``.sst`` file in every tier; returns their number.

        Raises:
            ModelFileError: the file is damaged, or its rows have another width.
            TierError: its keys have another width, or another ending; otherwise as ``insert``.
        """
        return self._writes.load_dump(as_place(path, "path", error=ModelFileError), model_name, table_id)

    # -- caches ---------------------------------------------------------------------

    def refresh(self, model_name: str, table_id: int | str | None = None, *, drop: bool = True) -> None:
        """Reread the rows in the caches of a model from host memory and slower tiers.

        ``insert``, ``update`` and ``erase`` have changed the caches when they return; this is for rows that other processes
        changed in a slower tier. Lookups continue meanwhile.

        Args:
            table_id: one table, by default all.
            drop: drop rows from the caches that no tier has any more; otherwise they stay.

        Raises:
            UnknownModelError: no such model or table.   TierError: a slower tier failed.
        """
        self._writes.refresh(model_name, table_id, drop=as_flag(drop, "drop"))

    def set_policy(self, policy: Any = None, model_name: str = "", table_id: int | str | None = None) -> Any:
        """Switch the caches of a model to another eviction policy; their rows stay.

        Scores restart as if all cached rows had just been inserted. Lookups continue and stay exact: they wait for the switch
        itself, not for the compiler. CUDA graphs captured before keep the old policy.

        Args:
            policy: name of a built-in or installed policy; ``package.module:NAME`` or ``file.py:NAME`` (both need the server's
                ``allow_code``); a class as ``kernels.policies._policy`` describes it; or a ``Policy``. If it is omitted, a
                decorator for such a class is returned: ``@server.set_policy(model_name="m", table_id=0)``.
            table_id: one table, by default all.

        Returns:
            ``policy``, so that a decorated class stays what it was.

        Raises:
            PolicyError: there is no such policy, it breaks the contract, or it does not compile for a device; the previous
                policy stays.
            ConfigError: the caches are static or uvm, which evict nothing.   CapacityError: no memory for the policy's state.
            UnknownModelError: no such model or table.
        """
        if policy is None:
            return lambda kind: self.set_policy(kind, model_name, table_id)
        self._loader.set_policy(policy, model_name, table_id)
        return policy

    # -- models ---------------------------------------------------------------------

    def load_model(self, model: Mapping[str, Any] | InferenceParams | ModelConfig) -> None:
        """Deploy one more model, described as in ``models`` of the config or by ``InferenceParams``.

        Key width and databases are the server's; the databases of an ``InferenceParams`` are ignored.

        Raises:
            ConfigError: the description is wrong or the name is taken.   Otherwise as ``HPS``.
        """
        self._loader.load(model)

    def replace_model(
        self,
        model_name: str,
        sparse_files: str | Path | Iterable[str | Path] | None = None,
        *,
        version: int | None = None,
    ) -> None:
        """Replace all rows of a model by a new version, in one step, while lookups continue.

        The new version is loaded first, so host memory holds both for a while. A lookup sees the old rows or the new ones and
        never both, ``lookup_many`` one version of all tables; no lookup waits. So does a replay of a captured CUDA graph inside
        ``replaying``; any other replay may see both while the caches take the new rows, and the next one sees the new ones (a
        WARNING says so once). An interrupt (Ctrl-C) undoes the replacement, or lets it end if slower tiers or lookups have the
        new version already. Rows written by ``insert`` and ``update`` are lost with the old version.
        Slower tiers get the new rows before the switch and lose the stale ones after it, so keys that only they hold change
        a little earlier than the rest.

        Args:
            sparse_files: one per table (or a single path if there is one table); by default those of the config, read again.
            version: number of the new version, an integer of at least 0; by default one more than that in force.

        Raises:
            ModelFileError, CapacityError: the new version cannot be loaded; the old one stays in every tier.
            TierError: a slower tier failed; slower tiers may hold rows of both versions until the model is replaced again. Host
                memory has one version or the other.
            ConfigError: not paths, or their number is not the number of tables.
            DeviceError: a ``replaying`` block, or its work on the GPU, has not ended within a minute; as TierError.
            ReentryError: called inside a ``replaying`` block, for whose end it would wait.
            ClosedError: the server was closed meanwhile; nothing is left of the new version.
        """
        number = None if version is None else as_count(version, "version", 0, 2**63 - 1)
        self._loader.replace(model_name, None if sparse_files is None else as_paths(sparse_files, "sparse_files"), number)

    def roll_back_model(self, model_name: str) -> int:
        """Go back to the version of a model that was in force before, from its files, as ``replace_model``; returns its number.

        A second call takes the first one back. Rows that changed after those files were written are not there.

        Raises:
            VersionError: there was none before.   Otherwise as ``replace_model``; the files must still be there.
        """
        return self._loader.roll_back(model_name)

    def model_version(self, model_name: str) -> int:
        """Number of the version of a model that is in force: 1 at first, one more with each replacement, or as those say.

        Raises:
            UnknownModelError: no such model.   ClosedError: the server was closed.
        """
        return self._catalog.model(model_name).version

    def on_version(self, hook: VersionHook, model_name: str) -> Callable[[], None]:
        """Be told of each new version of a model before lookups see it, to switch a dense part in the same moment.

        Args:
            hook: a function of the number of the version and of its manifest, with ``model``, ``version``, ``tables`` (files by
                table name), ``dense`` (as the message that brings it says, else None) and more. It is called when the rows are
                loaded, on any thread, and may take its time to load the dense part; it must not change the server. What it
                raises keeps the version in force. It may return a function, which is called in the moment in which all tables
                are switched: it must only take over what is loaded, and wait for nothing. What that one raises is logged.

        Returns:
            A function that ends the calls.

        Raises:
            UnknownModelError: no such model.   ConfigError: ``hook`` cannot be called.
        """
        return self._catalog.model(model_name).versions.add_hook(as_function(hook, "hook"))

    def unload_model(self, model_name: str, *, erase: bool = False) -> None:
        """Take a model out of service and free its host memory; with ``erase`` also drop its rows from slower tiers.

        Raises:
            TierError: a slower tier failed to drop rows; the model is unloaded, and everything else was dropped.
        """
        self._loader.unload(model_name, erase=as_flag(erase, "erase"))

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the deployed models."""
        return tuple(self._catalog.models)

    # -- looking at it ---------------------------------------------------------------------

    def stats(self) -> dict[str, dict[str, TableStats]]:
        """Counts of every table since the server started, by model and table name."""
        return self._updates.add_to(self._catalog.stats())

    def update_stats(self) -> tuple[SourceStats, ...]:
        """What each source of online updates did since the server started: positions, lag, what was skipped and why."""
        return self._updates.stats()

    def metrics_text(self, openmetrics: bool = False) -> str:
        """All metrics of the server and of the front ends that count for it, as Prometheus reads them.

        Args:
            openmetrics: in the format of OpenMetrics instead of that of Prometheus. What an HTTP answer has to name as its
                type is ``hps_numba.metrics.content_type(openmetrics=...)``.

        Raises:
            ClosedError: the server was closed.
        """
        return render(self.metrics.collect(), openmetrics=as_flag(openmetrics, "openmetrics"))

    def plan(self) -> Plan:
        """Bytes that the deployed models take in each tier and on each device, computed from the sizes of their sparse models.

        ``stats`` says how many bytes they take now, by the same names: ``CacheStats.memory`` is what ``TablePlan.cache`` plans,
        ``TableStats.memory`` what ``TablePlan.host`` plans.
        """
        self._catalog.check_open()
        models = tuple(self._catalog.models.values())
        taken = Counter[int]()
        for model in models:
            taken.update(model.device_bytes)
        return plan_of((table for model in models for table in model.table_plans()), taken=taken)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the rows and indexes of all tables take now."""
        return sum(table.bytes for model in self.stats().values() for table in model.values())

    # -- ending ---------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._catalog.closed

    def close(self) -> None:
        """Wait for running lookups, then free everything; later calls raise ClosedError. Closing twice is fine.

        Lookups that wait for a slower tier get up to 30 s, and so do ``replaying`` blocks; a WARNING is logged if that is too
        short. It does not wait for writes. A model that is being loaded or replaced stops loading, or ends if lookups have it
        already; others are refused.
        It is done whatever interrupts the call.

        Raises:
            ReentryError: called from inside another call of the server, for which it would wait: by a signal handler,
                ``__del__`` or a callback. The server stays open.
        """
        if not self._catalog.closed:
            refuse_inside("the server", (self._lookups, self._writes))
            self._loader.check_outside()
            self._updates.stop()
        self._loader.close(self._close_first)

    def _close_first(self) -> None:
        try:
            self._updates.close()
        finally:
            self._recordings.close()

    def __enter__(self) -> HPS:
        self._catalog.check_open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        models = ", ".join(f"{name} ({len(model.tables)} tables)" for name, model in self._catalog.models.items())
        return f"<HPS {'closed' if self.closed else models}>"
