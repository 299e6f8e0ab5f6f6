"""Builds cache kernels: one source, bound to the memory and lanes of a target, for one shape of cache.

``bind`` copies a kernel function and all plain functions it calls, with other globals: the stand-ins of ``lanes`` give way to
those of the target, and constants (DIM, FIXED, ...) and the functions of the policy take their values. So a constant is a
constant to the compiler, and branches on it vanish.

*Why copies and not arguments.* Problem: widths, types and policies must be known to the compiler, but kernels that were made
by functions returning functions hide what they use and cannot be read or tested in plain Python. Choice: kernels are ordinary
functions of ordinary modules, whose globals are replaced. Turned down: text templates, and closures.

*Why numba's own disk cache is not used.* It finds code by the file and line of a function, which all copies of it share, so
that it would take one for another or find none. The machine code of host kernels is kept by ``compiler.disk_cache`` instead.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from types import CodeType, FunctionType, MappingProxyType
from typing import Any, NamedTuple

from hps_numba.errors import ConfigError, DeviceError, HpsError
from hps_numba.kernels.compiler import disk_cache
from hps_numba.kernels.dtypes import ELEMENT_BYTES, TYPE_NUMBERS, row_stride, scale_offset
from hps_numba.kernels.layouts.cache import MAX_TABLES, TABLE_WORDS
from hps_numba.kernels.policies._functions import does_not_compile, for_compiler

__all__ = [
    "KERNELS",
    "KEY_FORMS",
    "HostKernel",
    "KernelSource",
    "KernelSpec",
    "bind",
    "bindings",
    "for_host",
    "ptx_of",
    "uses_pdl",
]

#: how keys lie in the caller's memory, in the order of the numbers that ``kernels.cache.lookup`` gives them
KEY_FORMS = ("int64", "int32", "uint32", "checked32_in_int64")
_OUT_TYPES = ("float32", "float16", "bfloat16")
_LANES = (4, 8)


class KernelSource(NamedTuple):
    """Where a kernel stands in ``hps_numba.kernels``, and what its source says of it."""

    module: str
    arg_types: str  # of its arguments: q int64, f float32, t the words of MAX_TABLES tables
    whole_warps: bool  # all tiles of a warp take every branch with lane operations together
    pdl: bool = False  # begins with ``lanes.grid_dependency_sync``

    @property
    def scalars(self) -> str:
        """``kinds`` as a launch gives them: each word of the tables is an argument."""
        return self.arg_types.replace("t", "q" * (MAX_TABLES * TABLE_WORDS))


KERNELS = {
    "lookup_kernel": KernelSource("cache.lookup", "qqqqqqqfq", True, pdl=True),
    "list_kernel": KernelSource("cache.lookup", "qqqqqqqfq", True, pdl=True),
    "list_by_region_kernel": KernelSource("cache.lookup", "qqqqqqqfq", True, pdl=True),
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
        registers: most registers of a thread, 0: as the compiler likes (GPU only).
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
        for field, known in (("name", KERNELS), ("row_type", TYPE_NUMBERS), ("out_type", _OUT_TYPES), ("key_form", KEY_FORMS)):
            value = getattr(self, field)
            if value not in known:
                raise ConfigError(f"kernel {self.name!r}: {field} is {value!r}, wanted one of {', '.join(known)}")
        for field in ("dim", "lanes", "group", "depth"):
            if getattr(self, field) < 1:
                raise ConfigError(f"kernel {self.name!r}: {field} is {getattr(self, field)}, wanted at least 1")

    def __str__(self) -> str:
        values = ((field.name, getattr(self, field.name)) for field in fields(self) if field.name not in ("name", "policy"))
        return f"{self.name}(policy={self.policy.name}, {', '.join(f'{name}={value}' for name, value in values)})"

    @property
    def source(self) -> KernelSource:
        """Where the kernel stands."""
        return KERNELS[self.name]

    @property
    def function(self) -> Any:
        """The kernel as it stands in its module, a plain function, nothing bound."""
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
            "LISTS": self.name in ("list_kernel", "list_by_region_kernel"),
            "BY_REGION": self.name == "list_by_region_kernel",
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
            "KEY_FORM": KEY_FORMS.index(self.key_form),
            **self._of_policy,
        }

    @property
    def _of_policy(self) -> dict[str, Any]:
        """What the kernels know of the policy. A function that takes one argument more is called without the one between."""
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


# -- binding ------------------------------------------------------------------------------------


def bind(function: FunctionType, names: dict[str, Any], wrap: Callable[[FunctionType], Any]) -> FunctionType:
    """A copy of ``function`` whose globals, and those of all plain functions it calls, are taken from ``names``.

    Globals not named there stay, and so do those of functions that are taken from ``names``: a policy may use any names.
    Each function that is called is passed through ``wrap``, once, the outermost is not. Functions must not be recursive.
    """
    done: dict[FunctionType, Any] = {}

    def copy(original: FunctionType, names: Mapping[str, Any] = names) -> FunctionType:
        scope = dict(original.__globals__)
        for name in dict.fromkeys(_names_in(original.__code__)):
            if name not in names and name not in scope:
                continue  # a builtin, or an attribute
            value = names.get(name, scope.get(name))
            if isinstance(value, FunctionType):
                if value not in done:
                    done[value] = wrap(copy(value, MappingProxyType({}) if name in names else names))
                value = done[value]
            scope[name] = value
        return FunctionType(original.__code__, scope, original.__name__, original.__defaults__)

    return copy(function)


def _names_in(code: CodeType) -> Iterator[str]:
    """Names that code uses, with that of functions and comprehensions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def bindings(
    spec: KernelSpec, wrap: Callable[[FunctionType], Any], names: Mapping[str, Any] = MappingProxyType({})
) -> FunctionType:
    """The kernel of a spec in plain Python: the stand-ins of ``lanes`` with the constants and the policy of the spec.

    ``names`` replaces further ones, such as the number of a tile in a grid.
    """
    return bind(spec.function, {**spec.for_one_lane, **names}, wrap)


