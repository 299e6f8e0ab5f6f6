"""Code of ``kernels.simt`` for a GPU on a CPU: LLVM runs there, and memory operations of a CPU take the place of the PTX.

Each lane of a warp runs by itself: what it asks of another lane is looked up in a table of the warp, the last argument.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from llvmlite import binding, ir

__all__ = ["access_by_cpu", "address", "aligned", "pointer", "run_on_cpu"]

_64, _32 = ir.IntType(64), ir.IntType(32)


def pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _count(builder: Any, what: int) -> None:
    """Count an access: after 32 rows, the table of the warp has the numbers of loads, stores and misaligned accesses."""
    place = pointer(builder, builder.add(builder.function.args[-1], ir.Constant(_64, 8 * (32 + what))), _64)
    builder.store(builder.add(builder.load(place), ir.Constant(_64, 1)), place)


def cpu_load(builder: Any, scope: str, size: int, address: Any, inside: Any) -> list[Any]:
    words, kind = max(1, size // 4), _32 if size >= 4 else ir.IntType(8 * size)
    places = [builder.alloca(_32) for _ in range(words)]
    for place in places:
        builder.store(ir.Constant(_32, 0xDEADBEEF), place)  # what is in a register that was not loaded
    with builder.if_then(builder.icmp_unsigned("!=", inside, ir.Constant(_32, 0))):
        aligned = builder.icmp_unsigned("==", builder.and_(address, ir.Constant(_64, size - 1)), ir.Constant(_64, 0))
        _trap_unless(builder, aligned)
        for i, place in enumerate(places):
            value = builder.load(pointer(builder, builder.add(address, ir.Constant(_64, 4 * i)), kind))
            builder.store(value if kind == _32 else builder.zext(value, _32), place)
        _count(builder, 0)
    return [builder.load(place) for place in places]


def cpu_store(builder: Any, scope: str, size: int, address: Any, values: Any, inside: Any) -> None:
    kind = _32 if size >= 4 else ir.IntType(8 * size)
    assert len(values) == max(1, size // 4)
    with builder.if_then(builder.icmp_unsigned("!=", inside, ir.Constant(_32, 0))):
        aligned = builder.icmp_unsigned("==", builder.and_(address, ir.Constant(_64, size - 1)), ir.Constant(_64, 0))
        _trap_unless(builder, aligned)
        for i, value in enumerate(values):
            place = pointer(builder, builder.add(address, ir.Constant(_64, 4 * i)), kind)
            builder.store(value if kind == _32 else builder.trunc(value, kind), place)
        _count(builder, 1)


def _trap_unless(builder: Any, condition: Any) -> None:
    """A misaligned access kills a kernel; here it is counted."""
    with builder.if_then(builder.not_(condition)):
        _count(builder, 2)


def cpu_shuffled(builder: Any, value: Any, lane: Any) -> Any:
    """The row of a lane from the table; of a 32-bit value, the word where that lane loaded it: the scale of its row."""
    table, scale_at = builder.function.args[-1], ir.Constant(_64, builder.function.scale_at)
    row = builder.load(pointer(builder, builder.add(table, builder.mul(builder.zext(lane, _64), ir.Constant(_64, 8))), _64))
    if value.type == _64:
        return row
    place = builder.alloca(_32)
    builder.store(ir.Constant(_32, 0xDEADBEEF), place)
    with builder.if_then(builder.icmp_unsigned("!=", row, ir.Constant(_64, 0))):
        builder.store(builder.load(pointer(builder, builder.add(row, scale_at), _32)), place)
    return builder.load(place)


def access_by_cpu(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Replace the functions of ``simt.ptx`` that a module uses."""
    for name, function in (("load", cpu_load), ("store", cpu_store), ("shuffled", cpu_shuffled)):
        monkeypatch.setattr(module, name, function)
    monkeypatch.setattr(module, "opaque", lambda builder, number: ir.Constant(_32, number))


@cache
def _engine() -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=1
    )
    return binding.create_mcjit_compiler(binding.parse_assembly(""), target)


def run_on_cpu(write: Callable[..., Any], words: int, scale_at: int = 0) -> Callable[..., int]:
    """What ``write(builder, *values)`` writes as code, as a function of ``words`` int64 and the address of the warp's table."""
    module = ir.Module(name=f"m{next(_numbers)}")
    module.triple = binding.get_process_triple()
    name = f"code_{module.name}"
    function = ir.Function(module, ir.FunctionType(_64, [_64] * (words + 1)), name)
    function.scale_at = scale_at
    builder = ir.IRBuilder(function.append_basic_block())
    answer = write(builder, *function.args[:-1])
    builder.ret(builder.zext(answer, _64) if answer is not None else ir.Constant(_64, 0))
    engine = _engine()
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    engine.add_module(parsed)
    engine.finalize_object()
    return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * (words + 1))(engine.get_function_address(name))


_numbers: Iterator[int] = iter(range(1 << 30))


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def aligned(shape: tuple[int, ...], fill: int) -> np.ndarray:
    """Bytes that begin at a multiple of 16."""
    size = math.prod(shape)
    memory = np.full(size + 16, fill, np.uint8)
    return memory[-address(memory) % 16 :][:size].reshape(shape)
