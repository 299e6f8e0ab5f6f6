"""The Torch operator: opaque to compilers, so that rows are looked up when a graph runs and never baked into it.

``hps_numba::lookup(Tensor keys, str request, int dim) -> Tensor``. What is asked for is a line of text
(``frontends/_requests.py``): a graph that was compiled, exported or scripted holds that text and no server, and runs in any
process that imported ``hps_numba.frontends.torch``.

Defined by ``torch.library.Library`` and not by ``custom_op``: that takes ten microseconds more a call. There is no variant with
``out``, which compilers would call with memory of their own (since Torch 2.13): on the CPU that is new pages every time, and
large answers take three times as long. What runs in a compiled graph takes half as long again as in an eager call, the caches
of the processor being full of Torch: so the ways below are short.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from hps_numba.arrays.buffer_pool import aligned_empty
from hps_numba.arrays.cuda import FORMS
from hps_numba.errors import ClosedError, ConfigError, KeyDtypeError
from hps_numba.frontends._requests import TableQuery, tables_of
from hps_numba.server.fused_tables import FusedLookup
from hps_numba.server.hps import HPS

if TYPE_CHECKING:
    from hps_numba.cache.cache import EmbeddingCache

__all__ = [
    "KEY_TYPES",
    "are_plain",
    "bound_to",
    "check_keys",
    "current_stream",
    "follow_vmap",
    "fused_lookup_for",
    "is_plain",
    "library",
    "lookup",
    "rows_of",
    "rows_on_cpu",
    "rows_on_cuda",
    "unbind",
]

KEY_TYPES = (torch.int64, torch.int32, torch.uint32, torch.uint64)

#: where operators of this package are defined
library = torch.library.Library("hps_numba", "DEF")
library.define("lookup(Tensor keys, str request, int dim) -> Tensor")

_SOON_MADE = 1 << 14  # elements: memory of that size is the heap's, and Torch's own is made sooner than ours is found


def check_keys(keys: torch.Tensor) -> None:
    """
    Raises:
        KeyDtypeError: keys are no integers that can be looked up.
    """
    if keys.dtype not in KEY_TYPES:
        names = ", ".join(str(kind).removeprefix("torch.") for kind in KEY_TYPES)
        raise KeyDtypeError(f"keys: {str(keys.dtype).removeprefix('torch.')} came, one of {names} is wanted")


def _table_of(request: str, dim: int) -> tuple[HPS, TableQuery]:
    ((server, wanted),) = tables_of(request)
    if wanted.dim != dim:
        raise ConfigError(f"dim: {dim} came, {wanted.dim} is wanted, as the request says")
    return server, wanted


def _lookup_on_cpu(keys: torch.Tensor, request: str, dim: int) -> torch.Tensor:
    return rows_on_cpu(keys, *_table_of(request, dim))


def rows_on_cpu(keys: torch.Tensor, server: HPS, wanted: TableQuery) -> torch.Tensor:
    """float32 rows of keys on the CPU."""
    check_keys(keys)
    shape = (*keys.shape, wanted.dim)
    if keys.numel() * wanted.dim <= _SOON_MADE:
        rows = torch.empty(shape, dtype=torch.float32)
        server.lookup_into(keys.numpy(), wanted.model, wanted.table, rows.numpy())
        return rows
    memory = aligned_empty(shape)
    server.lookup_into(keys.numpy(), wanted.model, wanted.table, memory)
    return torch.from_numpy(memory)


def rows_on_cuda(keys: torch.Tensor, server: HPS, wanted: TableQuery) -> torch.Tensor:
    """float32 rows of keys on a GPU, in the order of its current stream."""
    check_keys(keys)
    rows: torch.Tensor = server.lookup(keys, wanted.model, wanted.table)
    return rows if rows.dtype == torch.float32 else rows.float()


@torch.library.register_fake("hps_numba::lookup", lib=library)
def _shape_of_lookup(keys: torch.Tensor, request: str, dim: int) -> Any:
    check_keys(keys)
    return keys.new_empty((*keys.shape, dim), dtype=torch.float32)


def rows_of(keys: torch.Tensor, request: str, dim: int) -> torch.Tensor:
    """What the operator gives, by the shortest way: eager calls with plain tensors need no dispatcher."""
    if torch.compiler.is_compiling() or not is_plain(keys):
        return lookup(keys, request, dim)
    return _lookup_on_cuda(keys, request, dim) if keys.is_cuda else _lookup_on_cpu(keys, request, dim)


OnDevice = TypeVar("OnDevice", "EmbeddingCache", FusedLookup)


@dataclass(frozen=True, slots=True)
class Bound(Generic[OnDevice]):
    """What answers a request on a GPU: the cache of a table, or those of several; and how kernels read keys of each dtype."""

    server: HPS
    cache: OnDevice
    forms: Mapping[torch.dtype, str]


_At = tuple[str, int]  # a request and the number of a GPU
_bound: dict[_At, Bound[EmbeddingCache]] = {}
_bound_tables: dict[_At, Bound[FusedLookup]] = {}
_FORMS = {wide: {kind: FORMS[wide][str(kind).removeprefix("torch.")] for kind in KEY_TYPES} for wide in (False, True)}


def bound_to(request: str, device: int) -> Bound[EmbeddingCache] | None:
    """What a request for one table leads to on a GPU; None where an answer takes more than the kernels of a cache.

    Raises:
        As ``HPS``.
    """
    bound = _bound.get((request, device)) or _bind(_bound, (request, device), _cache_on)
    return None if bound is None or bound.server.records else bound


def fused_lookup_for(request: str, device: int) -> Bound[FusedLookup] | None:
    """``bound_to`` of a request for several tables, which are looked up together."""
    bound = _bound_tables.get((request, device)) or _bind(_bound_tables, (request, device), _together_on)
    return None if bound is None or bound.server.records else bound


def _bind(
    known: dict[_At, Bound[OnDevice]],
    at: _At,
    cache_on: Callable[[int, list[tuple[HPS, TableQuery]]], OnDevice | None],
) -> Bound[OnDevice] | None:
    request, device = at
    tables = tables_of(request)
    cache = cache_on(device, tables)
    if cache is None:
        return None
    server = tables[0][0]
    bound = known[at] = Bound(server, cache, _FORMS[server.wide])
    return bound


def _cache_on(device: int, tables: list[tuple[HPS, TableQuery]]) -> EmbeddingCache | None:
    ((server, wanted),) = tables
    return server.cache_on(device, wanted.model, wanted.table)


def _together_on(device: int, tables: list[tuple[HPS, TableQuery]]) -> FusedLookup | None:
    server, model = tables[0][0], tables[0][1].model
    if any(other is not server or wanted.model != model for other, wanted in tables):
        return None
    return server.fused_lookup_on(device, model, [wanted.table for _, wanted in tables])


def unbind(request: str, device: int) -> None:
    """Forget caches that were closed."""
    _bound.pop((request, device), None)
    _bound_tables.pop((request, device), None)


def _lookup_on_cuda(keys: torch.Tensor, request: str, dim: int) -> torch.Tensor:
    device = keys.get_device()
    bound = bound_to(request, device)
    form = None if bound is None else bound.forms.get(keys.dtype)
    if bound is not None and form is not None and keys.is_contiguous() and bound.cache.dim == dim:
        rows = torch.empty((*keys.shape, dim), dtype=torch.float32, device=keys.device)
        try:
            bound.cache.lookup(keys.data_ptr(), keys.numel(), rows.data_ptr(), current_stream(device), key_form=form)
        except ClosedError:
            unbind(request, device)  # and let the server say who was closed, or a new one answer
        else:
            return rows
    return rows_on_cuda(keys, *_table_of(request, dim))


def follow_vmap(name: str) -> None:
    """Let ``torch.vmap`` take an operator whose first argument are keys of any shape: a batch of keys is one dimension more."""
    register = getattr(torch.library, "register_vmap", None)  # since Torch 2.5
    if register is None:
        return
    operator = getattr(torch.ops.hps_numba, name).default

    def follow(info: Any, places: tuple[Any, ...], keys: torch.Tensor, *others: Any) -> tuple[torch.Tensor, int]:
        return operator(keys.movedim(places[0], 0), *others), 0

    register(f"hps_numba::{name}", follow, lib=library)


def is_plain(keys: torch.Tensor) -> bool:
    """A tensor of the CPU or a GPU, and nobody watches or rewrites what is done with it: no tracer, mode or transform."""
    if type(keys) is not torch.Tensor or not (keys.is_cuda or keys.is_cpu):
        return False
    return not _is_watched()


def are_plain(several: list[torch.Tensor]) -> bool:
    """``is_plain`` for tensors of one place."""
    kind = torch.Tensor
    return is_plain(several[0]) and all(type(some) is kind for some in several)


def _is_watched() -> bool:
    return bool(_modes() or _overrides() or _transform() is not None or _tracer() is not None)


def _of_torch(place: Any, name: str) -> Callable[[], Any]:
    """A function of Torch that tells whether somebody watches; if a version lacks it, somebody always does."""
    function: Callable[[], Any] = getattr(place, name, lambda: 1)
    return function


def _stream_of_object(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


#: the handle of the current stream of a GPU; twenty times cheaper than the object, and not promised
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_of_object)
_modes = _of_torch(torch._C, "_len_torch_dispatch_stack")
_overrides = _of_torch(torch._C, "_len_torch_function_stack")
_transform = _of_torch(getattr(torch._C, "_functorch", None), "peek_interpreter_stack")
_tracer = _of_torch(torch._C, "_get_tracing_state")


library.impl("lookup", _lookup_on_cpu, "CPU")
library.impl("lookup", _lookup_on_cuda, "CUDA")
follow_vmap("lookup")
lookup = torch.ops.hps_numba.lookup.default
"""The operator: float32 ``S + [dim]`` for keys of shape ``S``, on the device of the keys and its current stream.

Raises:
    KeyDtypeError: keys of another type.   ConfigError: ``dim`` is not that of the request.   Otherwise as ``HPS``,
    ``HPS.lookup``.
"""
