"""Floats that conversions may get wrong, the values of float8 by definition, and conversions compiled for the CPU."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from itertools import pairwise

import numpy as np

from hps_numba.kernels.compiler.specialize import bind
from hps_numba.kernels.simt.cpu import NAMES


def bits_of(values):
    return np.asarray(values, np.float32).view(np.uint32)


def neighbours(bits, far=2):
    """Bits of floats and of those right beside them."""
    bits = np.asarray(bits, np.int64)
    return np.unique((bits[:, None] + np.arange(-far, far + 1)).ravel() & 0xFFFFFFFF)


@cache
def interesting():
    """Bits of floats that rounding may get wrong: all exponents with edge mantissas, both signs, and random ones."""
    exponents = np.arange(256, dtype=np.int64) << 23
    mantissas = np.array(
        [0, 1, 2, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x3FFFFF, 0x400000, 0x7FFFFE, 0x7FFFFF]
    )
    grid = (exponents[:, None] | mantissas).ravel()
    random = np.random.default_rng(7).integers(0, 1 << 32, 2000)
    return np.unique(np.concatenate([grid, grid | 0x80000000, random]))


@cache
def halves_and_middles(kind):
    """Bits of every 16-bit float of a kind, of the middles between neighbours, and of floats right beside either."""
    if kind == "bfloat16":
        exact = np.arange(0, 1 << 16, dtype=np.int64) << 16
        middles = exact + 0x8000
    else:
        finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
        exact = bits_of(finite).astype(np.int64)
        middles = bits_of((finite[:-1] + finite[1:]) / 2).astype(np.int64)
    both = neighbours(np.concatenate([exact, middles]), 1)
    return np.unique(np.concatenate([both, both ^ 0x80000000]))


@cache
def compiled(function):
    """``map(bits of any kind, other arguments)`` compiled: as the CPU backend of the cache has it."""
    import numba

    bound = numba.njit(error_model="numpy")(bind(function, NAMES, numba.njit(error_model="numpy")))

    @numba.njit(error_model="numpy")
    def each(values, *rest):
        answers = np.empty(len(values), np.int64)
        for i in range(len(values)):
            answers[i] = bound(values[i], *rest)
        return answers

    return lambda values, *rest: each(np.asarray(values, np.int64), *rest)


def e4m3_values():
    """The 127 values from 0 up, by byte, from the definition of the format (OCP 8-bit floating point, E4M3)."""
    values = [Fraction(mantissa, 8) / 64 for mantissa in range(8)]
    values += [(1 + Fraction(mantissa, 8)) * Fraction(2) ** (power - 7) for power in range(1, 16) for mantissa in range(8)]
    return values[:127]


def e4m3_sample():
    """Floats around every e4m3, every middle between two, the largest, and beyond."""
    exact = [float(value) for value in e4m3_values()]
    middles = [(low + high) / 2 for low, high in pairwise(exact)]
    bits = neighbours(
        bits_of([*exact, *middles, 464.0, 480.0, 512.0, 1e30, np.inf, 2.0**-11, 2.0**-30, 1e-45]).astype(np.int64)
    )
    bits = bits[bits <= 0x7F800000]
    return np.concatenate([bits, bits | 0x80000000])


@cache
def float32_sample() -> np.ndarray:
    """Float32 that rounding may get wrong: all exponents, ties of the narrow types and their neighbours, random bits."""
    random = np.random.default_rng(5).integers(0, 1 << 32, 200_000)
    ties = [halves_and_middles("float16"), halves_and_middles("bfloat16"), e4m3_sample()]
    return np.unique(np.concatenate([interesting(), *ties, random]))
