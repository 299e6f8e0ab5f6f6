"""The Torch operator: opaque to compilers, so that rows are looked up when a graph runs and never baked into it.

``hps_numba::lookup(Tensor keys, str request, int dim) -> Tensor``. The request is a line of JSON (``frontends/_queries.py``): a
graph that was compiled, exported or scripted holds that text and no server, and runs in any process that imported
``hps_numba.frontends.torch``.

Defined by ``torch.library.Library`` and not by ``custom_op``, which adds ten microseconds a call. There is no variant with
``out``, which compilers would call with memory of their own (since Torch 2.13): on the CPU that is new pages every time, and
large answers take three times as long. Python code takes half as long again in a compiled graph as in an eager call, as the
processor's caches are full of Torch: so the code paths below are short.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hps_numba.arrays.buffer_pool import aligned_empty
from hps_numba.arrays.encodings import KEY_ENCODINGS
from hps_numba.errors import ConfigError, KeyDtypeError
from hps_numba.frontends._device_path import Bindings, TableCache, find_cache
from hps_numba.frontends._queries import TableQuery, tables_of
from hps_numba.frontends.torch.jit_forks import note_thread
from hps_numba.server.hps import HPS

__all__ = [
    "KEY_ENCODINGS_OF",
    "KEY_TYPES",
    "are_plain",
    "check_keys",
    "current_stream",
    "follow_vmap",
    "is_plain",
    "library",
    "lookup",
    "rows_of",
    "rows_on_cpu",
    "rows_on_cuda",
    "table_bindings",
]

KEY_TYPES = (torch.int64, torch.int32, torch.uint32, torch.uint64)

#: where operators of this package are defined
library = torch.library.Library("hps_numba", "DEF")
library.define("lookup(Tensor keys, str request, int dim) -> Tensor")

_empty, _FLOAT32 = torch.empty, torch.float32
_SMALL = 1 << 17  # elements: memory of that size comes from the heap, and Torch allocates it faster than our pool


def check_keys(keys: torch.Tensor) -> None:
    """
    Raises:
        KeyDtypeError: keys are not integers that can be looked up.
    """
    if keys.dtype not in KEY_TYPES:
        names = ", ".join(str(kind).removeprefix("torch.") for kind in KEY_TYPES)
        raise KeyDtypeError(f"keys: expected one of {names}, got {str(keys.dtype).removeprefix('torch.')}")


def _table_of(request: str, dim: int) -> tuple[HPS, TableQuery]:
    ((server, query),) = tables_of(request)
    if query.dim != dim:
        raise ConfigError(f"dim: expected {query.dim}, as in the request, got {dim}")
    return server, query


def _lookup_on_cpu(keys: torch.Tensor, request: str, dim: int) -> torch.Tensor:
    return rows_on_cpu(keys, *_table_of(request, dim))


def rows_on_cpu(keys: torch.Tensor, server: HPS, query: TableQuery) -> torch.Tensor:
    """float32 rows of keys on the CPU."""
    check_keys(keys)
    shape = (*keys.shape, query.dim)
    if keys.numel() * query.dim <= _SMALL:
        rows = _empty(*shape, dtype=_FLOAT32)
        server.direct.lookup_into(keys.numpy(), query.model, query.table, rows.numpy())
        return rows
    memory = aligned_empty(shape)
    server.direct.lookup_into(keys.numpy(), query.model, query.table, memory)
    return torch.from_numpy(memory)


def rows_on_cuda(keys: torch.Tensor, server: HPS, query: TableQuery) -> torch.Tensor:
    """float32 rows of keys on a GPU, in the order of its current stream."""
    check_keys(keys)
    rows: torch.Tensor = server.lookup(keys, query.model, query.table)
    return rows if rows.dtype == torch.float32 else rows.float()


@torch.library.register_fake("hps_numba::lookup", lib=library)
def _shape_of_lookup(keys: torch.Tensor, request: str, dim: int) -> Any:
    check_keys(keys)
    return keys.new_empty((*keys.shape, dim), dtype=torch.float32)


def rows_of(keys: torch.Tensor, request: str, dim: int) -> torch.Tensor:
    """What the operator gives in an eager call; with plain tensors it skips the dispatcher."""
    if type(keys) is torch.Tensor and not (_modes() or _overrides() or _transform() is not None or _tracer() is not None):
        if keys.is_cuda:  # as ``is_plain`` says
            return _lookup_on_cuda(keys, request, dim)
        if keys.is_cpu:
            return _lookup_on_cpu(keys, request, dim)
    if not isinstance(keys, torch.Tensor):
        raise KeyDtypeError(f"keys: expected a tensor of integers, got {type(keys).__name__}")
    return lookup(keys, request, dim)


#: key encoding by the server's key bits, then by dtype
KEY_ENCODINGS_OF = {
    bits: {kind: encodings[str(kind).removeprefix("torch.")] for kind in KEY_TYPES} for bits, encodings in KEY_ENCODINGS.items()
}
#: requests for one table, bound to its cache on a GPU
table_bindings: Bindings[TableCache] = Bindings(find_cache, KEY_ENCODINGS_OF)


def _lookup_on_cuda(keys: torch.Tensor, request: str, dim: int) -> torch.Tensor:
    device = keys.get_device()
    binding = table_bindings[request, device]
    if binding is not None and binding.dim == dim and keys.is_contiguous():
        form = binding.encodings.get(keys.dtype)
        if form is not None:
            rows = _empty(*keys.shape, dim, dtype=_FLOAT32, device=keys.device)  # a tuple takes longer
            if binding.lookup(keys.data_ptr(), keys.numel(), rows.data_ptr(), current_stream(device), form):
                return rows
    return rows_on_cuda(keys, *_table_of(request, dim))


def follow_vmap(name: str) -> None:
    """Let ``torch.vmap`` take an operator whose first argument is keys of any shape: a batch of keys adds one dimension."""
    register = getattr(torch.library, "register_vmap", None)  # since Torch 2.5
    if register is None:
        return
    operator = getattr(torch.ops.hps_numba, name).default

    def follow(info: Any, dims: tuple[Any, ...], keys: torch.Tensor, *others: Any) -> tuple[torch.Tensor, int]:
        return operator(keys.movedim(dims[0], 0), *others), 0

    register(f"hps_numba::{name}", follow, lib=library)


def is_plain(keys: torch.Tensor) -> bool:
    """A tensor of the CPU or a GPU, with no tracer, mode or transform active that sees operations on it."""
    if type(keys) is not torch.Tensor or not (keys.is_cuda or keys.is_cpu):
        return False
    return not _is_observed()


def are_plain(several: list[torch.Tensor]) -> bool:
    """``is_plain`` for tensors on one device."""
    kind = torch.Tensor
    return is_plain(several[0]) and all(type(some) is kind for some in several)


def _is_observed() -> bool:
    return bool(_modes() or _overrides() or _transform() is not None or _tracer() is not None)


def _of_torch(module: Any, name: str) -> Callable[[], Any]:
    """A function of Torch that tells whether something is active; in a version that lacks it, something always is."""
    function: Callable[[], Any] = getattr(module, name, lambda: 1)
    return function


def _stream_of_object(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


#: the handle of the current stream of a GPU; twenty times cheaper than the object, but not public API
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_of_object)
_modes = _of_torch(torch._C, "_len_torch_dispatch_stack")
_overrides = _of_torch(torch._C, "_len_torch_function_stack")
_transform = _of_torch(getattr(torch._C, "_functorch", None), "peek_interpreter_stack")
_tracer = _of_torch(torch._C, "_get_tracing_state")


def _dispatched_on_cpu(keys: torch.Tensor, request: str, dim: int) -> torch.Tensor:
    note_thread()
    return _lookup_on_cpu(keys, request, dim)


def _dispatched_on_cuda(keys: torch.Tensor, request: str, dim: int) -> torch.Tensor:
    note_thread()
    return _lookup_on_cuda(keys, request, dim)


library.impl("lookup", _dispatched_on_cpu, "CPU")
library.impl("lookup", _dispatched_on_cuda, "CUDA")
follow_vmap("lookup")
lookup = torch.ops.hps_numba.lookup.default
"""The operator: float32 ``S + [dim]`` for keys of shape ``S``, on the device of the keys and its current stream.

Raises:
    KeyDtypeError: keys of another type.   ConfigError: ``dim`` is not that of the request.   Otherwise as ``HPS``,
    ``HPS.lookup``.
"""
