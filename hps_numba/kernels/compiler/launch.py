"""Launches cache kernels on a GPU: machine code kept on disk, raw pointers, the caller's stream, no numba on the way.

``load`` gives a ``LoadedKernel`` for a spec and a device: from this process, from the cache folder (``disk_cache``), or
compiled and linked.

A launch packs the arguments into memory of the calling thread in one step and calls the driver: no types are converted on the
way. *Why the driver and not numba or cuda.core.* Their launches inspect each argument's type and attributes, which costs more
than a small lookup takes on the device.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

import numpy as np

from hps_numba.device.driver import driver_addresses, driver_library
from hps_numba.errors import DeviceError
from hps_numba.kernels.compiler import disk_cache
from hps_numba.kernels.compiler.launch_native import (
    CAPTURED,
    COPY_FUNCTIONS,
    DRIVER_FUNCTIONS,
    LOOKUP_WORDS,
    TABLES_WORDS,
    WORK_WORDS,
    start_copies,
    start_kernels,
    start_lookup,
    start_tables,
)
from hps_numba.kernels.compiler.ptx import ptx_of, uses_pdl
from hps_numba.kernels.compiler.safely import compile_lock, run_safely
from hps_numba.kernels.compiler.spec import KernelSpec

__all__ = ["LaunchChain", "LoadedKernel", "PreparedLookup", "PreparedTables", "cubin_of", "link", "load"]

THREADS = 256
# CUlaunchConfig: blocks and threads in x, y, z, bytes of shared memory, stream, attributes, their number
_CONFIG = "@7I4xQQI4x"
# CUlaunchAttribute: a number, padding to 8 bytes, a value of 64 bytes
_PDL = ctypes.create_string_buffer(struct.pack("@I4xi60x", 6, 1))  # programmatic stream serialization: allowed
_loaded: dict[tuple[KernelSpec, int], LoadedKernel] = {}
_compiled: dict[str, str] = {}  # PTX by the name of the file, until that is there


class LoadedKernel:
    """A kernel on the device whose context was current when it was made.   Thread safety: ``launch`` from any thread.

    Args:
        cubin: machine code.   symbol: of the kernel in it.   arg_types: of its arguments, q (int64) and f (float32).
        pdl: it may be started while the kernel before it on the stream still runs (``ptx.uses_pdl``).

    Raises:
        DeviceError: the driver refuses the code.
    """

    def __init__(self, cubin: bytes, symbol: str, arg_types: str, *, pdl: bool = False) -> None:
        self._driver = driver = importlib.import_module("cuda.bindings.driver")
        self._symbol = symbol
        self._library = _check(driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0), symbol)
        self.handle = _check(driver.cuLibraryGetKernel(self._library, symbol.encode()), symbol)
        # now and not at the first launch, which may be inside a graph capture, where nothing can be loaded
        self._in_context = _check(driver.cuKernelGetFunction(self.handle), symbol)
        self._function = int(self.handle)
        self._launch = _launch_function()
        self._attributes, self._count = (ctypes.addressof(_PDL), 1) if pdl else (0, 0)
        layout = struct.Struct(_CONFIG + arg_types)
        self._bytes, self._pack_into = layout.size, layout.pack_into
        self._offsets = _offsets(_CONFIG, arg_types)
        self._threads = threading.local()

    def launch(self, blocks: int, stream: int, *args: Any, threads: int = THREADS, rows: int = 1) -> None:
        """Start ``rows`` rows of ``blocks`` blocks of ``threads`` threads on a stream, with int and float arguments. Does not
        wait.

        The driver takes the arguments before it returns. On stream 0 the device's context has to be current.

        Raises:
            DeviceError: the driver refused.
            struct.error: number or types of the arguments are not those of the kernel.
        """
        config, function, pointers = self.pack(blocks, stream, *args, threads=threads, rows=rows)
        status = self._launch(config, function, pointers, None)
        if status:
            raise self.refused(status, f"in {blocks} blocks of {threads}")

    def pack(self, blocks: int, stream: int, *args: Any, threads: int = THREADS, rows: int = 1) -> tuple[int, int, int]:
        """What the driver's ``cuLaunchKernelEx`` takes for this launch: addresses of configuration, kernel and arguments.

        They are valid until this thread packs or launches this kernel again.
        """
        try:
            buffer, config, pointers = self._threads.arguments
        except AttributeError:
            buffer, config, pointers = self._make_arguments()
        self._pack_into(buffer, 0, blocks, rows, 1, threads, 1, 1, 0, stream, self._attributes, self._count, *args)
        return config, self._function, pointers

    def refused(self, status: int, how: str) -> DeviceError:
        """The error for a launch that the driver refused."""
        return DeviceError(f"launch of {self._symbol} {how}: {self._driver.CUresult(status).name}")

    def _make_arguments(self) -> tuple[Any, int, int]:
        """Memory of this thread for the shape of the launch and the values of arguments, and a list of their addresses."""
        self._threads.memory = memory = _ArgumentMemory(self._bytes, self._offsets)
        self._threads.arguments = arguments = memory.bytes, memory.config, memory.pointers
        return arguments

    def pack_apart(self, blocks: int, stream: int, *args: Any, threads: int = THREADS) -> tuple[_ArgumentMemory, int]:
        """``pack`` into new memory, and the handle of the kernel."""
        memory = _ArgumentMemory(self._bytes, self._offsets)
        self._pack_into(memory.bytes, 0, blocks, 1, 1, threads, 1, 1, 0, stream, self._attributes, self._count, *args)
        return memory, self._function

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        what = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS
        return int(_check(self._driver.cuFuncGetAttribute(what, self._in_context), self._symbol))


class _ArgumentMemory:
    """Memory for the shape of a launch and the values of its arguments, and the list of their addresses."""

    def __init__(self, size: int, offsets: Sequence[int]) -> None:
        self.bytes = ctypes.create_string_buffer(size)
        self.config = start = ctypes.addressof(self.bytes)
        self.arguments = [start + offset for offset in offsets]
        self._pointers = (ctypes.c_void_p * len(offsets))(*self.arguments)
        self.pointers = ctypes.addressof(self._pointers)


def _packed_apart(
    kernels: Sequence[LoadedKernel], launches: Sequence[tuple[Any, ...]], stream: int
) -> tuple[list[_ArgumentMemory], np.ndarray]:
    """Memory for the arguments of each kernel, and the ``work`` of ``start_kernels`` that leads to it."""
    taken = [
        kernel.pack_apart(blocks, stream, *args, threads=threads)
        for kernel, (blocks, _, threads, args) in zip(kernels, launches, strict=True)
    ]
    work = np.zeros(WORK_WORDS + 3 * len(taken), np.int64)
    work[WORK_WORDS:] = [word for memory, function in taken for word in (memory.config, function, memory.pointers)]
    return [memory for memory, _ in taken], work


class PreparedLookup:
    """A lookup of a cache on a stream, with one workspace, that is started repeatedly.   Thread safety: one thread at a time.

    Args:
        kernels: of the lookup, then of what follows it.
        launches: as ``LaunchChain.start`` takes them, one row each; arguments that vary may have any values.
        context, stream, event: as for ``LaunchChain.start``.
        keys_at: number of the argument ``keys`` of the first kernel.   advance_at: number of the argument ``advance`` of the
            insertion.   touch_at, insert_at: the numbers of those kernels, 0: none.
        numbers: the other ``LOOKUP_WORDS``.
    """

    def __init__(
        self,
        kernels: Sequence[LoadedKernel],
        launches: Sequence[tuple[Any, ...]],
        context: int,
        stream: int,
        event: int,
        *,
        keys_at: int,
        advance_at: int,
        touch_at: int,
        insert_at: int,
        numbers: Mapping[str, int],
    ) -> None:
        self._kernel = kernels[0]
        self._functions = int(_driver_table().ctypes.data)
        memories, work = _packed_apart(kernels, launches, stream)
        first, touch, insert = memories[0], memories[touch_at], memories[insert_at]
        words = {
            "work": int(work.ctypes.data),
            "context": context,
            "stream": stream,
            "event": event,
            "count": len(memories),
            "keys": first.arguments[keys_at],
            "blocks": first.config,
            "touch_blocks": touch.config if touch_at else 0,
            "insert_blocks": insert.config if insert_at else 0,
            "advance": insert.arguments[advance_at] if insert_at else 0,
            **numbers,
        }
        lookup = np.array([words[name] for name in LOOKUP_WORDS], np.int64)
        self._lookup = int(lookup.ctypes.data)
        self._keep = memories, work, lookup

    def start(self, keys: int, n: int, out: int) -> bool:
        """Start it for ``n`` keys, 1 or more; returns and raises as ``LaunchChain.start``."""
        status = start_lookup(self._functions, self._lookup, keys, n, out)
        if status == 0:
            return True
        if status == CAPTURED:
            return False
        raise self._kernel.refused(status, f"for {n} keys")


class PreparedTables:
    """A lookup of several tables on a stream, with one workspace, that is started repeatedly.

    Args:
        kernels, launches, context, stream, event, touch_at, insert_at, numbers: as for ``PreparedLookup``, of
            ``TABLES_WORDS``.   words_at: number of the argument ``words`` of lookup and insertion.

    Thread safety: one thread at a time.
    """

    def __init__(
        self,
        kernels: Sequence[LoadedKernel],
        launches: Sequence[tuple[Any, ...]],
        context: int,
        stream: int,
        event: int,
        *,
        words_at: int,
        touch_at: int,
        insert_at: int,
        numbers: Mapping[str, int],
    ) -> None:
        self._kernel = kernels[0]
        self._functions = int(_driver_table().ctypes.data)
        memories, work = _packed_apart(kernels, launches, stream)
        first, touch, insert = memories[0], memories[touch_at], memories[insert_at]
        words = {
            "work": int(work.ctypes.data),
            "context": context,
            "stream": stream,
            "event": event,
            "count": len(memories),
            "words": first.arguments[words_at],
            "insert_words": insert.arguments[words_at] if insert_at else 0,
            "blocks": first.config,
            "touch_blocks": touch.config if touch_at else 0,
            "insert_blocks": insert.config if insert_at else 0,
            **numbers,
        }
        prepared = np.array([words[name] for name in TABLES_WORDS], np.int64)
        self._prepared = int(prepared.ctypes.data)
        self._keep = memories, work, prepared

    def start(self, words: int, n: int, keys: int = 0, key_step: int = 0, out: int = 0, out_step: int = 0) -> bool:
        """Start it with arguments as ``start_tables`` takes them; returns and raises as ``LaunchChain.start``."""
        status = start_tables(self._functions, self._prepared, words, n, keys, key_step, out, out_step)
        if status == 0:
            return True
        if status == CAPTURED:
            return False
        raise self._kernel.refused(status, f"for up to {n} keys a table")


class LaunchChain:
    """Starts kernels of one device in order, with one call out of Python.   Thread safety: ``start`` from any thread."""

    def __init__(self, kernels: Sequence[LoadedKernel]) -> None:
        self._kernels = tuple(kernels)
        self._functions = int(_driver_table().ctypes.data)
        self._words = struct.Struct(f"@{WORK_WORDS + 3 * len(self._kernels)}q")
        self._threads = threading.local()

    def start(self, context: int, stream: int, event: int, *launches: tuple[Any, ...]) -> bool:
        """Start the kernels and record ``event``, all on a stream of ``context``, unless the stream is being captured.

        Args:
            launches: for each kernel blocks, rows of so many blocks, threads of a block, and its arguments in a tuple.

        Returns:
            False: the stream is being captured by a graph, nothing was started.

        Raises:
            DeviceError: the driver refused; some of the kernels may have been started.
        """
        work = getattr(self._threads, "work", 0) or self._make_work(launches, stream)
        for kernel, (blocks, rows, threads, args) in zip(self._kernels, launches):
            kernel.pack(blocks, stream, *args, threads=threads, rows=rows)
        status = start_kernels(self._functions, work, context, stream, event, len(self._kernels))
        if status == 0:
            return True
        if status == CAPTURED:
            return False
        raise self._kernels[0].refused(status, "in {} x {} blocks of {}".format(*launches[0]))

    def _make_work(self, launches: Sequence[tuple[Any, ...]], stream: int) -> int:
        """Address of memory of this thread for ``start_kernels``; the addresses of each kernel's arguments stay the same."""
        memory = ctypes.create_string_buffer(self._words.size)
        taken = [
            kernel.pack(blocks, stream, *args, threads=threads, rows=rows)
            for kernel, (blocks, rows, threads, args) in zip(self._kernels, launches)
        ]
        self._words.pack_into(memory, 0, *[0] * WORK_WORDS, *(word for words in taken for word in words))
        self._threads.memory, self._threads.work = memory, ctypes.addressof(memory)
        return ctypes.addressof(memory)


