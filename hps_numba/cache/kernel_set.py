"""Which compiled kernel answers for which call on one cache, and which of them change with the policy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from hps_numba.cache.backends import Backend, CudaBackend, Kernel
from hps_numba.cache.sizing import CacheGeometry
from hps_numba.errors import CapacityError
from hps_numba.kernels.compiler.spec import KernelSpec
from hps_numba.kernels.dtypes import TYPE_NUMBERS
from hps_numba.kernels.layouts.pooling import MAX_ROWS, pool_registers
from hps_numba.kernels.policies._load import for_hits, load_policy
from hps_numba.kernels.policies._policy import Policy

if TYPE_CHECKING:
    from hps_numba.kernels.compiler.launch import LaunchChain

__all__ = ["BY_POLICY", "FINISHING", "FINISHING_TABLES", "LISTED_LOOKUP", "LOOKUP", "KernelKey", "KernelSet"]

#: a kernel of a set: its name, then what it depends on besides the cache
KernelKey = tuple[Any, ...]

LOOKUP, LISTED_LOOKUP = "lookup_kernel", "list_kernel"
_LOOKUPS = (LOOKUP, LISTED_LOOKUP, "lookup_tables_kernel")
#: what follows the answer of a batch: first what only a policy that counts hits needs
FINISHING = ("touch_kernel", "insert_kernel")
FINISHING_TABLES = ("touch_tables_kernel", "insert_tables_kernel")  # of several tables
#: kernels that call functions of the policy, besides those that score hits while they answer
BY_POLICY = (*FINISHING, *FINISHING_TABLES, "rescore_kernel")
_SERVING = ("serve_missed_kernel", "serve_rest_kernel", "place_gathered_kernel", "answer_missed_kernel")
_LANES_OF_INSERTION = 4
_BY_ROW = ("insert_kernel", "insert_tables_kernel", "update_kernel", "refresh_kernel")
# from here on each lane of a warp searches for a key, below a tile does: by bytes of a row, at most 128 or more
_LARGE_BATCH, _LARGE_BATCH_OF_WIDE = 24_576, 32_768


class KernelSet:
    """The kernels of one cache, compiled or loaded when first asked for.

    Attributes:
        backend: where kernels run.
        made: kernels so far, by ``KernelKey``, each with the number of keys that a warp of it takes.
        chains: for pooled lookups, by the key of their kernel: that kernel, and it with what follows, started in one step.
        policy: in force.   counted: it counts hits.   admits: it asks a sketch of how often keys were requested.
        one_step: the kernels of a lookup can be started in one step out of Python.
        large_batch: keys of the smallest batch whose lookup has a lane search for each key.

    Thread safety: all methods but ``adopt``, which is called while no lookup is at work.
    """

    def __init__(self, backend: Backend, geometry: CacheGeometry, policy: Policy) -> None:
        self.backend = backend
        self._geometry = geometry
        self.large_batch = _LARGE_BATCH if 4 * geometry.dim <= 128 else _LARGE_BATCH_OF_WIDE
        self.chains: dict[KernelKey, tuple[LaunchChain, LaunchChain]] = {}
        self.adopt(policy, {})

    def adopt(self, policy: Policy, made: dict[KernelKey, tuple[Kernel, int]]) -> None:
        """Put a policy in force, with the kernels that ``made_for`` gave."""
        inserts = not self._geometry.fixed
        self.policy, self.made = policy, made
        self.counted = policy.needs_count and inserts
        self.admits = policy.admit is not None and inserts
        self.one_step = not self.admits  # the kernel that counts requests in the sketch takes the keys too
        self.chains.clear()
        self._finishing: tuple[Kernel, ...] | None = None

    @property
    def idle_without_insertions(self) -> bool:
        """A lookup that inserts nothing changes nothing for the policy, so that no kernel has to follow."""
        return not self.counted and not self.admits and self.policy.clock == "insertions"

    # -- kernels ----------------------------------------------------------------------------------------------------------

    def built(self, key: KernelKey) -> tuple[Kernel, int]:
        """The kernel of a key, and how many keys a warp of it takes.

        Raises:
            PolicyError: a function of the policy does not compile.   DeviceError: the device refuses the kernel.
        """
        found = self.made.get(key)
        if found is None:
            spec = self.spec(key)
            found = self.made[key] = self.backend.kernel(spec), spec.group
        return found

    def answering(self, key: KernelKey) -> tuple[tuple[Kernel, ...], int]:
        """The kernels that answer a batch, and how many keys a warp of the first takes.

        Args:
            key: LOOKUP, or LISTED_LOOKUP, whose missed keys three more kernels locate, sort and serve; form of the keys, type
                of the answer, whether that is 16-byte aligned, and whether the batch is smaller than ``large_batch``.
        """
        kernel, group = self.made.get(key) or self.built(key)
        if key[0] != LISTED_LOOKUP:
            return (kernel,), group
        then = ("locate_missed_kernel",), ("sort_missed_kernel",), ("serve_missed_kernel", *key[2:4])
        return (kernel, *(self.built(name)[0] for name in then)), group

    def gathering(self, form: KernelKey) -> tuple[tuple[Kernel, ...], int]:
        """The kernels of a batch whose missed rows the host helps to bring: up to the copies, at their end, and after them.

        Args:
            form: as the key of ``answering`` without its name.

        Returns:
            Them, and how many keys a warp of the first takes.
        """
        first, group = self.built((LISTED_LOOKUP, *form))
        names = ("locate_missed_kernel",), ("share_missed_kernel",), ("ask_host_kernel",), ("serve_rest_kernel", *form[1:3])
        after = ("time_copies_kernel",), ("place_gathered_kernel", *form[1:3])
        return (first, *(self.built(key)[0] for key in (*names, *after))), group

    def finishing(self) -> tuple[Kernel, ...]:
        """The kernels that follow an answer: they touch what was hit, if the policy counts hits, and insert."""
        found = self._finishing
        if found is None:
            names = () if self._geometry.fixed else FINISHING if self.counted else FINISHING[1:]
            found = self._finishing = tuple(self.built((name,))[0] for name in names)
        return found

    def chain(self, key: KernelKey) -> None:
        """From now on pooled lookups on a device that begin with the kernel of this key can be started in one step."""
        if self.one_step and self.backend.ordinal is not None and key not in self.chains:
            first, backend = self.built(key)[0], cast("CudaBackend", self.backend)
            self.chains[key] = backend.launch_chain([first]), backend.launch_chain([first, *self.finishing()])

    def run(self, name: str, tiles: int, stream: int, *args: int) -> None:
        """Start a kernel that depends on nothing but the cache and the policy."""
        self.built((name,))[0].launch(self.backend.blocks(tiles), stream, *args)

    # -- what the policy changes --------------------------------------------------------------------------------------------

    def compile_policy(self) -> None:
        """Compile what insertion by the policy needs now, rather than when a lookup first misses.

        Raises:
            PolicyError: a function of the policy does not compile here.
        """
        if not self._geometry.fixed:
            made, policy = self.made, self.policy  # in this order: those of another policy are kept in another dict
            with self.backend.current():
                made.update(self._ready(policy, self._insertion_keys(policy)))

    def made_for(self, policy: Policy) -> dict[KernelKey, tuple[Kernel, int]]:
        """Kernels for another policy: those that insertion needs, and all that this cache has used so far.

        Raises:
            PolicyError: a function of the policy does not compile here.
        """
        used = [key for key in list(self.made) if key[0] not in BY_POLICY]
        return self._ready(policy, [("rescore_kernel",), *self._insertion_keys(policy), *used])

    @staticmethod
    def _insertion_keys(policy: Policy) -> list[KernelKey]:
        return [(name,) for name in (FINISHING if policy.needs_count else FINISHING[1:])]

    def _ready(self, policy: Policy, keys: Iterable[KernelKey]) -> dict[KernelKey, tuple[Kernel, int]]:
        ready: dict[KernelKey, tuple[Kernel, int]] = {}
        for key in keys:
            spec = self.spec(key, policy)
            ready[key] = self.backend.ready_kernel(spec), spec.group
        return ready

    @property
    def fusion_key(self) -> tuple[Any, ...]:
        """Caches for which this is the same can be looked up by one kernel."""
        geometry = self._geometry
        policy = "" if geometry.fixed else self.policy.digest
        by_itself = id(self) if self.admits else 0  # a lookup of several tables does not count requests in their sketches
        return self.backend.ordinal, geometry.dim, geometry.fixed, geometry.row_type, policy, by_itself

    # -- how they are built ---------------------------------------------------------------------------------------------------

    def spec(self, key: KernelKey, policy: Policy | None = None) -> KernelSpec:
        """How the kernel of a key is built, for the policy in force or another one."""
        policy = policy or self.policy
        name, *form = key
        if name in _LOOKUPS:
            return self._lookup_spec(policy, name, *form)
        if name == "pool_kernel":
            return self._pool_spec(policy, *form)
        if name in _SERVING:
            return self._missed_spec(policy, name, *form)
        if name == "sketch_kernel":
            return KernelSpec(name=name, dim=1, policy=load_policy("fifo"), key_form=form[0], group=32)
        if name == "scatter_kernel":
            dim = self._geometry.dim
            return KernelSpec(name=name, dim=dim, policy=load_policy("fifo"), out_type=form[0], out_vector=False)
        return self._plain_spec(policy, name)

    def _plain_spec(self, policy: Policy, name: str) -> KernelSpec:
        """What a kernel does not depend on is the same for all caches, so that they share it."""
        by_row = name in _BY_ROW
        return KernelSpec(
            name=name,
            dim=self._geometry.dim if by_row else 1,
            policy=policy if name in BY_POLICY else load_policy("fifo"),
            fixed=self._geometry.fixed and by_row,
            row_type=self._geometry.row_type if by_row else "float32",
            lanes=_LANES_OF_INSERTION if name == "insert_kernel" else 8,
            registers=64 if name == "insert_kernel" else 0,
        )

    def _answer_spec(self, policy: Policy, name: str, key_form: str, out_type: str, aligned: bool) -> KernelSpec:
        """A kernel that writes answers; in a fixed cache nothing is touched, whatever the policy."""
        return KernelSpec(
            name=name,
            dim=self._geometry.dim,
            policy=load_policy("fifo") if self._geometry.fixed else for_hits(policy),
            fixed=self._geometry.fixed,
            row_type=self._geometry.row_type,
            out_type=out_type,
            key_form=key_form,
            out_vector=aligned,
        )

    def _lookup_spec(self, policy: Policy, name: str, key_form: str, out_type: str, aligned: bool, small: bool) -> KernelSpec:
        """How a kernel of the lookup is built, from what was measured (``benchmarks/device/lookup.py``).

        Registers are limited to those that a hit needs. Without a limit the functions for misses, which are not inlined, would
        set the number for the whole kernel, and a third of the warps would fit.
        """
        spec = self._answer_spec(policy, name, key_form, out_type, aligned)
        if not self._geometry.row_type == out_type == "float32":
            return self._typed_spec(spec, small)
        if small:
            return replace(spec, lanes=8, group=4, by_tile=True, registers=40)
        if 4 * self._geometry.dim <= 128:
            return replace(spec, lanes=4, group=16, registers=64)
        return replace(spec, lanes=8, group=8, registers=72)

    def _typed_spec(self, spec: KernelSpec, small: bool) -> KernelSpec:
        """``_lookup_spec`` where rows or answers are not float32; ``benchmarks/device/shapes.py`` tries other values."""
        if small:
            return replace(spec, lanes=8, group=4, by_tile=True, registers=40 if spec.dim <= 128 else 64)
        if spec.dim <= 32:
            narrow = spec.row_type != "float32" and spec.dim % 4 == 0 and spec.out_vector
            return replace(spec, lanes=4, group=32 if narrow else 16, registers=64)
        return replace(spec, lanes=8, group=8, registers=72)

    def _pool_spec(self, policy: Policy, key_form: str, out_type: str, aligned: bool) -> KernelSpec:
        if self._geometry.capacity >= MAX_ROWS:
            raise CapacityError(
                f"{self._geometry.name}: pooled lookups: expected a cache of less than {MAX_ROWS} rows, got one of "
                f"{self._geometry.capacity}"
            )
        spec = self._answer_spec(policy, "pool_kernel", key_form, out_type, aligned)
        registers = pool_registers(spec.dim, TYPE_NUMBERS[spec.row_type], copies=self.backend.copies)
        return replace(spec, registers=registers)

    def _missed_spec(self, policy: Policy, name: str, out_type: str, aligned: bool) -> KernelSpec:
        """A kernel for listed keys: rows come from the host store, so of the policy only matters whether it counts hits."""
        counted = load_policy("lfu" if policy.needs_count and not self._geometry.fixed else "fifo")
        spec = self._answer_spec(policy, name, "int64", out_type, aligned)
        return replace(spec, policy=counted, row_type=spec.row_type if name.startswith("serve") else "float32")
