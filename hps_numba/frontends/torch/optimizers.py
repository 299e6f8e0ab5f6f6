"""Optimizers of rows: ``torch.optim.Optimizer``s, so that loss scalers and schedulers of learning rates take them as they are.

::

    layer = LookupLayer("ps_config.json", "model", 0, 16, trainable=True, initializer="normal")
    model = torch.nn.Sequential(layer, head)
    rows = Adagrad(model, lr=0.05)                     # the trained tables of the model
    dense = torch.optim.Adam(model.parameters())       # all the rest: rows are no parameters of the model

    loss.backward()
    torch.nn.utils.clip_grad_norm_([*model.parameters(), *trained_rows(model)], 1.0)   # after scaler.unscale_(rows), if scaled
    rows.step(); dense.step()
    rows.zero_grad(); dense.zero_grad()

A step writes the rows to every tier and every cache of the server before it returns. With several processes
(``torch.distributed``) each has its own server, and gradients of all processes are averaged, as DistributedDataParallel does
with those of the dense part: every process must step, clip and unscale in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from hps_numba.config.arguments import as_number
from hps_numba.config.messages import show
from hps_numba.errors import ConfigError
from hps_numba.frontends.torch.row_gradients import Rows, on_host
from hps_numba.frontends.torch.training import trained_rows
from hps_numba.training import trainer as row_training

__all__ = ["SGD", "Adagrad", "Adam", "RowOptimizer"]

Params = torch.nn.Module | Rows | Iterable[Any]
"""Modules (their trained tables), tables, or groups of these: ``{"params": ..., "lr": ...}``."""

_REDUCTIONS = ("mean", "sum", None)


class RowOptimizer(torch.optim.Optimizer):
    """What the optimizers of rows share.

    Args:
        params: a module, or an iterable of modules and ``Rows``, or of groups ``{"params": ..., "lr": ...}``.
        defaults: settings of groups that do not have their own.
        reduction: of gradients of several processes: ``mean``, ``sum``, or None: every process keeps its own.
        process_group: of ``torch.distributed``; None is all processes.

    Raises:
        ConfigError (a ValueError): a setting is wrong, or nothing trains.

    Thread safety: backward passes may run beside a step; calls of one optimizer take turns.
    """

    _rule: ClassVar[Callable[..., row_training.Rule]]

    def __init__(self, params: Params, defaults: dict[str, Any], *, reduction: str | None, process_group: Any) -> None:
        if reduction is not None and (not isinstance(reduction, str) or reduction not in _REDUCTIONS):
            raise ConfigError(f"reduction: expected 'mean', 'sum' or None, got {show(reduction)}")
        self._reduction = None if reduction is None else (reduction, process_group)
        self._trainers: dict[int, row_training.RowTrainer] = {}
        self._rule_of({**defaults})
        groups = _listed(params)
        super().__init__(groups if groups and isinstance(groups[0], dict) else [{"params": groups}], defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: ``{"params": ..., "lr": ...}``, where ``params`` is a module, ``Rows``, or several of these."""
        found = list(_tables_in(param_group["params"]))
        if not found:
            raise ConfigError("params: expected modules with layers of trainable=True, or their rows, got no trained rows")
        group = {**param_group, "params": found}
        rule = self._rule_of({**self.defaults, **group})
        super().add_param_group(group)
        for rows in found:
            rows.reduction, rows.unclaimed = self._reduction, False
            self._trainers[id(rows)] = row_training.RowTrainer(rows.server, rows.model, rows.table, rule)

    def _rule_of(self, group: Mapping[str, Any]) -> row_training.Rule:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every row that has a gradient; returns the loss that ``closure`` computes, if it is given.

        Raises:
            As ``HPS.insert``; tables before the one that failed have been updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rule = self._rule_of(group)
            for rows in group["params"]:
                keys, gradient = rows.gathered()
                if gradient is not None:
                    trainer = self._trainers[id(rows)]
                    trainer.initializer = rows.initializer
                    touched, gradients, copied, arrived = on_host(keys, gradient)
                    trainer.step(touched, gradients, rule, overwrite=copied, arrived=arrived)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; ``set_to_none`` is ignored, because a row without a gradient does not change."""
        for rows in self._tables():
            rows.grad = None

    def _tables(self) -> list[Rows]:
        return [rows for group in self.param_groups for rows in group["params"]]

    def trainers(self) -> list[row_training.RowTrainer]:
        """The trainer of each table, in the order of groups."""
        return [self._trainers[id(rows)] for rows in self._tables()]

    # -- state ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Settings, and for each table the count of ``steps``, int64 ``keys`` and float32 ``values`` ``[n, width]``."""
        state = {}
        for number, trainer in enumerate(self.trainers()):
            with trainer.paused():
                keys = trainer.state_keys()
                values = trainer.read_states(keys)
                state[number] = {"steps": trainer.steps, "keys": torch.from_numpy(keys), "values": torch.from_numpy(values)}
        return {**super().state_dict(), "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, for the same tables in the same order.

        Raises:
            ConfigError: it is that of other tables or of another optimizer.   ValueError: it has other groups.
        """
        trainers = self.trainers()
        if len(state_dict["state"]) != len(trainers):
            raise ConfigError(f"state: expected {len(trainers)} tables, got {len(state_dict['state'])}")
        states = [
            (trainer, int(kept["steps"]), kept["keys"].numpy(), kept["values"].numpy())
            for trainer, (_, kept) in zip(trainers, sorted(state_dict["state"].items()), strict=True)
        ]
        for trainer, _, keys, values in states:
            trainer.check_states(len(keys), values.shape)
        self.set_settings(state_dict["param_groups"])
        for trainer, steps, keys, values in states:
            trainer.set_states(steps, [(keys, values)])

    def set_settings(self, groups: list[dict[str, Any]]) -> None:
        """Restore the ``param_groups`` of a ``state_dict``: learning rates and so on.

        Raises:
            ValueError: there are other groups.
        """
        super().load_state_dict({"state": {}, "param_groups": groups})


def _listed(params: Any) -> list[Any]:
    if isinstance(params, (torch.Tensor, torch.nn.Module, str, bytes)) or not isinstance(params, Iterable):
        return [params]
    try:
        return list(params)
    except Exception as problem:  # whatever a foreign iterator raises
        raise ConfigError(f"params: expected modules or their trained rows, got {show(params)}") from problem


def _tables_in(params: Any) -> Iterable[Rows]:
    if isinstance(params, torch.nn.Module):
        yield from trained_rows(params)
    elif isinstance(params, Rows):
        yield params
    elif isinstance(params, (torch.Tensor, np.ndarray, str, bytes, Mapping)) or not isinstance(params, Iterable):
        raise ConfigError(f"params: expected modules or their trained rows, got {type(params).__name__}")
    else:
        for one in params:
            yield from _tables_in(one)


def _number(value: Any, name: str) -> float:
    if isinstance(value, torch.Tensor):  # Torch's optimizers take a learning rate as one
        value = value.item() if value.numel() == 1 else None
    return as_number(value, name)


def _setting(group: Mapping[str, Any], name: str) -> float:
    return _number(group[name], name)


class SGD(RowOptimizer):
    """``row -= lr * gradient``, as ``torch.optim.SGD`` without momentum.

    Args:
        params: a module, or an iterable of modules and ``Rows``, or of groups ``{"params": ..., "lr": ...}``.
        lr: learning rate.
        reduction: of the gradients of several processes: ``mean``, ``sum``, or None: every process keeps its own.
        process_group: of ``torch.distributed``; None for all processes.

    Raises:
        ConfigError (a ValueError): a setting is wrong, or nothing trains.
    """

    def __init__(self, params: Params, lr: float = 1e-3, *, reduction: str | None = "mean", process_group: Any = None) -> None:
        super().__init__(params, {"lr": lr}, reduction=reduction, process_group=process_group)

    def _rule_of(self, group: Mapping[str, Any]) -> row_training.Rule:
        return row_training.Sgd(_setting(group, "lr"))


class Adagrad(RowOptimizer):
    """Row-wise Adagrad: keeps one number per row, ``G``, the sum of the mean squares of its gradients.

    ``G += mean(gradient ** 2)``, then ``row -= lr * gradient / (sqrt(G) + eps)``. It takes ``1 / dim`` of the memory of
    ``torch.optim.Adagrad``, which keeps one number per element.

    Args:
        initial_accumulator_value: ``G`` of a row before its first gradient.
        params, lr, eps, reduction, process_group: as for ``SGD``; ``eps`` as above.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        *,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        reduction: str | None = "mean",
        process_group: Any = None,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "initial_accumulator_value": initial_accumulator_value}
        super().__init__(params, defaults, reduction=reduction, process_group=process_group)

    def _rule_of(self, group: Mapping[str, Any]) -> row_training.Rule:
        return row_training.Adagrad(_setting(group, "lr"), _setting(group, "eps"), _setting(group, "initial_accumulator_value"))


class Adam(RowOptimizer):
    """Lazy Adam, as ``torch.optim.SparseAdam``: only rows that have a gradient, and their moments, are updated.

    Bias correction counts the steps of the table, not those of a row.

    Args:
        betas, eps: as for ``torch.optim.SparseAdam``.
        params, lr, reduction, process_group: as for ``SGD``.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        reduction: str | None = "mean",
        process_group: Any = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, reduction=reduction, process_group=process_group)

    def _rule_of(self, group: Mapping[str, Any]) -> row_training.Rule:
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ConfigError(f"betas: expected two numbers, got {show(betas)}")
        beta1, beta2 = (_number(beta, "betas") for beta in betas)
        return row_training.Adam(_setting(group, "lr"), beta1, beta2, _setting(group, "eps"))