@cache
def can_copy_when_marked(ordinal: int) -> bool:
    """Whether ``copy_when_marked`` is possible on a device, with its driver."""
    driver = importlib.import_module("cuda.bindings.driver")
    try:
        _copy_table()
        what = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS
        return bool(_check(driver.cuDeviceGetAttribute(what, _check(driver.cuDeviceGet(ordinal), "")), ""))
    except DeviceError:
        return False


def copy_when_marked(stream: int, mark: int, value: int, groups: int, dst: int, src: int, size: int, total: int) -> None:
    """``launch_native.start_copies``, with the device's context current.

    Raises:
        DeviceError: the driver refused, or has no such function; some of the copies may have been started.
    """
    status = start_copies(int(_copy_table().ctypes.data), stream, mark, value, groups, dst, src, size, total)
    if status:
        raise DeviceError(f"copies of {total} bytes that wait for the host: error {status} of the driver")


def _offsets(before: str, arg_types: str) -> list[int]:
    """The offset of each value in memory packed by ``struct``, which aligns as C does."""
    return [struct.calcsize(before + arg_types[: i + 1]) - struct.calcsize(letter) for i, letter in enumerate(arg_types)]


@cache
def _driver_table() -> np.ndarray:
    return driver_addresses(DRIVER_FUNCTIONS)


