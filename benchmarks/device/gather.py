"""The ceiling: kernels that copy rows by row number, without a hash. One thread copies 16 bytes.

``numbers`` are int64, and a row has ``pieces`` pieces of 16 bytes; both kernels are compiled for one width, like those of the
cache.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from measure import Machine

from hps_numba.device import driver

__all__ = ["PlainGather", "PlainPool"]

THREADS = 256


def _kernel(name: str, dim: int, arguments: int, ordinal: int) -> Any:
    """One of the kernels below, loaded on a device."""
    from hps_numba.kernels.compiler.launch import LoadedKernel, link
    from hps_numba.kernels.compiler.numba_cuda import compile_ptx, types

    if dim % 4:
        raise ValueError(f"dim: expected a multiple of 4, as rows are copied 16 bytes at a time, got {dim}")
    capability = driver.device_info(ordinal).capability
    ptx = compile_ptx(source_of(name, dim // 4), (types.int64,) * arguments, capability)
    found = re.search(r"\.visible \.entry (\w+)", ptx)
    assert found is not None
    with driver.current(ordinal):
        return LoadedKernel(link(ptx, capability), found.group(1), "q" * arguments)


def source_of(name: str, pieces: int) -> Any:
    """The Python function of a kernel; defined here because it needs numba-cuda."""
    from llvmlite import ir

    from hps_numba.kernels.compiler.numba_cuda import cuda, intrinsic, types

    word, float_ = ir.IntType(64), ir.FloatType()
    four = ir.LiteralStructType([float_] * 4)

    def assembler(builder: Any, result: Any, text: str, constraints: str, values: list[Any]) -> Any:
        kind = ir.FunctionType(result, [value.type for value in values])
        return builder.call(ir.InlineAsm(kind, text, constraints, side_effect="memory" in constraints), values)

    @intrinsic
    def load16(typingctx, address):
        def codegen(context, builder, signature, args):
            got = assembler(builder, four, "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l", list(args))
            values = context.get_constant_undef(signature.return_type)
            for i in range(4):
                values = builder.insert_value(values, builder.extract_value(got, i), i)
            return values

        return types.UniTuple(types.float32, 4)(types.int64), codegen

    @intrinsic
    def store16(typingctx, address, a, b, c, d):
        def codegen(context, builder, signature, args):
            assembler(builder, ir.VoidType(), "st.global.v4.f32 [$0], {$1, $2, $3, $4};", "l,f,f,f,f,~{memory}", list(args))
            return context.get_dummy_value()

        return types.void(types.int64, *[types.float32] * 4), codegen

    @intrinsic
    def load_number(typingctx, address):
        def codegen(context, builder, signature, args):
            return assembler(builder, word, "ld.global.nc.s64 $0, [$1];", "=l,l", list(args))

        return types.int64(types.int64), codegen

    def gather_kernel(numbers, rows, out, n):
        i = cuda.grid(1)
        if i < n * pieces:
            a, b, c, d = load16(rows + (load_number(numbers + i // pieces * 8) * pieces + i % pieces) * 16)
            store16(out + i * 16, a, b, c, d)

    def pool_kernel(numbers, rows, out, bags, hotness):
        i = cuda.grid(1)
        if i < bags * pieces:
            start = numbers + i // pieces * hotness * 8
            a, b, c, d = load16(rows + (load_number(start) * pieces + i % pieces) * 16)
            for k in range(1, hotness):
                p, q, r, s = load16(rows + (load_number(start + 8 * k) * pieces + i % pieces) * 16)
                a, b, c, d = a + p, b + q, c + r, d + s
            store16(out + i * 16, a, b, c, d)

    return {"gather": gather_kernel, "pool": pool_kernel}[name]


class PlainGather:
    """``gather(numbers, rows, out, stream)``: the rows with these numbers; ``rows`` may be in pinned host memory."""

    def __init__(self, machine: Machine, dim: int) -> None:
        self._dim = dim
        self._kernel = None if machine.ordinal is None else _kernel("gather", dim, 4, machine.ordinal)

    def __call__(self, numbers: torch.Tensor, rows: torch.Tensor, out: torch.Tensor, stream: int) -> None:
        n = len(numbers)
        if self._kernel is None:
            torch.index_select(rows, 0, numbers, out=out[:n])
            return
        blocks = -(-n * self._dim // 4 // THREADS)
        addresses = numbers.data_ptr(), rows.data_ptr(), out.data_ptr()
        self._kernel.launch(blocks, stream, *addresses, n, threads=THREADS)


class PlainPool:
    """``pool(numbers, rows, out, stream)``: sums of ``hotness`` rows each, without intermediate rows."""

    def __init__(self, machine: Machine, dim: int, hotness: int) -> None:
        self._dim, self._hotness = dim, hotness
        self._kernel = None if machine.ordinal is None else _kernel("pool", dim, 5, machine.ordinal)

    def __call__(self, numbers: torch.Tensor, rows: torch.Tensor, out: torch.Tensor, stream: int) -> None:
        bags = len(numbers) // self._hotness
        if self._kernel is None:
            torch.sum(rows[numbers].view(bags, self._hotness, self._dim), 1, out=out[:bags])
            return
        blocks = -(-bags * self._dim // 4 // THREADS)
        addresses = numbers.data_ptr(), rows.data_ptr(), out.data_ptr()
        self._kernel.launch(blocks, stream, *addresses, bags, self._hotness, threads=THREADS)
