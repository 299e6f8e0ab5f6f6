"""What a compiled kernel depends on: which kernel it is, the shape of the cache, its types and its policy."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from hps_numba.errors import ConfigError
from hps_numba.kernels.dtypes import ELEMENT_BYTES, KEY_FORMS, OUT_TYPES, TYPE_NUMBERS, row_stride, scale_offset
from hps_numba.kernels.layouts.cache import MAX_TABLES, TABLE_WORDS
from hps_numba.kernels.policies._functions import for_compiler

__all__ = ["KERNELS", "KernelSource", "KernelSpec"]


class KernelSource(NamedTuple):
    """Where in ``hps_numba.kernels`` a kernel is, and what its source says of it."""

    module: str
    arg_types: str  # of its arguments: q int64, f float32, t the words of MAX_TABLES tables
    whole_warps: bool  # all tiles of a warp take every branch with lane operations together
    pdl: bool = False  # begins with ``grid_dependency_sync``

    @property
    def scalars(self) -> str:
        """``arg_types`` as a launch passes them: each word of the tables is an argument."""
        return self.arg_types.replace("t", "q" * (MAX_TABLES * TABLE_WORDS))


KERNELS = {
    "lookup_kernel": KernelSource("cache.lookup", "qqqqqqqfq", True, pdl=True),
    "list_kernel": KernelSource("cache.lookup", "qqqqqqqfq", True, pdl=True),
    "locate_missed_kernel": KernelSource("cache.miss_sorted", "qqq", True, pdl=True),
    "sort_missed_kernel": KernelSource("cache.miss_sorted", "q", True, pdl=True),
    "pool_kernel": KernelSource("cache.pooling", "qqqqqqqqqqqqfqqq", True, pdl=True),
    "touch_kernel": KernelSource("cache.batch", "qqqq", False, pdl=True),
    "sketch_kernel": KernelSource("cache.sketch", "qqqqqq", False, pdl=True),
    "insert_kernel": KernelSource("cache.insert", "qqqqqqq", False, pdl=True),
    "lookup_tables_kernel": KernelSource("cache.multi_table", "qqt", True, pdl=True),
    "touch_tables_kernel": KernelSource("cache.multi_table", "qq", False, pdl=True),
    "insert_tables_kernel": KernelSource("cache.multi_table", "qqt", False, pdl=True),
    "rescore_kernel": KernelSource("cache.rescore", "qqq", False),
    "update_kernel": KernelSource("cache.update", "qqqqqqqqq", False),
    "erase_kernel": KernelSource("cache.update", "qqqqq", False),
    "refresh_kernel": KernelSource("cache.update", "qqqqqq", False),
    "clear_kernel": KernelSource("cache.update", "qq", False),
    "dump_kernel": KernelSource("cache.update", "qqqqq", False),
    "scatter_kernel": KernelSource("cache.scatter", "qqqq", False),
    "serve_missed_kernel": KernelSource("cache.miss_sorted", "qqqqfq", True, pdl=True),
    "share_missed_kernel": KernelSource("cache.miss_gathered", "qqqq", True, pdl=True),
    "ask_host_kernel": KernelSource("cache.miss_gathered", "qqqq", False),
    "serve_rest_kernel": KernelSource("cache.miss_gathered", "qqqqfq", True, pdl=True),
    "time_copies_kernel": KernelSource("cache.miss_gathered", "q", False),
    "place_gathered_kernel": KernelSource("cache.miss_gathered", "qqqfqq", True, pdl=True),
    "answer_missed_kernel": KernelSource("cache.miss_list", "qqqqqqqqqq", False),
}


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """What a compiled kernel depends on, besides the chip.

    Attributes:
        name: one of ``KERNELS``.
        dim: elements of a row.
        policy: a ``Policy`` (``kernels.policies._policy``).
        fixed: the cache is static or uvm: scores are row numbers, nothing is touched.
        row_type: how the cache stores rows, one of ``kernels.dtypes.TYPE_NUMBERS``.
        out_type: of answers: float32, float16 or bfloat16.
        key_form: of the caller's keys, one of ``KEY_FORMS``.
        out_vector: answers are 16-byte aligned.
        lanes: in a tile, 4 or 8 (GPU only).
        group: keys that a warp looks up at a time (GPU only).
        depth: loads of a lane in flight while rows are copied (GPU only).
        registers: maximum registers of a thread, 0: as the compiler chooses (GPU only).
        by_tile: a tile takes a key, not a lane; of 8 lanes, so that ``group`` is 4 (GPU only).

    Raises:
        ConfigError: a value that no kernel can be built for.
    """

    name: str
    dim: int
    policy: Any
    fixed: bool = False
    row_type: str = "float32"
    out_type: str = "float32"
    key_form: str = "int64"
    out_vector: bool = True
    lanes: int = 8
    group: int = 32
    depth: int = 8
    registers: int = 0
    by_tile: bool = False

    def __post_init__(self) -> None:
        for field, known in (("name", KERNELS), ("row_type", TYPE_NUMBERS), ("out_type", OUT_TYPES), ("key_form", KEY_FORMS)):
            value = getattr(self, field)
            if value not in known:
                raise ConfigError(f"kernel {self.name!r}: expected {field} to be one of {', '.join(known)}, got {value!r}")
        for field in ("dim", "lanes", "group", "depth"):
            if getattr(self, field) < 1:
                raise ConfigError(f"kernel {self.name!r}: expected {field} to be at least 1, got {getattr(self, field)}")

    def __str__(self) -> str:
        values = ((field.name, getattr(self, field.name)) for field in fields(self) if field.name not in ("name", "policy"))
        return f"{self.name}(policy={self.policy.name}, {', '.join(f'{name}={value}' for name, value in values)})"

    @property
    def source(self) -> KernelSource:
        """Where the kernel is."""
        return KERNELS[self.name]

    @property
    def function(self) -> Any:
        """The kernel as its module has it, a plain function with nothing bound."""
        return getattr(importlib.import_module(f"hps_numba.kernels.{self.source.module}"), self.name)

    @property
    def constants(self) -> dict[str, Any]:
        """Values of the constants, and the functions of the policy, by the names that kernels use."""
        return {
            "DIM": self.dim,
            "LANES": self.lanes,
            "GROUP": self.group,
            "ONE_GROUP": True,
            "BY_TILE": self.by_tile,
            "LISTS": self.name == "list_kernel",
            "RESOLVES": self.name == "share_missed_kernel",
            "DEPTH": self.depth,
            "FIXED": self.fixed,
            "COUNTED": self.policy.needs_count and not self.fixed,
            "BY_INSERTIONS": self.policy.clock == "insertions",
            "ROW_TYPE": TYPE_NUMBERS[self.row_type],
            "OUT_TYPE": TYPE_NUMBERS[self.out_type],
            "SCALE_AT": scale_offset(self.dim, self.row_type),
            "ROW_STRIDE": row_stride(self.dim, self.row_type),
            "OUT_STRIDE": self.dim * ELEMENT_BYTES[self.out_type],
            "HOST_STRIDE": 4 * self.dim,
            "KEY_FORM": KEY_FORMS[self.key_form],
            **self._of_policy,
        }

    @property
    def _of_policy(self) -> dict[str, Any]:
        """What the kernels know of the policy. A function with an optional parameter replaces the one that would drop it."""
        policy = self.policy
        functions = {f"policy_{label}": for_compiler(function) for label, function in policy.functions.items()}
        if policy.takes_key:
            functions["first_score"] = functions["policy_first"]
        if policy.takes_now:
            functions["victim_way"] = functions["policy_victim"]
        switches = {"ADMITS": policy.admit is not None, "HAS_VICTIM": policy.victim is not None, "KEYED": policy.takes_key}
        return {**switches, "SET_STATE": policy.state, **functions}

    @property
    def for_one_lane(self) -> dict[str, Any]:
        """``constants`` for a tile of one lane."""
        return {**self.constants, "LANES": 1, "GROUP": 1, "ONE_GROUP": False, "BY_TILE": False}

    def argument_types(self, types: Any) -> tuple[Any, ...]:
        """numba's types of the arguments, taken from its module ``types``."""
        by_letter = {"q": types.int64, "f": types.float32, "t": types.UniTuple(types.int64, MAX_TABLES * TABLE_WORDS)}
        return tuple(by_letter[letter] for letter in self.source.arg_types)
