"""``LookupCollection``: many tables of one model in one call of the operator."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch

from hps_numba.arrays.bags import MAX_KEYS
from hps_numba.errors import ConfigError
from hps_numba.frontends._device_path import Bindings, FusedCaches, find_fused
from hps_numba.frontends._queries import Query, TableQuery, answer, tables_given, tables_of
from hps_numba.frontends.torch import operator
from hps_numba.frontends.torch.row_gradients import Rows
from hps_numba.frontends.torch.training import TrainableLayer
from hps_numba.runtime.threads import SPLIT_BYTES
from hps_numba.server.registry import config_of
from hps_numba.training.initializers import Initializer

__all__ = ["LookupCollection"]

Allocate = Callable[[list[torch.Tensor], list[int], list[int]], list[torch.Tensor]]
"""From the keys of each table, how many they are, and the widths of rows: memory for the rows."""
#: requests for several tables, bound to their caches on a GPU
_fused_bindings: Bindings[FusedCaches] = Bindings(find_fused, operator.KEY_ENCODINGS_OF)

operator.library.define("lookup_many(Tensor[] keys, str request, int[] dims) -> Tensor[]")


def _lookup_many_on_cpu(keys: list[torch.Tensor], request: str, dims: list[int]) -> list[torch.Tensor]:
    if 4 * sum(some.numel() * dim for some, dim in zip(keys, dims, strict=True)) < SPLIT_BYTES:  # one thread is enough
        return [operator.rows_on_cpu(some, *table) for some, table in zip(keys, tables_of(request), strict=True)]
    for some in keys:
        operator.check_keys(some)
    return [torch.from_numpy(rows) for rows in answer(request, [some.detach().numpy() for some in keys])]


def _lookup_many_on_cuda(
    keys: list[torch.Tensor], request: str, dims: list[int], *, in_one: bool = False
) -> list[torch.Tensor]:
    """``in_one``: the answers may be views of one tensor, which is allocated faster."""
    device = keys[0].get_device()
    operator.check_keys(keys[0])
    rows = _lookup_alike(keys, request, dims, device, _parts_of_one if in_one else _one_by_one)
    if rows is not None:
        return rows
    return [operator.rows_on_cuda(some, server, query) for some, (server, query) in zip(keys, tables_of(request), strict=True)]


def _lookup_alike(
    keys: list[torch.Tensor], request: str, dims: list[int], device: int, allocate: Allocate
) -> list[torch.Tensor] | None:
    """Rows of keys on one GPU; None where that takes more than the kernels of caches, or keys differ in kind."""
    binding, dtype = _fused_bindings[request, device], keys[0].dtype
    form = None if binding is None else binding.encodings.get(dtype)
    if binding is None or form is None:
        return None
    counts, tables = [some.numel() for some in keys], len(keys)  # lists, and no loop: there may be many small tables
    if max(counts) > MAX_KEYS or [some.dtype for some in keys].count(dtype) < tables:
        return None
    if [some.get_device() for some in keys].count(device) < tables or False in [some.is_contiguous() for some in keys]:
        return None
    rows = allocate(keys, counts, dims)
    addresses, outs = [some.data_ptr() for some in keys], [some.data_ptr() for some in rows]
    return rows if binding.lookup(addresses, counts, outs, operator.current_stream(device), form) else None


def _lookup_stacked(keys: torch.Tensor, request: str, dim: int) -> torch.Tensor | None:
    """Rows of keys ``[tables, ...]`` on a GPU; None where that takes more than the kernels of caches."""
    device = keys.get_device()
    binding = _fused_bindings[request, device]
    form = None if binding is None else binding.encodings.get(keys.dtype)
    tables = keys.shape[0]
    n = keys.numel() // tables
    if binding is None or form is None or not keys.is_contiguous() or n > MAX_KEYS:
        return None
    rows = torch.empty(*keys.shape, dim, dtype=torch.float32, device=keys.device)
    first, to = keys.data_ptr(), rows.data_ptr()
    stream = operator.current_stream(device)
    done = binding.lookup_stacked(first, n * keys.element_size(), n, to, 4 * dim * n, stream, form)
    return rows if done else None


def jagged(batch: Any) -> dict[str, torch.Tensor]:
    """``{feature: its values}`` of a batch of jagged features, which is only described by its methods."""
    ends = [int(end) for end in batch.offset_per_key()]
    values = batch.values()
    return {feature: values[start:end] for feature, (start, end) in zip(batch.keys(), pairwise(ends), strict=True)}


def _one_by_one(keys: list[torch.Tensor], counts: list[int], dims: list[int]) -> list[torch.Tensor]:
    device = keys[0].device
    return [torch.empty(*some.shape, dim, dtype=torch.float32, device=device) for some, dim in zip(keys, dims)]


def _parts_of_one(keys: list[torch.Tensor], counts: list[int], dims: list[int]) -> list[torch.Tensor]:
    """Rows for each table in one tensor; by one step of Torch where shapes and widths are equal, as a view takes as long as an
    allocation."""
    shape, dim, device = keys[0].shape, dims[0], keys[0].device
    shapes = [some.shape for some in keys]
    if dims.count(dim) == len(dims) and dim % _ALIGNED == 0:
        if shapes.count(shape) == len(shapes):
            return list(torch.empty(len(keys), *shape, dim, dtype=torch.float32, device=device).unbind(0))
        if [len(some) for some in shapes].count(1) == len(shapes):
            return list(torch.empty(sum(counts), dim, dtype=torch.float32, device=device).split(counts))
    sizes = [-(-n * dim // _ALIGNED) * _ALIGNED for n, dim in zip(counts, dims)]
    parts = torch.empty(sum(sizes), dtype=torch.float32, device=device).split(sizes)
    return [
        (part if part.shape[0] == n * dim else part[: n * dim]).view(*some, dim)
        for part, some, n, dim in zip(parts, shapes, counts, dims)
    ]


_MAX_KNOWN = 1000  # selections of features whose requests are kept
_ALIGNED = 4  # elements: kernels write 16 bytes at a time


operator.library.impl("lookup_many", _lookup_many_on_cpu, "CPU")
operator.library.impl("lookup_many", _lookup_many_on_cuda, "CUDA")


@torch.library.register_fake("hps_numba::lookup_many", lib=operator.library)
def _shapes_of_lookups(keys: Any, request: str, dims: Any) -> Any:
    return [some.new_empty((*some.shape, dim), dtype=torch.float32) for some, dim in zip(keys, dims, strict=True)]


class LookupCollection(TrainableLayer):
    """Looks up rows of several tables of one model in one call.

    Args:
        ps_config_file, model_name: as for ``LookupLayer``.
        tables: ``{feature: (table_id, emb_vec_size)}``.
        trainable, initializer, read_only: as for ``LookupLayer``, for all tables.

    On the CPU, large batches are spread over all cores, table by table. On a GPU, one kernel looks up to 32 tables of the same
    width and kind; the answers to an eager call are views of one tensor. Rows are frozen by default. Thread safety: any thread
    may call it.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        ps_config_file: str | os.PathLike[str] | Mapping[str, Any],
        model_name: str,
        tables: Mapping[str, tuple[int | str, int]],
        *,
        trainable: bool = False,
        initializer: str | Initializer | None = None,
        read_only: bool = False,
    ) -> None:
        super().__init__()
        checked = tables_given(tables)
        self._queries = {feature: TableQuery(model_name, table, dim) for feature, (table, dim) in checked.items()}
        # joined when called, by what a compiler can follow
        self._head, texts, self._tail = Query(config_of(ps_config_file), tuple(self._queries.values())).pieces()
        self._texts = dict(zip(self._queries, texts, strict=True))
        self._request = self.request_of(list(self._queries))
        self._keep_known()
        self._set_training(trainable, initializer, read_only)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep_known()  # an earlier version pickled nothing of it

    def _keep_known(self) -> None:
        """What calls need each time."""
        self._known: dict[tuple[str, ...], tuple[str, list[int]]] = {}
        self._dims = [query.dim for query in self._queries.values()]
        self._widths = sorted(set(self._dims))

    def forward(self, keys: Mapping[str, torch.Tensor] | torch.Tensor, version: int | None = None) -> Any:
        """Look up the rows of some or all features.

        Args:
            keys: ``{feature: keys}``, for any of the features. Or one tensor ``[features, ...]`` with the keys of all features
                in the order of ``tables``, whose rows must have the same width. Or a batch of jagged features with the methods
                ``keys``, ``values`` and ``offset_per_key``, such as torchrec's ``KeyedJaggedTensor``: of its features, those
                in the collection are looked up, as by torchrec's ``EmbeddingCollection``.
            version: as for ``HPS.lookup_many``, but not in a graph.

        Returns:
            float32: ``{feature: rows}`` with ``S + [emb_vec_size]`` each; for a tensor, ``[features, ..., emb_vec_size]``; for
            jagged features, ``{feature: rows of its values}``.

        Raises:
            ConfigError: a feature is not in the collection, or the number of features is wrong.   Otherwise as ``LookupLayer``.
        """
        if version is not None:
            return self._of_version(version, lambda: self.forward(keys))
        if isinstance(keys, torch.Tensor):
            return self._stacked(keys)
        if hasattr(keys, "offset_per_key"):
            keys = {feature: values for feature, values in jagged(keys).items() if feature in self._texts}
        if not isinstance(keys, Mapping):
            raise ConfigError(f"keys: expected {{feature: keys}} or a tensor, got {type(keys).__name__}")
        if not keys:
            return {}
        features, given = tuple(keys), list(keys.values())
        if self.trainable and self._trains():
            rows = self._trained(given, *self._asked(features))
        elif torch.compiler.is_compiling() or not (operator.are_plain(given) and given[0].is_cuda):
            rows = torch.ops.hps_numba.lookup_many(given, *self._asked(features))
        else:
            asked = self._known.get(features)
            if asked is None:
                asked = self._asked(features)
                if len(self._known) < _MAX_KNOWN:
                    self._known[features] = asked
            rows = _lookup_many_on_cuda(given, *asked, in_one=True)
        return dict(zip(features, rows, strict=True))

    def _asked(self, features: tuple[str, ...]) -> tuple[str, list[int]]:
        """The request for some features, and the widths of their rows."""
        unknown = [feature for feature in features if feature not in self._texts]
        if unknown:
            raise ConfigError(f"keys: expected features of {', '.join(self._texts)}, got {', '.join(map(str, unknown))}")
        return self.request_of(list(features)), [self._queries[feature].dim for feature in features]

    def _stacked(self, keys: torch.Tensor) -> torch.Tensor:
        dims, widths = self._dims, self._widths
        if keys.dim() == 0 or keys.shape[0] != len(dims):
            raise ConfigError(f"keys: expected [{len(dims)}, ...], a row for each feature, got {list(keys.shape)}")
        if len(widths) > 1:
            raise ConfigError(f"keys: expected {{feature: keys}} for rows of {widths} elements, got one tensor")
        if self.trainable and self._trains():
            return torch.stack(self._trained(list(keys.unbind(0)), self._request, dims))
        if not torch.compiler.is_compiling() and operator.is_plain(keys) and keys.is_cuda:
            rows = _lookup_stacked(keys, self._request, dims[0])
            if rows is not None:
                return rows
        return torch.stack(torch.ops.hps_numba.lookup_many(list(keys.unbind(0)), self._request, dims))

    def _trained(self, keys: list[torch.Tensor], request: str, dims: list[int]) -> list[torch.Tensor]:
        keys = [self._created(some, request, number) for number, some in enumerate(keys)]
        rows: list[torch.Tensor] = torch.ops.hps_numba.lookup_many_trained(keys, self._switch, request, dims)
        return rows

    def request_of(self, features: list[str]) -> str:
        """The operator's request for some features, in this order."""
        return self._head + ", ".join([self._texts[feature] for feature in features]) + self._tail

    def _request_for_all(self) -> str:
        return self._request

    @property
    def tables(self) -> tuple[Rows, ...]:
        return tuple(self._rows_of(self.request_of([feature])) for feature in self._texts)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        tables = ", ".join(f"{feature}: {query.table} [{query.dim}]" for feature, query in self._queries.items())
        return tables + self._training_repr()
