"""Pooled lookups of an embedding cache: one row for each bag of keys, summed in the kernel that finds the rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from hps_numba.cache.backends import Kernel
from hps_numba.cache.lookup import CacheLookup
from hps_numba.cache.workspace import Workspace
from hps_numba.errors import CapacityError, ConfigError
from hps_numba.kernels.cache.pooling import COMBINERS, MAX_ROWS, PADDED, THREADS, pool_blocks, pool_registers, pool_run
from hps_numba.kernels.compiler.specialize import KernelSpec
from hps_numba.kernels.dtypes import TYPE_NUMBERS
from hps_numba.kernels.layouts.cache import MAX_BATCH

__all__ = ["CachePooling"]


class CachePooling(CacheLookup):
    """Lookups whose rows are combined bag by bag; the cache is left as ``lookup`` of the same keys would leave it."""

    def pool(
        self,
        keys: int,
        n: int,
        offsets: int,
        bags: int,
        out: int,
        stream: int,
        *,
        combiner: str = "sum",
        weights: int = 0,
        options: int = 0,
        padding: int = 0,
        key_form: str = "int64",
        out_type: str = "float32",
        capturing: bool | None = None,
    ) -> None:
        """Write the pooled row of each bag to ``out``, in stream order: of rows as ``lookup`` finds them (spec 2.3).

        Sums are float32, in the order of positions, each operation rounded: equal on CPU and device, bit for bit.

        Args:
            keys: address of ``n`` keys where the cache lives, as for ``lookup``; at most ``kernels.layouts.cache.MAX_BATCH``.
            offsets: address of int64 ``[bags + 1]``, ascending from 0 to ``n``: where bags begin, and the end of the last.
            out: address of ``bags`` rows of ``out_type``. A bag without keys gets 0.
            stream: of the device; its work is done when the stream gets there. On the CPU it is done on return.
            combiner: ``sum``; ``mean``, over the sum of weights; ``sqrtn``, over the root of the sum of their squares (0 if
                the divisor is 0); ``max``, whatever the weights.
            weights: address of float32 ``[n]``, or 0: all are 1.
            options: bits of ``kernels.cache.pooling``: ``PADDED``, skip keys equal to ``padding``; ``EMPTY_DEFAULT``, bags
                without keys get the default; ``OFFSETS32``, offsets are int32; ``OPEN_END``, without the last, which is ``n``;
                ``EQUAL``, every bag has as many keys, and ``offsets`` is their number.
            padding: the key that ``PADDED`` skips.
            capturing: as for ``lookup``.

        Raises:
            ClosedError: the cache was closed.
            ConfigError: an unknown combiner, key form or type.
            CapacityError: too many keys, too large a cache, or no memory for a batch of this size.
            DeviceError: the driver refused.
        """
        self.begin()
        number = COMBINERS.get(combiner)
        if number is None:
            raise ConfigError(f"{self.name}: combiner {combiner!r}, wanted one of {', '.join(COMBINERS)}")
        if n > MAX_BATCH:
            raise CapacityError(f"{self.name}: a pooled lookup of {n} keys, wanted at most {MAX_BATCH}")
        if bags == 0:
            return
        run = pool_run(bags, n, self.dim)
        blocks = pool_blocks(bags, self.dim, run)
        args = (keys, n, offsets, bags, run, weights, out, number, self._default, options, padding)
        shape = ("pool_kernel", key_form, out_type, out % 16 == 0)
        if self._chains and capturing is None and n:
            launch = (blocks, THREADS, (*self._parts, *args))
            if self._pool.reuse(stream, n, self._start_chain, shape, n, stream, launch):
                return
        with self._backend.current():
            if capturing is None:
                capturing = self._backend.is_capturing(stream)
            self._with_workspace(capturing, stream, self._pool_batch, shape[1:], n, blocks, args, stream)

    def _pool_batch(
        self,
        workspace: Workspace,
        built: tuple[str, str, bool],
        n: int,
        blocks: int,
        args: tuple[int | np.float32, ...],
        stream: int,
    ) -> None:
        workspace.reserve(max(n, 1), False, self._stream)
        shape = ("pool_kernel", *built)
        kernel = self._pool_kernel(*shape)
        kernel.launch(blocks, stream, *self._parts, *args, workspace.address, threads=THREADS)
        if n and self._admits:
            keys, options, padding = int(args[0]), int(args[-2]), int(args[-1])
            self._count_requests(workspace, keys, n, stream, built[0], options & PADDED, padding)
        if n and not self.fixed:
            self._finish(workspace, n, workspace.stage, 4 * self.dim, self._ticks(n), stream)
        self._keep_chain(shape, kernel)

    def _pool_kernel(self, *shape: Any) -> Kernel:
        kernel: Kernel | None = self._kernels.get(shape)
        if kernel is None:
            if self.capacity >= MAX_ROWS:
                raise CapacityError(f"{self.name}: pooled lookups of {self.capacity} rows, wanted less than {MAX_ROWS}")
            kernel = self._kernels[shape] = self._backend.kernel(self._pool_spec(*shape[1:]))
        return kernel

    def _pool_spec(self, key_form: str, out_type: str, aligned: bool) -> KernelSpec:
        spec = self._answer_spec("pool_kernel", key_form, out_type, aligned)
        return replace(spec, registers=pool_registers(spec.dim, TYPE_NUMBERS[spec.row_type], copies=self._backend.copies))

    def pool_arrays(
        self, keys: np.ndarray, offsets: np.ndarray, weights: np.ndarray | None = None, combiner: str = "sum"
    ) -> np.ndarray:
        """``pool`` for NumPy: float32 ``[bags, dim]`` of int64 ``[n]``. Done when this returns.

        Args:
            keys: int64 ``[n]``.
            offsets: int64 or int32 ``[bags + 1]``, ascending from 0 to ``n``: where bags begin, and the end of the last.
            weights: float32 ``[n]``, or None: all are 1.
            combiner: ``sum``, ``mean``, ``sqrtn`` or ``max``.

        Raises:
            KeyDtypeError: keys are no int64 ``[n]``.
            ConfigError: offsets or weights do not fit the keys, or an unknown combiner.
            ClosedError, CapacityError, DeviceError: as ``pool``.
        """
        self._check_open()
        keys = self.keys_of(keys)
        given = [keys, self._offsets_of(offsets, len(keys))]
        if weights is not None:
            given.append(self._weights_of(weights, len(keys)))
        out = np.empty((len(offsets) - 1, self.dim), np.float32)
        with self._backend.current(), self._copies(*given) as addresses, self._room(out.nbytes) as room:
            at, starts, factors = (*addresses, 0)[:3]
            self.pool(at, len(keys), starts, len(out), room, self._stream, combiner=combiner, weights=factors)
            self._backend.to_host(out, room, self._stream)
        return out

    def _offsets_of(self, offsets: np.ndarray, n: int) -> np.ndarray:
        if offsets.dtype not in (np.int64, np.int32) or offsets.ndim != 1 or len(offsets) == 0:
            raise ConfigError(f"{self.name}: offsets are {offsets.dtype}{list(offsets.shape)}, wanted int64[bags + 1]")
        if offsets[0] != 0 or offsets[-1] != n:
            raise ConfigError(f"{self.name}: offsets go from {offsets[0]} to {offsets[-1]}, wanted 0 to {n}, as many as keys")
        falls = np.flatnonzero(offsets[1:] < offsets[:-1])
        if len(falls):
            raise ConfigError(f"{self.name}: offset {falls[0] + 1} is less than the one before, wanted ascending ones")
        return np.ascontiguousarray(offsets, np.int64)

    def _weights_of(self, weights: np.ndarray, n: int) -> np.ndarray:
        if weights.dtype != np.float32 or weights.shape != (n,):
            raise ConfigError(f"{self.name}: weights are {weights.dtype}{list(weights.shape)}, wanted float32[{n}]")
        return np.ascontiguousarray(weights)
