"""Conversions in the registers of a GPU: their code, run on a CPU, gives the bits of ``cache.conversions`` for all inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from llvmlite import ir
from support.dtype_samples import compiled, float32_sample
from support.llvm_on_cpu import address, pointer, run_on_cpu

from hps_numba.kernels.cache import conversions
from hps_numba.kernels.dtypes import TYPE_NUMBERS

on_gpu = pytest.importorskip(
    "hps_numba.kernels.simt.cuda_dtypes", reason="numba-cuda is not installed: pip install 'numba-cuda[cu13]'"
)

_64, _32 = ir.IntType(64), ir.IntType(32)


def compiled_element(name: str) -> Any:
    return compiled(getattr(conversions, name))


def converter(write: Callable[[Any, Any, Any], Any]) -> Callable[[np.ndarray, float], np.ndarray]:
    """``write(builder, word, scale)`` for each word of an array."""

    def loop(builder: Any, values: Any, answers: Any, count: Any, scale_bits: Any) -> None:
        from numba.core import cgutils

        scale = builder.bitcast(builder.trunc(scale_bits, _32), ir.FloatType())
        with cgutils.for_range(builder, count, intp=_64) as turn:
            offset = builder.mul(turn.index, ir.Constant(_64, 4))
            word = builder.load(pointer(builder, builder.add(values, offset), _32))
            builder.store(write(builder, word, scale), pointer(builder, builder.add(answers, offset), _32))

    function = run_on_cpu(loop, 4)

    def each(values: np.ndarray, scale: float = 1.0) -> np.ndarray:
        values = np.ascontiguousarray(values, np.uint32)
        answers = np.empty_like(values)
        function(address(values), address(answers), len(values), int(np.float32(scale).view(np.uint32)), 0)
        return answers

    return each


SCALES = [1.0, 0.0078125, 0.037, 3.5, 1e-38, 2.0**-127, 3e38]


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("half", [0, 1])
def test_all_16_bit_floats_are_read_as_on_the_cpu(stored: str, half: int) -> None:
    kind = TYPE_NUMBERS[stored]
    read = converter(lambda builder, word, scale: builder.bitcast(on_gpu.floats_of(builder, kind, [word], 2, None)[half], _32))
    halves = np.arange(1 << 16, dtype=np.uint32)
    other = np.random.default_rng(1).permutation(halves)
    words = halves << 16 | other if half else other << 16 | halves
    assert (read(words) == compiled_element(f"float_of_{stored}")(halves)).all()


@pytest.mark.parametrize("stored", ["int8", "float8_e4m3"])
@pytest.mark.parametrize("byte", range(4))
def test_all_bytes_are_read_as_on_the_cpu(stored: str, byte: int) -> None:
    kind = TYPE_NUMBERS[stored]
    read = converter(lambda builder, word, scale: builder.bitcast(on_gpu.floats_of(builder, kind, [word], 4, scale)[byte], _32))
    bytes_ = np.arange(256, dtype=np.uint32)
    words = np.full(256, 0x81FF7F01, np.uint32) & ~np.uint32(0xFF << (8 * byte)) | bytes_ << np.uint32(8 * byte)
    name = "float_of_int8" if stored == "int8" else "float_of_float8"
    for scale in SCALES:
        assert (read(words, scale) == compiled_element(name)(bytes_, np.float32(scale))).all(), scale


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_floats_are_rounded_to_16_bits_as_on_the_cpu(kind: str) -> None:
    write = converter(
        lambda builder, word, scale: on_gpu.bits_of(builder, TYPE_NUMBERS[kind], [builder.bitcast(word, ir.FloatType())])[0]
    )
    bits = float32_sample()
    assert (write(bits) == compiled_element(f"{kind}_of")(bits)).all()


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3"])
def test_floats_are_rounded_to_bytes_as_on_the_cpu(kind: str) -> None:
    def one(builder: Any, word: Any, scale: Any) -> Any:
        return on_gpu.bits_of(builder, TYPE_NUMBERS[kind], [builder.bitcast(word, ir.FloatType())], scale)[0]

    write, bits = converter(one), float32_sample()
    for scale in SCALES:
        expected = compiled_element("int8_of" if kind == "int8" else "float8_of")(bits, np.float32(scale))
        assert (write(bits, scale) == expected).all(), scale


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3"])
def test_scales_are_those_of_the_cpu(kind: str) -> None:
    write = converter(lambda builder, word, _scale: builder.bitcast(on_gpu.scale_of(builder, word, TYPE_NUMBERS[kind]), _32))
    sizes = np.unique(float32_sample() & 0x7FFFFFFF)
    with np.errstate(all="ignore"):
        expected = [conversions.scale_of(int(size), kind == "int8").view(np.uint32) for size in sizes[::7]]
    assert (write(sizes[::7]) == expected).all()


def test_elements_are_packed_from_the_lower_end() -> None:
    values = np.array([1.0, -2.0, 3.0, -4.0], np.float32)

    def write(builder: Any, out: Any) -> None:
        floats = [ir.Constant(ir.FloatType(), float(value)) for value in values]
        for number, kind in enumerate(("float32", "float16", "bfloat16", "int8", "float8_e4m3")):
            words = on_gpu.bits_of(builder, TYPE_NUMBERS[kind], floats, ir.Constant(ir.FloatType(), 1.0))
            for i, word in enumerate(words):
                builder.store(word, pointer(builder, builder.add(out, ir.Constant(_64, 16 * number + 4 * i)), _32))

    out = np.zeros((5, 4), np.uint32)
    run_on_cpu(write, 1)(address(out), 0)
    assert (out[0] == values.view(np.uint32)).all()
    assert (out[1, :2] == values.astype(np.float16).view(np.uint32)).all()
    assert (out[2, :2].view(np.uint16) == values.view(np.uint32) >> 16).all()
    assert (out[3].view(np.int8)[:4] == values).all()
    assert (out[4].view(np.uint8)[:4] == [0x38, 0xC0, 0x44, 0xC8]).all()
    assert (out[3:, 1:] == 0).all() and (out[1:3, 2:] == 0).all()
