"""The pooled operator: one row for each bag of keys, and the gradient of the weights.

``hps_numba::pooled(Tensor keys, Tensor offsets, Tensor? weights, str request, int dim, str combiner, float? max_norm,
int? padding) -> Tensor``. The rows of a bag go straight from the table to its sum; on a GPU too, unless
``max_norm`` is given or the table has slower tiers: then they are looked up first and combined by Torch.
"""

from __future__ import annotations

from typing import Any

import torch

from hps_numba.arrays.bags import COMBINERS, EQUAL, OFFSETS32, OPEN_END
from hps_numba.arrays.buffer_pool import aligned_empty
from hps_numba.frontends._device_path import can_pool
from hps_numba.frontends._queries import tables_of
from hps_numba.frontends.torch import operator
from hps_numba.frontends.torch.jit_forks import note_thread

__all__ = ["COMBINERS", "fused", "fused_rows", "pool_rows", "pooled"]

operator.library.define(
    "pooled(Tensor keys, Tensor offsets, Tensor? weights, str request, int dim, str combiner, float? max_norm, int? padding)"
    " -> Tensor"
)


def _pooled_on_cpu(
    keys: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
    request: str,
    dim: int,
    combiner: str,
    max_norm: float | None,
    padding: int | None,
) -> torch.Tensor:
    note_thread()
    operator.check_keys(keys)
    ((server, query),) = tables_of(request)
    out = aligned_empty((max(offsets.shape[0] - 1, 0), dim))
    if not len(out):
        return torch.from_numpy(out)
    keys, weights = without_tail(keys, offsets, weights)
    factors = None if weights is None else weights.detach().float().numpy()
    server.lookup_pooled(
        keys.detach().numpy(),
        offsets.detach().numpy(),
        query.model,
        query.table,
        None,
        weights=factors,
        combiner=combiner,
        max_norm=max_norm,
        padding=padding,
        out=out,
    )
    return torch.from_numpy(out)


def _pooled_on_cuda(
    keys: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
    request: str,
    dim: int,
    combiner: str,
    max_norm: float | None,
    padding: int | None,
) -> torch.Tensor:
    note_thread()
    operator.check_keys(keys)
    if max_norm is None and can_pool(request, keys.get_device(), keys.numel()):
        return fused(keys, offsets, weights, request, combiner, padding)
    rows = operator.lookup(keys, request, dim)
    return pool_rows(rows, offsets, weights, combiner, max_norm, None if padding is None else keys.long() != padding)


def fused(
    keys: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
    request: str,
    combiner: str,
    padding: int | None,
    *,
    include_last_offset: bool = True,
) -> torch.Tensor:
    """``pooled`` in one kernel, from the cache of the table on the GPU of the keys; offsets may come without the last."""
    bags = offsets.shape[0] - include_last_offset
    plain = offsets.is_contiguous() and offsets.dtype in _OFFSETS and offsets.get_device() == keys.get_device()
    if plain and padding is None and bags >= 0:
        options = _OFFSETS[offsets.dtype] | (0 if include_last_offset else OPEN_END)
        rows = _pooled_by_address(keys, offsets.data_ptr(), bags, options, weights, request, combiner)
        if rows is not None:
            return rows
    ((server, query),) = tables_of(request)
    answer: torch.Tensor = server.lookup_pooled(
        keys,
        offsets,
        query.model,
        query.table,
        weights=weights,
        combiner=combiner,
        padding=padding,
        include_last_offset=include_last_offset,
    )
    return answer if answer.dtype == torch.float32 else answer.float()


def fused_rows(keys: torch.Tensor, weights: torch.Tensor | None, request: str, combiner: str) -> torch.Tensor | None:
    """``fused`` for bags that are the rows of keys ``[bags, n]``; None where that takes more than the kernels of a cache."""
    if not keys.is_contiguous():
        return None
    return _pooled_by_address(keys, keys.shape[1], keys.shape[0], EQUAL, weights, request, combiner)


def _pooled_by_address(
    keys: torch.Tensor,
    offsets: int,
    bags: int,
    options: int,
    weights: torch.Tensor | None,
    request: str,
    combiner: str,
) -> torch.Tensor | None:
    device = keys.get_device()
    binding = operator.table_bindings[request, device]
    form = None if binding is None else binding.encodings.get(keys.dtype)
    if binding is None or form is None or not keys.is_contiguous():
        return None
    factors = None if weights is None else weights.detach().to(keys.device, torch.float32).contiguous()
    rows = torch.empty((bags, binding.dim), dtype=torch.float32, device=keys.device)
    done = binding.pool(
        keys.data_ptr(),
        keys.numel(),
        offsets,
        bags,
        rows.data_ptr(),
        operator.current_stream(device),
        form,
        combiner,
        0 if factors is None else factors.data_ptr(),
        options,
    )
    return rows if done else None


_OFFSETS = {torch.int64: 0, torch.int32: OFFSETS32}


operator.library.impl("pooled", _pooled_on_cpu, "CPU")
operator.library.impl("pooled", _pooled_on_cuda, "CUDA")


