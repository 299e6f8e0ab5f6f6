"""The Torch operator: opaque to compilers, so that rows are looked up when a graph runs and never baked into it.

``hps_numba::lookup(Tensor keys, str request, int dim) -> Tensor``. What is asked for is a line of text
(``frontends/_requests.py``): a graph that was compiled, exported or scripted holds that text and no server, and runs in any
process that imported ``hps_numba.frontends.torch``.

Defined by ``torch.library.Library`` and not by ``custom_op``: that takes ten microseconds more a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hps_numba.cache import EmbeddingCache
from hps_numba.errors import ClosedError, KeyDtypeError
from hps_numba.frontends._requests import Wanted, answer, tables_of
from hps_numba.interop_device import FORMS
from hps_numba.parameter_server import HPS
from hps_numba.table_groups import TogetherOnDevice

__all__ = [
    "KEY_TYPES",
    "are_plain",
    "bound_to",
    "check_keys",
    "current_stream",
    "is_plain",
    "library",
    "lookup",
    "rows_of",
    "rows_on_cuda",
    "tables_bound_to",
    "unbind",
]

KEY_TYPES = (torch.int64, torch.int32, torch.uint32, torch.uint64)

#: where operators of this package are defined
library = torch.library.Library("hps_numba", "DEF")
library.define("lookup(Tensor keys, str request, int dim) -> Tensor")


def check_keys(keys: torch.Tensor) -> None:
    """
    Raises:
        KeyDtypeError: keys are no integers that can be looked up.
    """
    if keys.dtype not in KEY_TYPES:
        names = ", ".join(str(kind).removeprefix("torch.") for kind in KEY_TYPES)
        raise KeyDtypeError(f"keys: {str(keys.dtype).removeprefix('torch.')} came, one of {names} is wanted")


def _lookup_on_cpu(keys: torch.Tensor, request: str, dim: int) -> torch.Tensor:
    check_keys(keys)
    (rows,) = answer(request, [keys.detach().numpy()])
    return torch.from_numpy(rows)


def rows_on_cuda(keys: torch.Tensor, server: HPS, wanted: Wanted) -> torch.Tensor:
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


@dataclass(frozen=True, slots=True)
class Bound:
    """The cache of a table on a GPU, and how its kernels read keys of each dtype."""

    server: HPS
    cache: EmbeddingCache
    forms: Mapping[torch.dtype, str]


_bound: dict[tuple[str, int], Bound] = {}
_FORMS = {wide: {kind: FORMS[wide][str(kind).removeprefix("torch.")] for kind in KEY_TYPES} for wide in (False, True)}


def bound_to(request: str, device: int) -> Bound | None:
    """What a request for one table leads to on a GPU; None where an answer takes more than the kernels of a cache.

    Raises:
        As ``HPS``.
    """
    bound = _bound.get((request, device))
    if bound is None:
        ((server, wanted),) = tables_of(request)
        cache = server.cache_on(device, wanted.model, wanted.table)
        if cache is None:
            return None
        bound = _bound[request, device] = Bound(server, cache, _FORMS[server.wide])
    return None if bound.server.records else bound


@dataclass(frozen=True, slots=True)
class BoundTables:
    """The caches of some tables of a model on a GPU, looked up together."""

    server: HPS
    together: TogetherOnDevice
    forms: Mapping[torch.dtype, str]


_bound_tables: dict[tuple[str, int], BoundTables] = {}


def tables_bound_to(request: str, device: int) -> BoundTables | None:
    """What a request for several tables leads to on a GPU; None where an answer takes more than the kernels of caches.

    Raises:
        As ``HPS``.
    """
    bound = _bound_tables.get((request, device))
    if bound is None:
        tables = tables_of(request)
        server, model = tables[0][0], tables[0][1].model
        if any(other is not server or wanted.model != model for other, wanted in tables):
            return None
        together = server.together_on(device, model, [wanted.table for _, wanted in tables])
        if together is None:
            return None
        bound = _bound_tables[request, device] = BoundTables(server, together, _FORMS[server.wide])
    return None if bound.server.records else bound


def unbind(request: str, device: int) -> None:
    """Forget caches that were closed."""
    _bound.pop((request, device), None)
    _bound_tables.pop((request, device), None)


def _lookup_on_cuda(keys: torch.Tensor, request: str, dim: int) -> torch.Tensor:
    device = keys.get_device()
    bound = bound_to(request, device)
    form = None if bound is None else bound.forms.get(keys.dtype)
    if bound is not None and form is not None and keys.is_contiguous():
        rows = torch.empty((*keys.shape, dim), dtype=torch.float32, device=keys.device)
        try:
            bound.cache.lookup(keys.data_ptr(), keys.numel(), rows.data_ptr(), current_stream(device), key_form=form)
        except ClosedError:
            unbind(request, device)  # and let the server say who was closed, or a new one answer
        else:
            return rows
    ((server, wanted),) = tables_of(request)
    return rows_on_cuda(keys, server, wanted)


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
lookup = torch.ops.hps_numba.lookup.default
"""The operator: float32 ``S + [dim]`` for keys of shape ``S``, on the device of the keys and its current stream.

Raises:
    KeyDtypeError: keys of another type.   Otherwise as ``HPS``, ``HPS.lookup``.
"""
