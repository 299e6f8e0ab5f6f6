"""Layers whose rows train: the operators, and what a layer keeps for it.

An operator for training does what the one for serving does, after it created rows for new keys if the layer has an initializer.
It takes ``switch`` besides: a 0 that needs a gradient, so that the answer does. Its backward pass hands keys and gradients to
``Rows`` through an opaque operator, in compiled graphs too. Each of these has a number, so that no compiler merges two of them,
and returns the 0 that is the gradient of ``switch``, so that none is dropped as dead code.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hps_numba.config.arguments import as_flag, as_max_norm, as_number, as_padding, show
from hps_numba.errors import ConfigError
from hps_numba.frontends._queries import Query, TableQuery, tables_of
from hps_numba.frontends.torch import operator, pooling
from hps_numba.frontends.torch.row_gradients import Rows, as_int64, parameter_of
from hps_numba.frontends.torch.table_layer import TableLayer
from hps_numba.server.registry import config_of
from hps_numba.training.initializers import Initializer, as_initializer
from hps_numba.training.trainer import create_rows

__all__ = ["OneTableLayer", "TrainableLayer", "trained_rows"]

_define = operator.library.define
_define("create_rows(Tensor keys, str request, int number, str initializer, int? padding) -> Tensor")
_define("add_gradient(Tensor keys, Tensor gradient, str request, int number, int site, int? padding=None) -> Tensor")
_define(
    "add_bag_gradient(Tensor keys, Tensor offsets, Tensor? weights, Tensor gradient, str request, int dim, str combiner,"
    " float? max_norm, int? padding, int site, bool tail=False) -> Tensor"
)
_define("lookup_trained(Tensor keys, Tensor switch, str request, int dim, int? padding=None) -> Tensor")
_define("lookup_many_trained(Tensor[] keys, Tensor switch, str request, int[] dims) -> Tensor[]")
_define(
    "pooled_trained(Tensor keys, Tensor offsets, Tensor? weights, str request, int dim, str combiner, float? max_norm,"
    " int? padding, Tensor switch, bool tail=False) -> Tensor"
)

_sites = itertools.count()  # a new number for each backward pass that is run or compiled

# -- rows for new keys ---------------------------------------------------------------------

_initializers: dict[str, Initializer] = {}


def _named(initializer: Initializer) -> str:
    """The name by which the operators of this process find an initializer."""
    name = repr(initializer)
    _initializers[name] = initializer
    return name


def _create_rows(keys: torch.Tensor, request: str, number: int, initializer: str, padding: int | None) -> torch.Tensor:
    operator.check_keys(keys)
    server, query = tables_of(request)[number]
    flat = as_int64(keys, key_bits=server.direct.key_bits).cpu().numpy()
    if padding is not None:
        flat = flat[flat != padding]
    create_rows(server, query.model, query.table, flat, _initializers[initializer])
    return keys.clone()


@torch.library.register_fake("hps_numba::create_rows", lib=operator.library)
def _shape_of_created(keys: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(keys)


# -- gradients of rows ---------------------------------------------------------------------


def _add_gradient(
    keys: torch.Tensor, gradient: torch.Tensor, request: str, number: int, site: int, padding: int | None = None
) -> torch.Tensor:
    if padding is not None:
        counted = keys.long() != padding
        keys, gradient = keys[counted], gradient[counted]
    parameter_of(request, number).add_gradient(keys, gradient)
    return torch.zeros(1)


@torch.library.register_fake("hps_numba::add_gradient", lib=operator.library)
def _shape_of_added(*_: Any) -> torch.Tensor:
    return torch.zeros(1)


def _add_bag_gradient(
    keys: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
    gradient: torch.Tensor,
    request: str,
    dim: int,
    combiner: str,
    max_norm: float | None,
    padding: int | None,
    site: int,
    tail: bool = False,
) -> torch.Tensor:
    if tail:
        keys, weights = pooling.without_tail(keys, offsets, weights)
    n, bags = keys.shape[0], offsets.shape[0] - 1
    bag = pooling.bags_of(offsets, n)
    counted = None if padding is None else keys.long() != padding
    needs_rows = combiner == "max" or max_norm is not None
    rows = operator.lookup(keys, request, dim) if needs_rows else gradient.new_empty(0)
    toward = gradient.float()[bag]
    if combiner == "max":
        largest = pooling.pool_rows(rows, offsets, None, "max", max_norm, counted)[bag]
        chosen = pooling.clipped(rows, max_norm) == largest
        if counted is not None:
            chosen &= counted[:, None]
        shared = gradient.new_zeros((bags, dim)).index_add(0, bag, chosen.to(gradient.dtype))
        toward = torch.where(chosen, toward / shared[bag], 0)
    else:
        factors = toward.new_ones(n) if weights is None else weights.detach().float()
        if counted is not None:
            factors = torch.where(counted, factors, 0)
        divisor = pooling._divisor(factors, bag, bags, combiner)
        toward = toward * factors[:, None]
        if divisor is not None:
            toward = torch.where(divisor[bag] == 0, 0, toward / divisor[bag])
    if max_norm is not None:  # of a row that is clipped, the part of the gradient along it does not count
        norm = rows.norm(dim=-1, keepdim=True)
        along = rows * ((rows * toward).sum(-1, keepdim=True) / norm.square())
        toward = torch.where(norm > max_norm, (toward - along) * (max_norm / norm), toward)
    if counted is not None:
        keys, toward = keys[counted], toward[counted]
    parameter_of(request).add_gradient(keys, toward)
    return torch.zeros(1)


@torch.library.register_fake("hps_numba::add_bag_gradient", lib=operator.library)
def _shape_of_added_bags(*_: Any) -> torch.Tensor:
    return torch.zeros(1)


# -- lookups that train ---------------------------------------------------------------------


def _lookup_trained(
    keys: torch.Tensor, switch: torch.Tensor, request: str, dim: int, padding: int | None = None
) -> torch.Tensor:
    return operator.rows_of(keys, request, dim)


def _lookup_many_trained(keys: list[torch.Tensor], switch: torch.Tensor, request: str, dims: list[int]) -> list[torch.Tensor]:
    rows: list[torch.Tensor] = torch.ops.hps_numba.lookup_many(keys, request, dims)
    return rows


def _pooled_trained(keys: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, *settings: Any) -> torch.Tensor:
    return pooling.pooled(keys, offsets, None if weights is None else weights.detach(), *settings[:5])


for _name, _function in (
    ("create_rows", _create_rows),
    ("add_gradient", _add_gradient),
    ("add_bag_gradient", _add_bag_gradient),
    ("lookup_trained", _lookup_trained),
    ("lookup_many_trained", _lookup_many_trained),
    ("pooled_trained", _pooled_trained),
):
    for _device in ("CPU", "CUDA"):
        operator.library.impl(_name, _function, _device)
for _name in ("create_rows", "lookup_trained"):
    operator.follow_vmap(_name)


@torch.library.register_fake("hps_numba::lookup_trained", lib=operator.library)
def _shape_of_lookup(
    keys: torch.Tensor, switch: torch.Tensor, request: str, dim: int, padding: int | None = None
) -> torch.Tensor:
    operator.check_keys(keys)
    return keys.new_empty((*keys.shape, dim), dtype=torch.float32)


@torch.library.register_fake("hps_numba::lookup_many_trained", lib=operator.library)
def _shapes_of_lookups(keys: Any, switch: Any, request: str, dims: Any) -> Any:
    return [some.new_empty((*some.shape, dim), dtype=torch.float32) for some, dim in zip(keys, dims, strict=True)]


@torch.library.register_fake("hps_numba::pooled_trained", lib=operator.library)
def _shape_of_pooled(keys: Any, offsets: Any, weights: Any, request: Any, dim: int, *_: Any) -> Any:
    operator.check_keys(keys)
    return keys.new_empty((offsets.shape[0] - 1, dim), dtype=torch.float32)


def _remember_lookup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    keys, _, ctx.request, _, *padding = inputs  # the dispatcher leaves out last arguments that have their default value
    ctx.padding = padding[0] if padding else None
    ctx.save_for_backward(*(keys if isinstance(keys, (list, tuple)) else [keys]))


def _lookup_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    (keys,) = ctx.saved_tensors
    done = torch.ops.hps_numba.add_gradient(keys, gradient, ctx.request, 0, next(_sites), ctx.padding)
    return None, done, None, None, None


def _lookup_many_gradient(ctx: Any, gradients: list[Any]) -> tuple[Any, ...]:
    done = [
        torch.ops.hps_numba.add_gradient(keys, gradient, ctx.request, number, next(_sites))
        for number, (keys, gradient) in enumerate(zip(ctx.saved_tensors, gradients, strict=True))
        if gradient is not None
    ]
    return [None] * len(gradients), torch.stack(done).sum(0) if done else None, None, None


def _pooled_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    keys, offsets, weights, _ = ctx.saved_tensors
    of_serving = pooling._gradients(ctx, gradient)
    done = torch.ops.hps_numba.add_bag_gradient(keys, offsets, weights, gradient, *ctx.settings, next(_sites), ctx.tail)
    return *of_serving, done, None


def _remember_pooled(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    keys, offsets, weights, *others = inputs  # the dispatcher leaves out last arguments that have their default value
    ctx.settings, ctx.tail = (
        others[:5],
        any(others[6:]),
    )  # settings in the form that the backward pass of the serving operator takes
    ctx.save_for_backward(keys, offsets, weights, output)


_register = torch.library.register_autograd
_register("hps_numba::lookup_trained", _lookup_gradient, setup_context=_remember_lookup, lib=operator.library)
_register("hps_numba::lookup_many_trained", _lookup_many_gradient, setup_context=_remember_lookup, lib=operator.library)
_register("hps_numba::pooled_trained", _pooled_gradient, setup_context=_remember_pooled, lib=operator.library)


# -- layers ---------------------------------------------------------------------


class TrainableLayer(TableLayer):
    """A layer on tables of a server that may train their rows.

    Attributes:
        trainable: backward passes accumulate gradients of rows. It may be changed at any time.
        read_only: the layer neither creates nor trains rows, whatever ``trainable`` says. It may be changed at any time.

    New rows are created in training mode alone: after ``eval()``, lookups create none.
    """

    __jit_unused_properties__ = ("tables", "rows")

    def _set_training(self, trainable: bool, initializer: str | Initializer | None, read_only: bool) -> None:
        self.trainable: bool = as_flag(trainable, "trainable")
        self.read_only: bool = as_flag(read_only, "read_only")
        self.initializer = as_initializer(initializer)
        if self.initializer is not None and not trainable:
            raise ConfigError("initializer: expected trainable=True with it: only rows that train are made for new keys")
        self._switch = torch.zeros(1, requires_grad=True)
        self._initializer_text = "" if self.initializer is None else _named(self.initializer)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("read_only", False)  # pickled by an earlier version
        if self.initializer is not None:
            self._initializer_text = _named(self.initializer)

    @property
    def tables(self) -> tuple[Rows, ...]:
        """The tables of the layer, as parameters for the optimizers of this package; builds the server if need be."""
        raise NotImplementedError

    def _rows_of(self, request: str) -> Rows:
        rows = parameter_of(request)
        if self.initializer is not None:
            if rows.initializer not in (None, self.initializer):
                expected = f"{rows.initializer!r}, as another layer of {rows!r} has"
                raise ConfigError(f"initializer: expected {expected}, got {self.initializer!r}")
            rows.initializer = self.initializer
        return rows

    def _training_repr(self) -> str:
        if not self.trainable:
            return ""
        initializer = "" if self.initializer is None else f", initializer={self.initializer!r}"
        return ", trainable=True" + initializer + (", read_only=True" if self.read_only else "")

    def _trains(self) -> bool:
        """Whether the backward pass of this call reaches the rows of a layer that trains; exported programs only serve."""
        return torch.is_grad_enabled() and not self.read_only and not _is_exporting()

    def _created(self, keys: torch.Tensor, request: str, number: int = 0, *, padding: int | None = None) -> torch.Tensor:
        """The keys, once their rows exist, if the layer creates rows; in evaluation mode (``eval()``) it does not."""
        if not self._initializer_text or not self.training:
            return keys
        text = self._initializer_text
        created: torch.Tensor = torch.ops.hps_numba.create_rows(keys, request, number, text, padding)
        return created


class OneTableLayer(TrainableLayer):
    """A layer on one table.

    Attributes:
        request: what its operator is called with (``frontends/_queries.py``).
        ps_config_file, model_name, table_id, emb_vec_size: as given; a path as text.
    """

    def __init__(
        self,
        ps_config_file: str | os.PathLike[str] | Mapping[str, Any],
        model_name: str,
        table_id: int | str,
        emb_vec_size: int,
        trainable: bool,
        initializer: str | Initializer | None,
        read_only: bool,
    ) -> None:
        super().__init__()
        query = TableQuery(model_name, table_id, emb_vec_size)
        self.ps_config_file = config_of(ps_config_file)
        self.model_name, self.table_id = query.model, query.table
        self.request: str = Query(self.ps_config_file, (query,)).to_json()
        self.emb_vec_size: int = query.dim
        self._set_training(trainable, initializer, read_only)

    def _set_options(self, padding_idx: int | None, max_norm: float | None, norm_type: float, scale_grad_by_freq: bool) -> None:
        """Keep those options of Torch's embeddings that have an effect here, and refuse those that have none."""
        max_norm = as_max_norm(max_norm)
        if max_norm is not None and not max_norm >= 0:
            raise ConfigError(f"max_norm: expected None or a number from 0 on, got {max_norm}")
        if as_number(norm_type, "norm_type") != 2:
            raise ConfigError(f"norm_type: expected 2.0, by which rows are clipped, got {norm_type}")
        if as_flag(scale_grad_by_freq, "scale_grad_by_freq"):
            raise ConfigError("scale_grad_by_freq: expected False, as gradients of equal keys are added, got True")
        try:
            padding = None if padding_idx is None else as_padding(padding_idx)
        except ConfigError:
            padding = 1 << 64
        if padding is not None and not -(1 << 63) <= padding < 1 << 63:
            raise ConfigError(f"padding_idx: expected None or an integer of 64 bits, got {show(padding_idx)}")
        self.padding_idx = padding
        self.max_norm = max_norm

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a layer that was pickled before it had all its attributes."""
        super().__setstate__(state)
        for name in ("padding_idx", "max_norm"):
            self.__dict__.setdefault(name, None)
        query = Query.from_json(self.request)
        self.ps_config_file = query.config
        self.model_name, self.table_id = query.tables[0].model, query.tables[0].table

    def _request_for_all(self) -> str:
        return self.request

    @property
    def rows(self) -> Rows:
        """The rows of the table, with their ``grad``, for the optimizers of this package; builds the server if needed."""
        return self._rows_of(self.request)

    @property
    def tables(self) -> tuple[Rows, ...]:
        return (self.rows,)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        (query,) = Query.from_json(self.request).tables
        return f"{query.model}, {query.table}, {query.dim}, {self._settings_repr()}{self._training_repr()}"

    def _settings_repr(self) -> str:
        """The setting by which the layer differs from others on the table."""
        raise NotImplementedError


def _is_exporting() -> bool:
    """Not by ``torch.compiler.is_exporting()``, which ``torch.compile`` takes for true before Torch 2.13."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def trained_rows(*modules: torch.nn.Module) -> Iterator[Rows]:
    """The trained tables of all layers in some modules, each once: for the optimizers of this package, and for clipping.

    Raises:
        As ``HPS``, if a server must be built.
    """
    seen: dict[int, Rows] = {}
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, TrainableLayer) and layer.trainable and not layer.read_only:
                seen |= {id(rows): rows for rows in layer.tables}
    yield from seen.values()
