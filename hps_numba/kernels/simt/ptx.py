"""Inline PTX for code that is built with llvmlite: loads and stores under a predicate, shuffles, rounded operations.

Loads and stores are written in PTX because numba has no 16-byte accesses and no memory scopes (PTX ISA, "Memory consistency
model"): ``relaxed.gpu`` for what other blocks may be writing, ``relaxed.sys`` for what the CPU may be writing. None of them
leaves data in the first-level cache, which is not coherent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

__all__ = ["asm", "load", "opaque", "rounded", "shuffled", "store"]

_64, _32, _16, _F32 = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()


def asm(
    builder: Any, result: Any, text: str, constraints: str, args: list[Any], *, volatile: bool = True, convergent: bool = False
) -> Any:
    """Inline PTX.

    Args:
        volatile: it is neither removed nor moved across others.
        convergent: all lanes execute it together, so it must not be moved into a branch.
    """
    kind = ir.FunctionType(result, [arg.type for arg in args])
    attributes = ("convergent",) if convergent else ()
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=volatile), args, attrs=attributes)


def _form(size: int) -> tuple[int, str, str, Any]:
    """Registers of an access of ``size`` bytes, its suffix in PTX, and the type of a register: PTX has none of one byte."""
    if size < 4:
        return 1, f".b{8 * size}", "h", _16
    words = size // 4
    return words, {1: "", 2: ".v2", 4: ".v4"}[words] + ".b32", "r", _32


def load(builder: Any, scope: str, size: int, address: Any, inside: Any) -> list[Any]:
    """``size`` bytes as 32-bit words, less than 4 bytes as the lower end of one; undefined if not ``inside``."""
    words, form, register, kind = _form(size)
    into = "{" + ", ".join(f"${i}" for i in range(words)) + "}" if words > 1 else "$0"
    text = f"{{ .reg .pred p; setp.ne.u32 p, ${words + 1}, 0; @p ld.relaxed.{scope}.global{form} {into}, [${words}]; }}"
    result = ir.LiteralStructType([kind] * words) if words > 1 else kind
    loaded = asm(builder, result, text, ",".join([f"={register}"] * words) + ",l,r,~{memory}", [address, inside])
    if size < 4:
        return [builder.zext(loaded, _32)]
    return [builder.extract_value(loaded, i) for i in range(words)] if words > 1 else [loaded]


def store(builder: Any, scope: str, size: int, address: Any, values: Sequence[Any], inside: Any) -> None:
    """``size`` bytes from 32-bit words, less than 4 bytes from the lower end of one; nothing if not ``inside``.

    ``scope``: of the threads for which a word is written at once, "" for none.   **Writes:** memory at ``address``.
    """
    words, form, register, _kind = _form(size)
    names = "{" + ", ".join(f"${i + 1}" for i in range(words)) + "}" if words > 1 else "$1"
    relaxed = f".relaxed.{scope}" if scope else ""
    text = f"{{ .reg .pred p; setp.ne.u32 p, ${words + 1}, 0; @p st{relaxed}.global{form} [$0], {names}; }}"
    values = [builder.trunc(values[0], _16)] if size < 4 else list(values)
    constraints = "l," + ",".join([register] * words) + ",r,~{memory}"
    asm(builder, ir.VoidType(), text, constraints, [address, *values, inside])


def shuffled(builder: Any, value: Any, lane: Any, segment: int = 32) -> Any:
    """The ``value`` (float32, 32 or 64 bits) of a lane of the warp, or of its segment of ``segment`` lanes."""
    if value.type == _64:
        halves = (builder.trunc(value, _32), builder.trunc(builder.lshr(value, ir.Constant(_64, 32)), _32))
        low, high = (builder.zext(shuffled(builder, half, lane, segment), _64) for half in halves)
        return builder.or_(low, builder.shl(high, ir.Constant(_64, 32)))
    register = "f" if value.type == _F32 else "r"
    text = f"shfl.sync.idx.b32 $0, $1, $2, {(32 - segment) << 8 | 31}, -1;"
    return asm(builder, value.type, text, f"={register},{register},r", [value, lane], convergent=True)


def opaque(builder: Any, number: int, kind: Any = _32) -> Any:
    """A number that the compiler does not know, so that a loop is not unrolled."""
    form = {32: ("u32", "=r"), 64: ("u64", "=l")}[kind.width]
    return asm(builder, kind, f"mov.{form[0]} $0, {number};", form[1], [])


def rounded(builder: Any, operation: str, *args: Any) -> Any:
    """A float32 operation rounded to nearest; PTX never fuses one that states its rounding (PTX ISA, "mad/fma")."""
    constraints = ",".join(["=f"] + ["f"] * len(args))
    places = ", ".join(f"${i + 1}" for i in range(len(args)))
    return asm(builder, _F32, f"{operation}.rn.f32 $0, {places};", constraints, list(args), volatile=False)
