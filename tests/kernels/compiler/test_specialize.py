"""Every cache kernel compiles and links for every supported chip, without a GPU; and what a kernel names is bound.

All pairs of two settings come up (chip, policy, dtypes, key form, width, ...), and of the kernel with those that change what it
does; one case of each is linked for all chips. HPS_NUMBA_ALL_KERNELS=1 takes the full product instead, which takes days.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
import re
import threading
from dataclasses import replace
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from support.waiting import HANG_SECONDS

from hps_numba import plugins
from hps_numba.errors import ConfigError, DeviceError, PolicyError
from hps_numba.kernels.cache import sketch
from hps_numba.kernels.compiler import host_kernels, launch, ptx
from hps_numba.kernels.compiler.diagnosis import signature_of
from hps_numba.kernels.compiler.host_kernels import for_host
from hps_numba.kernels.compiler.ptx import ptx_of, uses_pdl
from hps_numba.kernels.compiler.spec import KERNELS, KernelSpec
from hps_numba.kernels.compiler.specialize import bind, bindings, names_in
from hps_numba.kernels.dtypes import KEY_FORMS, OUT_TYPES, TYPE_NUMBERS
from hps_numba.kernels.policies._functions import for_compiler
from hps_numba.kernels.policies._load import as_policy, load_policy, policy_with
from hps_numba.kernels.policies._policy import Policy
from hps_numba.kernels.simt import cpu, reference

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("cuda.core") is None,
    reason="numba-cuda is not installed: pip install 'numba-cuda[cu13]'",
)

CHIPS = [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
POLICIES = plugins.names("hps_numba.kernels.policies")
SIMPLE = ["lru", "lfu", "fifo"]  # the others are compiled where they make a difference
SETTINGS: dict[str, list[Any]] = {
    "name": list(KERNELS),
    "chip": CHIPS,
    "policy": POLICIES if os.environ.get("HPS_NUMBA_ALL_KERNELS") == "1" else SIMPLE,
    "row_type": list(TYPE_NUMBERS),
    "out_type": list(OUT_TYPES),
    "key_form": list(KEY_FORMS),
    "dim": [1, 3, 16, 17, 32, 100, 128, 384],
    "fixed": [False, True],
    "out_vector": [False, True],
    "lanes": [4, 8],
    "group": [8, 16, 32],
}
#: settings whose pairs with the kernel are required too; besides, each kernel is compiled for the oldest chip
WITH_KERNEL = ("policy", "row_type", "out_type", "fixed", "out_vector", "lanes", "group")
LRU = load_policy("lru")
SPEC = KernelSpec(name="lookup_kernel", dim=3, policy=LRU)


# -- all pairs ------------------------------------------------------------------------------------


def pairs_of(case: dict[str, Any]) -> set[tuple[Any, ...]]:
    return {(a, case[a], b, case[b]) for a, b in itertools.combinations(SETTINGS, 2)}


def required_pairs() -> set[tuple[Any, ...]]:
    pairs: set[tuple[Any, ...]] = {("name", name, "chip", CHIPS[0]) for name in KERNELS}
    for a, b in itertools.combinations(SETTINGS, 2):
        if a != "name" or b in WITH_KERNEL:
            pairs |= {(a, x, b, y) for x, y in itertools.product(SETTINGS[a], SETTINGS[b])}
    return pairs


def pairwise() -> list[dict[str, Any]]:
    """A few cases that contain all required pairs. Greedy: each time the best of some random cases with a missing pair."""
    source = random.Random(1)
    missing = required_pairs()
    cases = []
    while missing:
        a, x, b, y = min(missing, key=lambda pair: (pair[0] != "name", str(pair)))
        best = max(
            ({**{name: source.choice(values) for name, values in SETTINGS.items()}, a: x, b: y} for _ in range(60)),
            key=lambda case: len(pairs_of(case) & missing),
        )
        missing -= pairs_of(best)
        cases.append(best)
    return cases


def every_case() -> list[dict[str, Any]]:
    if os.environ.get("HPS_NUMBA_ALL_KERNELS") == "1":
        return [dict(zip(SETTINGS, values)) for values in itertools.product(*SETTINGS.values())]
    return pairwise()


def compiled(case: dict[str, Any]) -> str:
    settings = {name: value for name, value in case.items() if name not in ("chip", "policy")}
    return ptx_of(KernelSpec(**settings, policy=load_policy(case["policy"])), case["chip"])


def machine_of(cubin: bytes) -> int:
    """The number of the chip in the header of an ELF file of CUDA."""
    flags = int.from_bytes(cubin[48:52], "little")
    return (flags >> 8) & 0xFF if (flags >> 8) & 0xFF >= 75 else flags & 0xFF


@needs_compiler
@pytest.mark.timeout(0 if os.environ.get("HPS_NUMBA_ALL_KERNELS") == "1" else 2 * HANG_SECONDS)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_and_link_for_every_chip(name):
    cases = sorted((case for case in every_case() if case["name"] == name), key=lambda case: case["chip"])
    assert cases[0]["chip"] == CHIPS[0]
    for case in cases:
        code = compiled(case)
        assert re.search(r"\.target sm_{}{}\b".format(*case["chip"]), code), case
        for chip in CHIPS if case is cases[0] else [case["chip"]]:
            cubin = launch.link(code, chip)
            assert cubin.startswith(b"\x7fELF"), case
            assert machine_of(cubin) == 10 * chip[0] + chip[1], case


def test_a_few_cases_contain_all_pairs():
    cases = pairwise()
    assert required_pairs() <= set().union(*map(pairs_of, cases))
    assert len(cases) < 7 * len(KERNELS)


@needs_compiler
def test_the_limit_of_registers_is_kept():
    code = ptx_of(replace(SPEC, dim=128), (9, 0))
    free, tight = launch.link(code, (9, 0)), launch.link(code, (9, 0), registers=24)
    assert free != tight


@needs_compiler
def test_a_kernel_waits_for_its_predecessor_where_the_chip_can_start_it_early():
    early, late = (ptx_of(SPEC, chip) for chip in ((9, 0), (8, 9)))
    assert "griddepcontrol.wait" in early and "griddepcontrol" not in late
    assert uses_pdl(SPEC, (9, 0)) and not uses_pdl(SPEC, (8, 9))
    assert not uses_pdl(replace(SPEC, name="dump_kernel"), (9, 0))


@needs_compiler
@pytest.mark.parametrize("chip", CHIPS)
def test_the_kernel_for_small_batches_compiles_and_links_for_every_chip(chip):
    """It is no case of the pairs: a tile takes a key with 8 lanes and 4 keys a warp only."""
    row_type = list(TYPE_NUMBERS)[CHIPS.index(chip) % len(TYPE_NUMBERS)]
    policy = load_policy(("lru", "lfu", "fifo")[CHIPS.index(chip) % 3])
    spec = replace(SPEC, dim=32, policy=policy, row_type=row_type, by_tile=True, lanes=8, group=4, registers=64)
    assert machine_of(launch.link(ptx_of(spec, chip), chip, spec.registers)) == 10 * chip[0] + chip[1]


@pytest.mark.parametrize(("lanes_of_tile", "group"), [(4, 8), (8, 32), (4, 4)])
def test_a_tile_that_takes_a_key_has_eight_lanes(lanes_of_tile, group):
    with pytest.raises(ConfigError, match=f"expected lanes=8, group=4 with by_tile, got lanes={lanes_of_tile}, group={group}"):
        ptx_of(replace(SPEC, by_tile=True, lanes=lanes_of_tile, group=group), (9, 0))


@needs_compiler
@pytest.mark.parametrize("name", [name for name in POLICIES if name not in SIMPLE])
def test_insertion_by_every_policy_compiles_and_links_for_every_chip(name):
    """Of a policy's functions all but touch are in this kernel, and the others have nothing else of it."""
    number = POLICIES.index(name)
    row_type = list(TYPE_NUMBERS)[number % len(TYPE_NUMBERS)]
    spec = replace(SPEC, name="insert_kernel", policy=load_policy(name), row_type=row_type, lanes=(4, 8)[number % 2])
    code = ptx_of(spec, CHIPS[0])
    for chip in CHIPS:
        assert machine_of(launch.link(code, chip)) == 10 * chip[0] + chip[1]