@cache
def _copy_table() -> np.ndarray:
    return driver_addresses(COPY_FUNCTIONS)


@cache
def _launch_function() -> Any:
    """``cuLaunchKernelEx``, called with addresses alone; other threads run Python meanwhile."""
    function = driver_library().cuLaunchKernelEx
    function.argtypes = (ctypes.c_void_p,) * 4
    function.restype = ctypes.c_int
    return function


def _check(answer: tuple[Any, ...], symbol: str) -> Any:
    if answer[0]:
        raise DeviceError(f"loading {symbol}: {answer[0].name}")
    return answer[1]


def load(spec: KernelSpec, device: int, capability: tuple[int, int]) -> LoadedKernel:
    """The kernel of a spec on a device, whose context is current.   Thread safety: any thread; each kernel is compiled once.

    Raises:
        DeviceError: it does not compile, or the driver refuses it.
        PolicyError: the functions of the policy do not compile.
    """
    key = spec, device
    kernel = _loaded.get(key)
    if kernel is None:
        cubin, symbol = cubin_of(spec, capability)
        with compile_lock:  # which a forked child can take
            kernel = _loaded.get(key)
            if kernel is None:
                pdl = uses_pdl(spec, capability)
                kernel = _loaded[key] = LoadedKernel(cubin, symbol, spec.source.scalars, pdl=pdl)
    return kernel


