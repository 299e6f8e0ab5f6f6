"""``LookupLayer``: an embedding layer whose rows live in a server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from hps_numba.config.arguments import as_flag
from hps_numba.config.messages import show
from hps_numba.errors import ConfigError
from hps_numba.frontends.torch.operator import lookup, rows_of
from hps_numba.frontends.torch.training import OneTableLayer
from hps_numba.server.registry import server_of
from hps_numba.training.initializers import Initializer

__all__ = ["Init", "LookupLayer"]

_ROW_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def Init(ps_config_file: str | os.PathLike[str] | Mapping[str, Any], *, allow_code: bool = False) -> None:
    """Build the server of a config and load its models; do nothing if this process already has that server.

    A layer does the same when it is first called, but imports nothing: its config may come from a model file.

    Args:
        allow_code: the config may name Python code to run (``path.py:NAME``, ``package.module:NAME``).

    Raises:
        As ``hps_numba.HPS``.
    """
    server_of(ps_config_file, allow_code=allow_code)


class LookupLayer(OneTableLayer):
    """Looks up the row of each key, like ``torch.nn.Embedding``, in a table of any size with any integers as keys.

    Args:
        ps_config_file: path of the JSON, or its content as a dict; an empty path means the server that ``Init`` made. It is
            read when the layer is first called in a process.
        model_name: a deployed model.
        table_id: number of the table in its model, or its name.
        emb_vec_size: elements of a row.
        output_dtype: of the answer: ``torch.float32``, ``float16`` or ``bfloat16``.
        padding_idx: a key whose row does not train, or None; it is looked up like any other.
        max_norm: rows of the answer are clipped to this norm, or None. The table itself does not change, and the gradient is
            that of the clipped row.
        norm_type, scale_grad_by_freq, sparse: as ``torch.nn.Embedding`` has them: only 2.0 and False are supported; gradients
            are those of the rows that were looked up, whatever ``sparse`` says.
        trainable: train the rows: backward passes accumulate their gradients for the optimizers of this package.
        initializer: creates trained rows that do not exist when they are first looked up in training mode with gradients
            enabled: ``zeros``, ``normal``, ``uniform`` or a function (``hps_numba/training/initializers.py``). With None, such
            keys get the table's default value, and a row with their first gradient. An initializer copies keys on a GPU to the
            host.
        read_only: neither create nor train rows, whatever ``trainable`` says: for models that serve what others train.

    Call it with keys of any shape ``S``, strides and integer type (int64, int32, uint32, uint64), on the CPU or on a GPU of
    the model's ``deployed_device_list``; the answer is ``S + [emb_vec_size]`` on the same device, in the order of its current
    stream. A key that no tier has gets the table's default value. Rows are frozen, or are trained through ``rows``; either
    way the layer has no parameters, and its ``state_dict`` names the table but has no rows (unless ``rows_in_state_dict`` is
    set). It can be compiled, exported, scripted, pickled and copied, and works with ``torch.vmap``; none of that copies rows.

    Raises (when called):
        KeyDtypeError: keys are not integers.   Otherwise as ``hps_numba.HPS`` and ``HPS.lookup``.

    Thread safety: any thread may call it.
    """

    def __init__(
        self,
        ps_config_file: str | os.PathLike[str] | Mapping[str, Any],
        model_name: str,
        table_id: int | str,
        emb_vec_size: int,
        *,
        output_dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        trainable: bool = False,
        initializer: str | Initializer | None = None,
        read_only: bool = False,
    ) -> None:
        super().__init__(ps_config_file, model_name, table_id, emb_vec_size, trainable, initializer, read_only)
        if not isinstance(output_dtype, torch.dtype) or output_dtype not in _ROW_TYPES:
            names = ", ".join(str(kind).removeprefix("torch.") for kind in _ROW_TYPES)
            got = str(output_dtype).removeprefix("torch.") if isinstance(output_dtype, torch.dtype) else show(output_dtype)
            raise ConfigError(f"output_dtype: expected one of {names}, got {got}")
        as_flag(sparse, "sparse")
        self.output_dtype = output_dtype
        self._set_options(padding_idx, max_norm, norm_type, scale_grad_by_freq)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of HugeCTR's layer, in a model that was pickled whole."""
        if "request" not in state:
            LookupLayer.__init__(self, *(state[name] for name in ("ps_config_file", "model_name", "table_id", "emb_vec_size")))
            state = {**self.__dict__, **state}
        super().__setstate__(state)

    def forward(self, keys: torch.Tensor, version: int | None = None) -> torch.Tensor:
        """``S + [emb_vec_size]`` for keys of shape ``S``; ``version``: as for ``HPS.lookup``, but not in a graph or script."""
        if torch.jit.is_scripting():  # a script has only the operator
            assert version is None, "version: expected None in a script"
            rows = torch.ops.hps_numba.lookup(keys, self.request, self.emb_vec_size)
        elif version is not None:
            return self._at(version, keys)
        elif self.trainable and self._trains():
            rows = self._trained(keys)
        elif torch.compiler.is_compiling():  # here: a compiled graph checks in Python that two modules have one ``torch``
            rows = lookup(keys, self.request, self.emb_vec_size)
        else:
            rows = rows_of(keys, self.request, self.emb_vec_size)
        if self.max_norm is not None:
            rows = rows * (self.max_norm / rows.norm(2.0, dim=-1, keepdim=True).clamp_min(self.max_norm))
        return rows if self.output_dtype == torch.float32 else rows.to(self.output_dtype)

    def _at(self, version: int, keys: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self._of_version(version, lambda: self.forward(keys))
        return rows

    def _trained(self, keys: torch.Tensor) -> torch.Tensor:
        keys = self._created(keys, self.request, padding=self.padding_idx)
        operator: Any = torch.ops.hps_numba.lookup_trained
        rows: torch.Tensor = operator(keys, self._switch, self.request, self.emb_vec_size, self.padding_idx)
        return rows

    def _settings_repr(self) -> str:
        return f"output_dtype={self.output_dtype}"