@needs_compiler
@pytest.mark.parametrize("name", POLICIES)
def test_every_function_of_every_policy_compiles_by_itself(name):
    """As it is compiled to tell which one is at fault."""
    policy, chip = load_policy(name), CHIPS[POLICIES.index(name) % len(CHIPS)]
    for label, function in policy.functions.items():
        bound = bind(for_compiler(function), {}, ptx._device_function)
        assert ".target sm_{}{}".format(*chip) in compile_ptx_of(bound, signature_of(label, function), chip)


def compile_ptx_of(function, signature, chip):
    from hps_numba.kernels.compiler.numba_cuda import compile_ptx

    return compile_ptx(function, signature, chip, device=True)


@needs_compiler
def test_a_policy_that_only_scores_costs_insertion_nothing():
    """The code for victims, admission and keys is not in the kernels of other policies."""
    plain = ptx_of(replace(SPEC, name="insert_kernel"), (9, 0))
    sieve, tinylfu = (
        ptx_of(replace(SPEC, name="insert_kernel", policy=load_policy(name)), (9, 0)) for name in ("sieve", "tinylfu")
    )
    assert ".local" not in plain and ".local" in sieve  # scores and state of a set
    places = str(sketch._APART.astype(np.int64))  # where a key is counted
    assert places in tinylfu and places not in plain and places not in sieve


