"""Readers of a cache on the CPU read a row before they look whether it changed: also on processors that reorder loads."""

from __future__ import annotations

import re

import pytest
from llvmlite import binding
from numba import njit, types

from hps_numba.kernels.simt import cpu

LOADS = {8: "ld8", 16: "ld16", 32: "ld32", 64: "ld64"}


def assembly_of(bits: int, *, fenced: bool) -> list[str]:
    """Instructions on aarch64 of a load of a row and one of the version, with or without the fence between them."""
    row, version, fence = cpu.NAMES[LOADS[bits]], cpu.NAMES["ld64"], cpu.NAMES["read_fence"]
    if fenced:

        @njit(types.int64(types.int64, types.int64), no_cpython_wrapper=True)
        def read(place, meta):
            element = row(place)
            fence()
            return element + version(meta)

    else:

        @njit(types.int64(types.int64, types.int64), no_cpython_wrapper=True)
        def read(place, meta):
            return row(place) + version(meta)

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple("aarch64-unknown-linux-gnu")
    text = read.inspect_llvm(read.signatures[0])
    text = re.sub(r'target (triple|datalayout) = ".*"\n', "", text)
    text = re.sub(r'"target-(cpu|features)"="[^"]*"', "", text)
    module = binding.parse_assembly(text)
    machine = target.create_target_machine()
    module.triple, module.data_layout = "aarch64-unknown-linux-gnu", str(machine.target_data)
    assembly = machine.emit_assembly(module).partition("\tret\n")[0]  # the first function; what numba wraps around it follows
    lines = [line.strip() for line in assembly.splitlines()]
    loads = r"ld(ar)?r?[bh]?\s|ldapr"
    return [line.split()[0] for line in lines if re.match(loads, line) or line.startswith("dmb")]


@pytest.mark.parametrize("bits", LOADS)
def test_a_barrier_of_loads_is_between_a_row_and_its_version(bits: int) -> None:
    instructions = assembly_of(bits, fenced=True)
    assert [text[:2] for text in instructions] == ["ld", "dm", "ld"], instructions


def test_without_it_a_load_of_a_byte_is_not_ordered() -> None:
    """So the test above can fail."""
    assert not any(text.startswith("dmb") for text in assembly_of(8, fenced=False))
