"""Conversions of row elements: equal to NumPy, to Torch and to exact arithmetic, bit by bit; plain Python equals compiled."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from support.dtype_samples import bits_of, compiled, e4m3_sample, e4m3_values, halves_and_middles, interesting, neighbours

from hps_numba.kernels.cache import conversions as elements

ONE = np.float32(1.0)
NAN = 0x7FC00000


def floats_of(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


def plain(function, values, *rest):
    with np.errstate(all="ignore"):
        return np.array([int(function(int(value), *rest)) for value in values], np.int64)


def same_floats(left, right):
    """Equal as bits, except that all NaN are equal."""
    left, right = floats_of(left), floats_of(right)
    return bool(np.all((left.view(np.uint32) == right.view(np.uint32)) | (np.isnan(left) & np.isnan(right))))


def as_float16(bits):
    with np.errstate(over="ignore", under="ignore"):
        return floats_of(bits).astype(np.float16)


def as_bfloat16(bits):
    torch = pytest.importorskip("torch", reason="the other side of the comparison")
    return torch.from_numpy(floats_of(bits)).to(torch.bfloat16)


# -- 16 bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [interesting, lambda: halves_and_middles("float16")], ids=["edges", "ties"])
def test_float16_equals_that_of_numpy(sample):
    bits = sample()
    stored = compiled(elements.float16_of)(bits).astype(np.uint16).view(np.float16)
    expected = as_float16(bits)
    same = (stored.view(np.uint16) == expected.view(np.uint16)) | (np.isnan(stored) & np.isnan(expected))
    assert same.all(), [hex(b) for b in bits[~same][:5]]


def test_every_float16_comes_back():
    halves = np.arange(1 << 16)
    expected = halves.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    back = compiled(elements.float_of_float16)(halves)
    assert same_floats(back, expected)
    number = ~np.isnan(floats_of(back))
    assert (compiled(elements.float16_of)(back)[number] == halves[number]).all()


@pytest.mark.parametrize("sample", [interesting, lambda: halves_and_middles("bfloat16")], ids=["edges", "ties"])
def test_bfloat16_is_rounded_to_nearest_even(sample):
    """By whole numbers: of the bfloat16 below and above, the nearer, of two as near the even one."""
    bits = sample()
    bits = bits[~np.isnan(floats_of(bits))]
    below = bits >> 16
    left_over = bits & 0xFFFF
    up = (left_over > 0x8000) | ((left_over == 0x8000) & (below % 2 == 1))
    assert (compiled(elements.bfloat16_of)(bits) == below + up).all()


def test_bfloat16_equals_that_of_torch():
    bits = interesting()
    expected = as_bfloat16(bits).float().numpy().view(np.uint32)
    stored = compiled(elements.bfloat16_of)(bits)
    assert same_floats(compiled(elements.float_of_bfloat16)(stored), expected)
    assert (stored >= 0).all() and (stored < 1 << 16).all()


# -- 8 bits -----------------------------------------------------------------------------------------


def test_every_e4m3_has_the_value_of_its_definition():
    expected = [float(value) for value in e4m3_values()]
    for sign, base in ((1.0, 0), (-1.0, 0x80)):
        back = compiled(elements.float_of_float8)(np.arange(127) + base, ONE)
        assert (floats_of(back) == np.multiply(sign, expected)).all()
        assert (back >> 31 == (sign < 0)).all()
    assert compiled(elements.float_of_float8)([0x7F, 0xFF], ONE).tolist() == [NAN] * 2


def test_e4m3_is_the_nearest_and_at_most_448():
    """By exact arithmetic: no e4m3 is nearer, and of two as near it is the even one."""
    values = e4m3_values()
    bits = e4m3_sample()
    bits = bits[bits < 0x7F800000]
    for value, byte in zip(floats_of(bits).tolist(), compiled(elements.float8_of)(bits, ONE).tolist()):
        exact = min(Fraction(value), values[-1])
        near = min(range(127), key=lambda number: (abs(values[number] - exact), number % 2))
        assert byte == near, value
    negative = compiled(elements.float8_of)(bits | 0x80000000, ONE)
    assert (negative == compiled(elements.float8_of)(bits, ONE) | 0x80).all()


def test_e4m3_equals_that_of_torch():
    torch = pytest.importorskip("torch", reason="the other side of the comparison")
    bits = np.concatenate([e4m3_sample(), interesting(), bits_of(np.random.default_rng(3).normal(0, 100, 20000))])
    stored = compiled(elements.float8_of)(bits, ONE).astype(np.uint8)
    clipped = torch.from_numpy(floats_of(bits)).clamp(-448.0, 448.0)
    expected = clipped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    no_number = np.isnan(floats_of(bits))
    assert (stored[~no_number] == expected[~no_number]).all()
    assert (stored[no_number] & 0x7F == 0x7F).all()


def test_int8_is_the_nearest_with_halves_away_from_zero():
    middles = np.arange(127) + 0.5
    bits = neighbours(bits_of([*range(128), *middles, 126.5, 1e-45, 0.25]).astype(np.int64))
    bits = bits[bits < 0x7F800000]
    for value, byte in zip(floats_of(bits).tolist(), compiled(elements.int8_of)(bits, ONE).tolist()):
        assert byte == min(int(Fraction(value) + Fraction(1, 2)), 127), value
    positive = compiled(elements.int8_of)(bits, ONE)
    assert (compiled(elements.int8_of)(bits | 0x80000000, ONE) == -positive & 0xFF).all()


def test_int8_stops_at_127():
    bits = bits_of([128.0, 1e30, np.inf, -128.0, -np.inf, np.nan]).astype(np.int64)
    assert compiled(elements.int8_of)(bits, ONE).tolist() == [127, 127, 127, 129, 129, 127]


def test_every_int8_comes_back():
    back = floats_of(compiled(elements.float_of_int8)(np.arange(256), np.float32(0.5)))
    assert (back == np.arange(256).astype(np.uint8).view(np.int8) * np.float32(0.5)).all()


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3"])
def test_a_scaled_row_is_near_its_values(kind):
    """The largest value of a row is kept to a rounding; others to half a step of the type."""
    values = np.random.default_rng(11).uniform(-1, 1, 2000).astype(np.float32)
    largest = np.abs(values).max()
    with np.errstate(all="ignore"):
        scale = elements.scale_of(int(bits_of(largest)), kind == "int8")
    to, back = (elements.int8_of, elements.float_of_int8) if kind == "int8" else (elements.float8_of, elements.float_of_float8)
    answer = floats_of(compiled(back)(compiled(to)(bits_of(values), scale), scale))
    error = np.abs(answer - values)
    if kind == "int8":
        assert error.max() <= scale * 0.501
    else:
        assert (error <= np.maximum(np.abs(values) / 16, scale * 2.0**-10) * 1.001).all()
    assert error[np.abs(values).argmax()] <= 2 * np.spacing(largest)


def test_scales():
    def scale(value, is_int8):
        return float(elements.scale_of(int(bits_of(value)), is_int8))

    assert scale(254.0, True) == 2.0
    assert scale(0.0, True) == 1.0
    assert scale(896.0, False) == 2.0
    assert scale(0.0, False) == scale(1e-9, False) == float(np.float32(1 / (448 * 512)))


# -- plain Python -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float16_of", "bfloat16_of"])
def test_plain_python_stores_the_same_16_bits(name):
    function = getattr(elements, name)
    bits = np.concatenate([interesting()[::3], halves_and_middles(name.removesuffix("_of"))[::97]])
    assert (plain(function, bits) == compiled(function)(bits)).all()


@pytest.mark.parametrize("scale", [1.0, 0.0078125, 0.037, 3.5])
@pytest.mark.parametrize("name", ["int8_of", "float8_of"])
def test_plain_python_stores_the_same_bytes(name, scale):
    function = getattr(elements, name)
    bits = np.concatenate([interesting()[::5], e4m3_sample()[::3]])
    assert (plain(function, bits, np.float32(scale)) == compiled(function)(bits, np.float32(scale))).all()


def test_plain_python_reads_the_same():
    halves = np.arange(0, 1 << 16, 37)
    for function in (elements.float_of_float16, elements.float_of_bfloat16):
        assert (plain(function, halves) == compiled(function)(halves)).all()
    for function in (elements.float_of_int8, elements.float_of_float8):
        assert (plain(function, range(256), np.float32(0.037)) == compiled(function)(range(256), np.float32(0.037))).all()