@torch.library.register_fake("hps_numba::pooled", lib=operator.library)
def _shape_of_pooled(keys: Any, offsets: Any, weights: Any, request: Any, dim: int, *_: Any) -> Any:
    operator.check_keys(keys)
    return keys.new_empty((offsets.shape[0] - 1, dim), dtype=torch.float32)


pooled = torch.ops.hps_numba.pooled.default
"""The operator.

Args:
    keys: ``[n]``.   offsets: int64 or int32 ``[bags + 1]``, ascending from 0; keys from the last one on are in no bag.
    weights: ``[n]``, or None.
    combiner: one of ``COMBINERS``; means are over the sum of weights, ``sqrtn`` over the root of the sum of their squares.
    max_norm: rows are clipped to this norm first, or None.   padding: a key that does not count, or None.

Returns float32 ``[bags, dim]``; a bag without keys gets 0.

Raises:
    KeyDtypeError: keys of another type.   Otherwise as ``HPS.lookup_pooled``.
"""


def without_tail(
    keys: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keys and weights without those from the last offset on, which are in no bag; waits for the device of the offsets."""
    end = int(offsets[-1])
    if not 0 <= end < keys.shape[0]:
        return keys, weights
    return keys[:end], None if weights is None else weights[:end]


def bags_of(offsets: torch.Tensor, n: int) -> torch.Tensor:
    """The number of the bag of each of ``n`` keys, int64 ``[n]``; the number of bags for keys that are in none."""
    return torch.searchsorted(offsets.long(), torch.arange(n, device=offsets.device), right=True) - 1


def clipped(rows: torch.Tensor, max_norm: float | None) -> torch.Tensor:
    """Rows scaled down to a norm."""
    if max_norm is None:
        return rows
    return rows * (max_norm / rows.norm(dim=-1, keepdim=True).clamp_min(max_norm))


def pool_rows(
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
    combiner: str,
    max_norm: float | None = None,
    counted: torch.Tensor | None = None,
) -> torch.Tensor:
    """``pooled`` of rows that were looked up: float32 ``[n, dim]``; ``counted``: bool ``[n]``, which of them count."""
    n, bags = rows.shape[0], offsets.shape[0] - 1
    bag = bags_of(offsets, n)
    factors = rows.new_ones(n) if weights is None else weights.detach().float()
    if counted is not None:
        factors = torch.where(counted, factors, 0)
    rows = clipped(rows, max_norm)
    answer = rows.new_zeros((bags + 1, rows.shape[1]))  # the last takes the keys that are in no bag
    if combiner == "max":
        if counted is not None:
            rows = torch.where(counted[:, None], rows, -torch.inf)
        answer = answer.scatter_reduce(0, bag[:, None].expand_as(rows), rows, "amax", include_self=False)[:bags]
        return torch.where(answer == -torch.inf, 0, answer)
    answer = answer.index_add(0, bag, rows * factors[:, None])
    divisor = _divisor(factors, bag, bags, combiner)
    return (answer if divisor is None else torch.where(divisor == 0, 0, answer / divisor))[:bags]


def _divisor(factors: torch.Tensor, bag: torch.Tensor, bags: int, combiner: str) -> torch.Tensor | None:
    """float32 ``[bags + 1, 1]``, the last for the keys that are in no bag; or None for sums."""
    if combiner == "sum":
        return None
    terms = factors if combiner == "mean" else factors * factors
    total = factors.new_zeros(bags + 1).index_add(0, bag, terms)
    return (total if combiner == "mean" else total.sqrt())[:, None]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    keys, offsets, weights, *ctx.settings = inputs
    ctx.save_for_backward(keys, offsets, weights, output)


def _gradients(ctx: Any, upstream: torch.Tensor) -> tuple[Any, ...]:
    """Of ``sum(output * upstream)`` by the weights; rows are frozen."""
    keys, offsets, weights, answer = ctx.saved_tensors
    request, dim, combiner, max_norm, padding = ctx.settings
    if weights is None or not ctx.needs_input_grad[2]:
        return (None,) * 8
    factors = weights.detach().float()
    counted = torch.ones_like(factors) if padding is None else (keys.long() != padding).float()
    factors = factors * counted
    bag, bags = bags_of(offsets, keys.shape[0]), offsets.shape[0] - 1
    of_none = upstream.new_zeros((1, dim))  # for keys that are in no bag
    rows, toward = clipped(operator.lookup(keys, request, dim), max_norm), torch.cat([upstream, of_none])[bag]
    gradient = (rows * toward).sum(-1)
    divisor = _divisor(factors, bag, bags, combiner)
    if divisor is not None:
        against = (torch.cat([answer, of_none])[bag] * toward).sum(-1)
        share = divisor[bag, 0]
        if combiner == "sqrtn":
            against = against * factors / share
        gradient = torch.where(share == 0, 0, (gradient - against) / share)
    return (None, None, (gradient * counted).to(weights.dtype), *(None,) * 5)


torch.library.register_autograd("hps_numba::pooled", _gradients, setup_context=_remember, lib=operator.library)
