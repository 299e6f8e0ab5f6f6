"""``HPS`` with the argument names and answers of ``hugectr.inference``; everything else there is this package's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from hps_numba.server import hps

__all__ = ["HPS"]


def _also_called(**others: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let callers use other names for arguments: ``other="name"``."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            for other in others.keys() & named.keys():
                if others[other] in named:
                    raise TypeError(f"{function.__name__}() got {other} and {others[other]}, which are the same argument")
                named[others[other]] = named.pop(other)
            return function(*args, **named)

        return call

    return decorate


class HPS(hps.HPS):
    """``hps_numba.HPS`` as HugeCTR calls it: ``HPS(ps_config)`` or ``HPS(hps_json_config_file="ps.json")``.

    The names ``config`` and ``keys`` of ``hps_numba.HPS`` are taken too. All other methods are those of ``hps_numba.HPS``.
    """

    @_also_called(hps_json_config_file="ps_config", config="ps_config")
    def __init__(self, ps_config: Any, **options: Any) -> None:
        super().__init__(ps_config, **options)

    @_also_called(keys="h_keys")
    def lookup(self, h_keys: Any, model_name: str, table_id: int | str, device_id: int | None = 0, **options: Any) -> Any:
        """``hps_numba.HPS.lookup``, but rows for keys in host memory are a NumPy array, whatever the keys are."""
        if not isinstance(h_keys, (list, np.ndarray)) and not hasattr(h_keys, "__cuda_array_interface__"):
            h_keys = np.asarray(h_keys)
        return super().lookup(h_keys, model_name, table_id, device_id, **options)