@needs_compiler
@pytest.mark.parametrize("by_tile", [False, True])
def test_a_hit_writes_nothing_to_local_memory(by_tile):
    """numba clears memory for results of functions that are not inlined: no such store may be where every thread passes."""
    code = ptx_of(replace(SPEC, dim=32, by_tile=by_tile, group=4 if by_tile else 32), (9, 0))
    kernel = code[code.index(".visible .entry") :]
    beginning = kernel[: re.search(r"^\$L__BB", kernel, re.MULTILINE).start()]
    assert "ld.param" in beginning and "st.local" in kernel and "st.local" not in beginning


@needs_compiler
def test_a_kernel_of_a_user_policy_is_another_kernel():
    class Newest:
        def first(now, count):
            return -now

        def touch(score, now, count):
            return -now

    ours, theirs = (ptx_of(replace(SPEC, policy=policy), (9, 0)) for policy in (LRU, as_policy(Newest)))
    assert ours != theirs


# -- names ----------------------------------------------------------------------------------------

#: operations of ``simt.reference`` that are right as they are for a tile of one lane, wherever they run
RIGHT_FOR_ONE_LANE = {
    *(
        "grid_dependency_sync",
        "all_in_tile",
        "any_in_warp",
        "block_number",
        "block_tiles",
        "clock_ns",
        "count_in_warp",
        "from_first_lane",
        "shfl",
        "grid_blocks",
    ),
    *("grid_row", "grid_rows"),
    *("grid_tiles", "grid_warps", "is_block_leader", "is_first_lane", "is_grid_leader", "is_warp_leader", "lane"),
    *("count_one", "lane_in_warp", "max_in_tile", "noinline", "probe_host_line", "probe_host_line_by_lane", "probe_line"),
    *("probe_line_by_lane", "probe_two_lines"),
    *("sync_block", "sync_tile", "sync_warp", "tile_in_warp", "tile_number", "tiles_in_warp", "tiles_of"),
    *("ballot", "warp_number"),
}


def operations_in(function: FunctionType) -> set[str]:
    """Operations of ``simt.reference`` that a function names, and the functions that it calls."""
    found: set[str] = set()
    seen: set[FunctionType] = set()
    left = [function]
    while left:
        current = left.pop()
        seen.add(current)
        for name in names_in(current.__code__):
            value = current.__globals__.get(name)
            if not isinstance(value, FunctionType) or not value.__module__.startswith("hps_numba."):
                continue
            if value.__module__ == reference.__name__:
                found.add(name)
            if value not in seen:
                left.append(value)
    return found


@pytest.mark.parametrize("name", KERNELS)
def test_every_operation_is_bound_or_right_for_one_lane(name):
    used = operations_in(replace(SPEC, name=name).function)
    assert used, "a kernel accesses memory"
    assert used <= set(reference.__all__)
    assert used <= set(cpu.NAMES) | RIGHT_FOR_ONE_LANE
    assert not set(cpu.NAMES) & RIGHT_FOR_ONE_LANE


@needs_compiler
@pytest.mark.parametrize("lanes_of_tile", [4, 8])
def test_every_operation_is_bound_on_a_gpu(lanes_of_tile):
    from hps_numba.kernels.simt import cuda as simt_cuda

    spec = replace(SPEC, lanes=lanes_of_tile)
    how = {"lanes": lanes_of_tile, "uniform": True, "out_vector": True, "pdl": True, "copies": True}
    bound = simt_cuda.names(**how, constants=spec.constants, device=lambda function: function)
    assert set(reference.__all__) <= set(bound)


@pytest.mark.parametrize("name", KERNELS)
def test_constants_and_policies_are_bound_in_every_function(name):
    spec = replace(SPEC, name=name, dim=7, row_type="int8", policy=load_policy("lfu"))
    constants = {key: value for key, value in spec.for_one_lane.items() if not callable(value)}
    seen: list[FunctionType] = []
    seen.append(bindings(spec, lambda function: seen.append(function) or function))
    for function in seen:
        for used in set(names_in(function.__code__)) & set(constants):
            assert function.__globals__[used] == constants[used], (function.__name__, used)
        for used in set(names_in(function.__code__)) & {"policy_first", "policy_touch"}:
            label = used.removeprefix("policy_")
            assert function.__globals__[used].__code__ is getattr(spec.policy, label).__code__