# -- for the CPU --------------------------------------------------------------------------------


class HostKernel:
    """A kernel for the CPU: called with the arguments of its source, run without the GIL.

    On the first call it comes from the cache folder, else it is compiled and put there.

    **Threads:** call from any thread.

    Raises, when first called:
        PolicyError: the functions of the policy do not compile.   DeviceError: the kernel does not.
    """

    def __init__(self, spec: KernelSpec) -> None:
        self._spec = spec
        self._compiling = threading.Lock()
        self._entry: Any = None
        self._owner: Any = None  # lives as long as its code may run

    def __call__(self, *args: Any) -> None:
        (self._entry or self._compile())(*args)

    def ready(self) -> None:
        """Compile it now, if that is still to be done."""
        self._compile()

    def _compile(self) -> Any:
        with self._compiling:
            if self._entry is None:
                try:
                    self._entry, self._owner = _entry_point(self._spec)
                except Exception as problem:
                    raise _refused(self._spec, "the CPU", problem, _compile_scalar) from problem
        return self._entry


_host_kernels: dict[tuple[Any, ...], HostKernel] = {}
_registering = threading.Lock()


def for_host(spec: KernelSpec) -> HostKernel:
    """The kernel of a spec for the CPU: one a process, whatever ``lanes``, ``group``, ``depth``, ``registers``,
    ``by_tile`` and ``out_vector``, which mean nothing there.   **Threads:** any."""
    key = _host_key(spec)
    with _registering:
        kernel = _host_kernels.get(key)
        if kernel is None:
            kernel = _host_kernels[key] = HostKernel(spec)
        return kernel


def _host_key(spec: KernelSpec) -> tuple[Any, ...]:
    return spec.name, spec.dim, spec.policy.digest, spec.fixed, spec.row_type, spec.out_type, spec.key_form


def _entry_point(spec: KernelSpec) -> tuple[Any, Any]:
    """``(function, owner of its code)`` for the kernel of a spec: from the cache folder, else compiled and put there."""
    from numba.core.registry import cpu_target

    target = cpu_target.target_context
    name = disk_cache.name_of(spec.name, f"{_host_key(spec)!r} {disk_cache.host_target(target)}", ".object")
    result = disk_cache.find_result(name, target)
    if result is not None:
        return result.entry_point, result
    dispatcher = _compile_for_host(spec)
    (result,) = dispatcher.overloads.values()
    disk_cache.keep_result(name, result)
    return result.entry_point, dispatcher


def _compile_for_host(spec: KernelSpec) -> Any:
    """numba's dispatcher for the kernel of a spec, compiled for the types of its arguments.

    The linker of numba knows functions of a process by their names, and of two with one name it takes the first; numbers that
    numba adds begin anew in each process. So functions bear the digest of what they are bound to.
    """
    import numba

    from hps_numba.kernels.simt.cpu import NAMES

    tag = hashlib.sha256(repr(_host_key(spec)).encode()).hexdigest()[:16]

    def wrap(function: FunctionType) -> Any:
        return numba.njit(nogil=True, error_model="numpy")(_tagged(function, tag))

    arguments = _argument_types(spec, numba.types)
    function = _tagged(bind(spec.function, {**spec.for_one_lane, **NAMES}, wrap), tag)
    return numba.njit(numba.void(*arguments), nogil=True, error_model="numpy")(function)


