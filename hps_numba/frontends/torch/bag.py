"""``HPSEmbeddingBag``: pooled rows of a table in a server, called like ``torch.nn.EmbeddingBag``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from hps_numba.arrays.bags import MAX_KEYS
from hps_numba.config.arguments import as_flag, as_word
from hps_numba.errors import ConfigError
from hps_numba.frontends._device_path import can_pool
from hps_numba.frontends.torch.operator import check_keys, is_plain, table_bindings
from hps_numba.frontends.torch.pooling import COMBINERS, fused, fused_rows, pooled
from hps_numba.frontends.torch.training import OneTableLayer
from hps_numba.training.initializers import Initializer

__all__ = ["HPSEmbeddingBag"]


class HPSEmbeddingBag(OneTableLayer):
    """Looks up bags of keys and pools each bag into one row, like ``torch.nn.EmbeddingBag``.

    Args:
        ps_config_file, model_name, table_id, emb_vec_size: as for ``LookupLayer``.
        mode: ``sum``; ``mean``, divided by the sum of weights; ``max``; ``sqrtn``, divided by the root of the sum of squared
            weights.
        max_norm: rows are clipped to this norm before they are weighted, or None. The table itself does not change.
        padding_idx: a key to leave out, or None.
        include_last_offset: ``offsets`` have one more, at which the last bag ends. Keys from there on are in no bag, so that
            keys can be padded to a fixed length.
        norm_type, scale_grad_by_freq, sparse: as for ``LookupLayer``.
        trainable, initializer, read_only: as for ``LookupLayer``. With ``max_norm`` the gradient is that of the clipped row.
            With ``max``, rows that share the largest value share its gradient.

    It can be compiled, exported and scripted. Rows are frozen by default; gradients flow to ``per_sample_weights``.
    Thread safety: any thread may call it.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        ps_config_file: str | os.PathLike[str] | Mapping[str, Any],
        model_name: str,
        table_id: int | str,
        emb_vec_size: int,
        *,
        mode: str = "mean",
        max_norm: float | None = None,
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        trainable: bool = False,
        initializer: str | Initializer | None = None,
        read_only: bool = False,
    ) -> None:
        super().__init__(ps_config_file, model_name, table_id, emb_vec_size, trainable, initializer, read_only)
        as_word(mode, "mode", COMBINERS)
        as_flag(sparse, "sparse")
        self._set_options(padding_idx, max_norm, norm_type, scale_grad_by_freq)
        self.mode = mode
        self.include_last_offset = as_flag(include_last_offset, "include_last_offset")

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
        version: int | None = None,
    ) -> torch.Tensor:
        """The pooled rows, float32 ``[bags, emb_vec_size]``; a bag without keys gets 0.

        Args:
            input: keys, ``[bags, n]``, or ``[n]`` with ``offsets``.
            offsets: int64 or int32 ``[bags]``: where each bag begins, from 0 on; with ``include_last_offset`` one more, where
                the last bag ends.
            per_sample_weights: numbers of the shape of ``input``; not for ``max``.
            version: as for ``HPS.lookup_pooled``, but not in a graph or script.

        Raises:
            ConfigError (a ValueError): shapes do not fit.   Otherwise as ``HPS.lookup_pooled``.
        """
        if torch.jit.is_scripting():
            assert version is None, "version: expected None in a script"
        elif version is not None:
            return self._at(version, input, offsets, per_sample_weights)
        if per_sample_weights is not None:
            if not torch.jit.is_scripting() and not isinstance(per_sample_weights, torch.Tensor):
                raise ConfigError(f"per_sample_weights: expected a tensor, got {type(per_sample_weights).__name__}")
            if per_sample_weights.shape != input.shape:
                got = list(per_sample_weights.shape)
                raise ConfigError(f"per_sample_weights: expected the shape of input, {list(input.shape)}, got {got}")
            if self.mode == "max":
                raise ConfigError("per_sample_weights: expected None with mode 'max', got weights")
            per_sample_weights = per_sample_weights.reshape(-1)
        if torch.jit.is_scripting():  # a script has only the operator
            starts, has_last = self._starts(input, offsets)
            if not has_last:
                starts = torch.cat([starts, torch.full([1], input.numel(), dtype=starts.dtype, device=starts.device)])
            return torch.ops.hps_numba.pooled(
                input.reshape(-1),
                starts,
                per_sample_weights,
                self.request,
                self.emb_vec_size,
                self.mode,
                self.max_norm,
                self.padding_idx,
            )
        return self._eager(input, offsets, per_sample_weights)

    def _at(
        self, version: int, input: torch.Tensor, offsets: torch.Tensor | None, weights: torch.Tensor | None
    ) -> torch.Tensor:
        rows: torch.Tensor = self._of_version(version, lambda: self.forward(input, offsets, weights))
        return rows

    @torch.jit.unused
    def _eager(self, input: torch.Tensor, offsets: torch.Tensor | None, weights: torch.Tensor | None) -> torch.Tensor:
        if not isinstance(input, torch.Tensor) or not (offsets is None or isinstance(offsets, torch.Tensor)):
            raise ConfigError(f"input, offsets: expected tensors, got {type(input).__name__}, {type(offsets).__name__}")
        trains = self.trainable and self._trains()
        direct = not trains and not torch.compiler.is_compiling() and self._skips_dispatcher(input, weights)
        if direct and input.dim() == 2 and offsets is None and self.padding_idx is None:
            rows = fused_rows(input, weights, self.request, self.mode)
            if rows is not None:
                return rows
        starts, has_last = self._starts(input, offsets)
        keys = input.reshape(-1)
        if direct:
            return fused(keys, starts, weights, self.request, self.mode, self.padding_idx, include_last_offset=has_last)
        if not has_last:
            starts = torch.cat([starts, starts.new_full((1,), keys.shape[0])])
        if trains:
            return self._trained(keys, starts, weights, has_tail=offsets is not None and has_last)
        return pooled(keys, starts, weights, self.request, self.emb_vec_size, self.mode, self.max_norm, self.padding_idx)

    def _trained(
        self, keys: torch.Tensor, starts: torch.Tensor, weights: torch.Tensor | None, *, has_tail: bool
    ) -> torch.Tensor:
        pooled: torch.Tensor = torch.ops.hps_numba.pooled_trained(
            self._created(keys, self.request, padding=self.padding_idx),
            starts,
            weights,
            self.request,
            self.emb_vec_size,
            self.mode,
            self.max_norm,
            self.padding_idx,
            self._switch,
            has_tail,
        )
        return pooled

    def _skips_dispatcher(self, keys: torch.Tensor, weights: torch.Tensor | None) -> bool:
        """An eager call that a kernel answers and that needs no gradient."""
        if self.max_norm is not None or not is_plain(keys) or not keys.is_cuda:
            return False
        if weights is not None and weights.requires_grad and torch.is_grad_enabled():
            return False
        check_keys(keys)
        device, n = keys.get_device(), keys.numel()
        return (n <= MAX_KEYS and table_bindings[self.request, device] is not None) or can_pool(self.request, device, n)

    def _starts(self, input: torch.Tensor, offsets: torch.Tensor | None) -> tuple[torch.Tensor, bool]:
        """Where bags begin, and whether the last offset, the number of keys, is included."""
        if input.dim() == 2:
            if offsets is not None:
                raise ConfigError("offsets: expected None with input of two dimensions, whose rows are the bags")
            return torch.arange(input.shape[0] + 1, device=input.device) * input.shape[1], True
        if input.dim() != 1:
            raise ConfigError(f"input: expected one or two dimensions, got {list(input.shape)}")
        if offsets is None or offsets.dim() != 1:
            raise ConfigError("offsets: expected integers of one dimension with input of one dimension")
        if self.include_last_offset and offsets.shape[0] == 0:
            raise ConfigError("offsets: expected at least one with include_last_offset, got none")
        return offsets, self.include_last_offset

    def _settings_repr(self) -> str:
        return f"mode={self.mode}"