# -- bind -----------------------------------------------------------------------------------------

FACTOR = 2


def scaled(value):
    return value * FACTOR


def summed(values):
    return sum([scaled(value) for value in values]) + scaled(1)


def test_bind_copies_what_a_function_calls_and_leaves_the_original():
    wrapped = []
    bound = bind(summed, {"FACTOR": 10}, lambda function: wrapped.append(function.__name__) or function)
    assert bound([1, 2]) == 40 and summed([1, 2]) == 8
    assert wrapped == ["scaled"]
    assert bind(summed, {"scaled": lambda value: -value}, lambda function: function)([1, 2]) == -4


# -- specs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "sort_kernel"}, "kernel 'sort_kernel': expected name to be one of lookup_kernel"),
        ({"row_type": "int4"}, "expected row_type to be one of float32, float16, bfloat16, int8, float8_e4m3, got 'int4'"),
        ({"out_type": "int8"}, "expected out_type to be one of float32, float16, bfloat16, got 'int8'"),
        ({"key_form": "uint64"}, "expected key_form to be one of int64, int32, uint32, checked32_in_int64, got 'uint64'"),
        ({"dim": 0}, "expected dim to be at least 1, got 0"),
    ],
)
def test_a_spec_that_no_kernel_can_be_built_for_is_refused(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(SPEC, **change)


@needs_compiler
def test_a_gpu_has_no_tiles_of_one_lane():
    with pytest.raises(ConfigError, match="expected lanes to be 4 or 8 on a GPU, got 1"):
        ptx_of(replace(SPEC, lanes=1), (9, 0))


# -- for the CPU ----------------------------------------------------------------------------------


def test_one_kernel_a_process_for_the_cpu():
    gpu_only = replace(SPEC, lanes=4, group=8, depth=4, registers=32, out_vector=False)
    got: list[Any] = []
    gate = threading.Barrier(4)

    def ask(spec: KernelSpec) -> None:
        gate.wait(HANG_SECONDS)
        got.append(for_host(spec))

    threads = [threading.Thread(target=ask, args=(spec,)) for spec in (SPEC, gpu_only) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4 and len(set(map(id, got))) == 1
    changes = ({"name": "insert_kernel"}, {"dim": 4}, {"fixed": True}, {"row_type": "int8"}, {"out_type": "float16"})
    for change in (*changes, {"key_form": "int32"}, {"policy": load_policy("fifo")}):
        assert for_host(replace(SPEC, **change)) is not got[0]


def test_a_kernel_for_the_cpu_is_compiled_once_by_threads_that_call_it_together(monkeypatch, tmp_path):
    monkeypatch.setenv("HPS_NUMBA_CACHE_DIR", str(tmp_path))
    compiled = []
    real = host_kernels._compile_for_host
    monkeypatch.setattr(host_kernels, "_compile_for_host", lambda spec: compiled.append(spec) or real(spec))
    monkeypatch.setattr(host_kernels, "_host_kernels", {})
    kernel = for_host(replace(SPEC, name="clear_kernel"))
    assert compiled == []
    lines = np.zeros(3 * 128 + 128, np.uint8)
    start = -(-lines.__array_interface__["data"][0] // 128) * 128
    threads = [threading.Thread(target=kernel, args=(start, 3)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1
    meta = lines[start - lines.__array_interface__["data"][0] :][:384].reshape(6, 64)[:, 60:].copy().view(np.uint32)
    assert (meta == 4 * 0x100).all()  # the version of each line, once a thread


# -- what does not compile ------------------------------------------------------------------------


def listed(now, count):
    return [*now, "x"]


LISTED = r"^policy 'broken', listed \(.*test_specialize\.py:\d+\)"


def broken_policy() -> Policy:
    """One that got past the checks of ``as_policy``."""
    return Policy("broken", listed, LRU.touch, False, "0" * 32)


@needs_compiler
def test_a_policy_that_does_not_compile_for_the_gpu_is_named():
    with pytest.raises(PolicyError, match=rf"{LISTED}: does not compile for sm_80: [^\n]+$"):
        ptx_of(replace(SPEC, name="insert_kernel", policy=broken_policy()), (8, 0))


def test_a_policy_that_does_not_compile_for_the_cpu_is_named():
    with pytest.raises(PolicyError, match=rf"{LISTED}: does not compile for the CPU: [^\n]+$"):
        for_host(replace(SPEC, name="insert_kernel", policy=broken_policy()))(*[0] * 7)


def without_sense(scores, state):
    best = scores[0]
    state[0] = best.no_such_attribute
    return best


def test_function_line_and_target_of_a_victim_that_does_not_compile_are_named():
    policy = Policy("broken", LRU.first, LRU.touch, False, "1" * 32, victim=without_sense, state=1)
    place = rf"without_sense \(.*test_specialize\.py:{without_sense.__code__.co_firstlineno + 2}\)"
    with pytest.raises(PolicyError, match=rf"^policy 'broken', {place}: does not compile for the CPU: [^\n]+$"):
        for_host(replace(SPEC, name="insert_kernel", policy=policy))(*[0] * 7)


@needs_compiler
def test_function_line_and_target_of_an_admission_that_does_not_compile_for_the_gpu_are_named():
    def judge(key, count, sketch):
        return sketch.no_such_attribute > 0

    policy = Policy("broken", LRU.first, LRU.touch, False, "2" * 32, admit=judge)
    place = rf"judge \(.*test_specialize\.py:{judge.__code__.co_firstlineno + 1}\)"
    with pytest.raises(PolicyError, match=rf"^policy 'broken', {place}: does not compile for sm_90: [^\n]+$"):
        ptx_of(replace(SPEC, name="insert_kernel", policy=policy), (9, 0))


DEPTH = DIM = 1


def constant_of_the_kernels(score, now, count):
    return score + DEPTH + DIM


def test_names_of_a_policy_are_its_own_even_if_kernels_use_them_too():
    class Own:
        touch = constant_of_the_kernels

        def first(now, count):
            return constant_of_the_kernels(now, now, count)

    spec = replace(SPEC, name="insert_kernel", dim=3, policy=as_policy(policy_with(Own, DEPTH=1000, DIM=100, needs_count=True)))
    seen: list[FunctionType] = []
    bindings(spec, lambda function: seen.append(function) or function)
    (bound,) = [function for function in seen if function.__name__ == "constant_of_the_kernels"]
    assert bound(1, 0, 0) == 1101


def missing(place):
    return place.is_no_attribute


def test_a_kernel_that_does_not_compile_is_named_with_its_spec(monkeypatch, tmp_path):
    from hps_numba.kernels.cache import update

    monkeypatch.setenv("HPS_NUMBA_CACHE_DIR", str(tmp_path))  # no file has the kernel as it was
    monkeypatch.setattr(update, "lock_set", missing)
    message = r"^clear_kernel\(policy=lru, dim=5, .*\) does not compile for the CPU: [^\n]+$"
    with pytest.raises(DeviceError, match=message):
        for_host(replace(SPEC, name="clear_kernel", dim=5))(0, 0)


@needs_compiler
def test_a_kernel_that_does_not_compile_for_the_gpu_is_named_with_its_spec(monkeypatch):
    from hps_numba.kernels.cache import update

    monkeypatch.setattr(update, "lock_set", missing)
    with pytest.raises(DeviceError, match=r"^clear_kernel\(.*\) does not compile for sm_90: [^\n]+$"):
        ptx_of(replace(SPEC, name="clear_kernel"), (9, 0))


@needs_compiler
def test_what_the_linker_refuses_is_a_device_error(monkeypatch):
    with pytest.raises(DeviceError, match=r"^linking for sm_90: [^\n]+$"):
        launch.link("this is no PTX", (9, 0))
    monkeypatch.setattr(launch.disk_cache, "find", lambda name: None)
    monkeypatch.setattr(launch, "ptx_of", lambda spec, chip: ".visible .entry broken(")
    with pytest.raises(DeviceError, match=r"^lookup_kernel\(policy=lru, .*\): linking for sm_90: "):
        launch.cubin_of(SPEC, (9, 0))


@needs_compiler
def test_other_threads_keep_their_device_while_a_kernel_is_compiled():
    """Numba's own question for the current device is answered with the chip in the compiling thread only."""
    from numba.cuda import dispatcher

    from hps_numba.kernels.compiler.numba_cuda import _for_chip

    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(dispatcher.get_current_device().compute_capability)
        except Exception as problem:  # there is no device
            answers.append(type(problem).__name__)

    before = dispatcher.get_current_device
    ask()
    with _for_chip((8, 9)):
        assert dispatcher.get_current_device().compute_capability == (8, 9)
        other = threading.Thread(target=ask)
        other.start()
        other.join()
    assert answers[0] == answers[1]
    assert dispatcher.get_current_device is before