def cubin_of(spec: KernelSpec, capability: tuple[int, int]) -> tuple[bytes, str]:
    """``(machine code, symbol)`` of a kernel for a chip: from the cache folder, else compiled and put there.

    Raises:
        DeviceError: it does not compile.   PolicyError: the functions of the policy do not compile.
    """
    name = disk_cache.name_of(spec.name, _made_for(spec, capability))
    kept, ptx = run_safely(lambda: _find_or_compile(name, spec, capability))
    if kept is not None:
        return kept
    with compile_lock:  # not by ``run_safely``: without nvJitLink, the driver links, in the current context
        try:
            linked = None if name in _compiled else disk_cache.find(name)  # by another thread meanwhile
            return linked or _link_and_keep(name, ptx, spec, capability)
        finally:
            _compiled.pop(name, None)


def _find_or_compile(name: str, spec: KernelSpec, capability: tuple[int, int]) -> tuple[tuple[bytes, str] | None, str]:
    """What the file has and "", else None and the PTX: of threads that ask for one kernel, one compiles."""
    with compile_lock:
        kept = disk_cache.find(name)
        if kept is None and name not in _compiled:
            _compiled[name] = ptx_of(spec, capability)
        return kept, _compiled.get(name, "")


def _link_and_keep(name: str, ptx: str, spec: KernelSpec, capability: tuple[int, int]) -> tuple[bytes, str]:
    entry = re.search(r"\.visible \.entry (\w+)", ptx)
    if entry is None:
        raise DeviceError(f"{spec}: expected a kernel in the PTX, got none")
    try:
        cubin = link(ptx, capability, spec.registers)
    except DeviceError as problem:
        raise DeviceError(f"{spec}: {problem}") from problem
    disk_cache.keep(name, cubin, entry[1])
    return cubin, entry[1]


def _made_for(spec: KernelSpec, capability: tuple[int, int]) -> str:
    values = [f"{field.name}={getattr(spec, field.name)!r}" for field in fields(spec) if field.name != "policy"]
    return f"{capability} {spec.policy.digest} {' '.join(values)}"


def link(ptx: str, capability: tuple[int, int], registers: int = 0) -> bytes:
    """Machine code from PTX for a chip, with at most ``registers`` registers a thread (0: no limit).

    Raises:
        DeviceError: the linker is missing or refuses.
    """
    chip = f"sm_{capability[0]}{capability[1]}"
    try:
        core = importlib.import_module("cuda.core")
        options = core.LinkerOptions(arch=chip, max_register_count=registers or None)
        return bytes(core.Linker(core.ObjectCode.from_ptx(ptx.encode()), options=options).link("cubin").code)
    except Exception as problem:
        what = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise DeviceError(f"linking for {chip}: {what}") from problem