def _tagged(function: FunctionType, tag: str) -> FunctionType:
    """A function that ``bind`` made, under a name of its own, in a module that every process can import."""
    function.__qualname__ = f"{function.__qualname__}_{tag}"
    if not function.__module__.startswith("hps_numba."):  # of a user's policy
        function.__module__ = function.__globals__["__name__"] = __name__
    return function


def _argument_types(spec: KernelSpec, types: Any) -> tuple[Any, ...]:
    """numba's types of the arguments of a kernel, by the names that ``types`` has."""
    arg_types = {"q": types.int64, "f": types.float32, "t": types.UniTuple(types.int64, MAX_TABLES * TABLE_WORDS)}
    return tuple(arg_types[kind] for kind in spec.source.arg_types)


def _compile_scalar(function: FunctionType, signature: Any) -> None:
    import numba

    numba.njit(signature)(bind(function, {}, numba.njit))


# -- for a GPU ----------------------------------------------------------------------------------


def ptx_of(spec: KernelSpec, capability: tuple[int, int]) -> str:
    """PTX of a kernel for a chip, which need not be in this machine.

    Raises:
        DeviceError: numba-cuda is missing, or the kernel does not compile.
        PolicyError: the functions of the policy do not compile.
        ConfigError: a tile of so many lanes does not exist.
    """
    if spec.lanes not in _LANES:
        raise ConfigError(f"kernel {spec.name!r}: lanes is {spec.lanes}, wanted 4 or 8 on a GPU")
    if spec.by_tile and (spec.lanes, spec.group) != (8, 4):
        raise ConfigError(f"kernel {spec.name!r}: by_tile with lanes={spec.lanes}, group={spec.group}, wanted 8 and 4")
    try:
        from hps_numba.kernels.compiler.numba_cuda import compile_ptx
    except ImportError as problem:
        raise DeviceError(
            f"{spec.name}: numba's CUDA target does not import ({_first_line(problem)}), wanted hps-numba[cuda12] or [cuda13]"
        ) from problem

    def compile_scalar(function: FunctionType, signature: Any) -> None:
        compile_ptx(bind(function, {}, _device_function), signature, capability, device=True)

    try:
        return _compile_for_chip(spec, capability)
    except Exception as problem:
        raise _refused(spec, f"sm_{capability[0]}{capability[1]}", problem, compile_scalar) from problem


def uses_pdl(spec: KernelSpec, capability: tuple[int, int]) -> bool:
    """The kernel is started while the one before it on the stream still runs, and waits for its end by itself.

    So the time to start a kernel passes meanwhile (programmatic dependent launch; CUDA C++ Programming Guide). From Hopper on.
    """
    return capability >= (9, 0) and spec.source.pdl


def _device_function(function: FunctionType) -> Any:
    from hps_numba.kernels.compiler.numba_cuda import cuda

    return cuda.jit(device=True)(function)


def _compile_for_chip(spec: KernelSpec, capability: tuple[int, int]) -> str:
    from hps_numba.kernels.compiler.numba_cuda import compile_ptx, types
    from hps_numba.kernels.simt.cuda import names

    constants = spec.constants
    target = names(
        lanes=spec.lanes,
        uniform=spec.source.whole_warps,
        out_vector=spec.out_vector,
        pdl=uses_pdl(spec, capability),
        copies=capability >= (8, 0),
        constants=constants,
        device=_device_function,
    )
    function = bind(spec.function, {**constants, **target}, _device_function)
    signature = _argument_types(spec, types)
    return compile_ptx(function, signature, capability)


# -- when a compiler refuses --------------------------------------------------------------------


def _refused(spec: KernelSpec, where: str, problem: Exception, compile_scalar: Callable[[FunctionType, Any], None]) -> HpsError:
    """The error to raise for what a compiler said: the policy's, if its functions alone do not compile either."""
    for label, function in spec.policy.functions.items():
        try:
            compile_scalar(for_compiler(function), _signature_of(label, function))
        except Exception as fault:
            return does_not_compile(spec.policy.name, function, where, fault)
    return DeviceError(f"{spec} does not compile for {where}: {_first_line(problem)}")


def _signature_of(label: str, function: Callable[..., Any]) -> Any:
    """The numba types of a function of a policy."""
    from numba import types

    word, words, pair = types.int64, types.Array(types.int64, 1, "C"), types.UniTuple(types.int64, 2)
    if label == "admit":
        return types.boolean(word, word, pair)
    count = function.__code__.co_argcount
    return word(words, words, *[word] * (count - 2)) if label == "victim" else word(*[word] * count)


def _first_line(problem: Exception) -> str:
    """What a compiler has to say in one line: the first that names a cause, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(problem))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    causes = [line for line in lines if not line.startswith("Failed in ")]
    return (causes or lines or [type(problem).__name__])[0]
