"""Kernels for the CPU on disk: another process finds them and compiles nothing; files are never mixed up and never required."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
from numba.core.bytecode import FunctionIdentity
from support.compiled_kernels import SPEC, end, scattered, start

from hps_numba.kernels.compiler import disk_cache, host_kernels
from hps_numba.kernels.compiler.host_kernels import for_host
from hps_numba.kernels.compiler.spec import KernelSpec
from hps_numba.kernels.policies._load import load_policy


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of kernels, empty, of a process that has not warned yet."""
    monkeypatch.setenv("HPS_NUMBA_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(disk_cache, "_warned", False)
    return tmp_path / "kept" / "cpu"


@pytest.fixture
def compiled(monkeypatch):
    """Specs that were compiled, one by one."""
    specs: list[KernelSpec] = []
    real = host_kernels._compile_for_host
    monkeypatch.setattr(host_kernels, "_compile_for_host", lambda spec: specs.append(spec) or real(spec))
    return specs


def fresh(spec: KernelSpec, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel as a new process would get it."""
    monkeypatch.setattr(host_kernels, "_host_kernels", {})
    return for_host(spec)


def expected(dim: int) -> list[list[float]]:
    out = np.zeros((4, dim), np.float32)
    out[[2, 0]] = np.arange(2 * dim).reshape(2, dim)
    return out.tolist()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# -- in other processes -----------------------------------------------------------------------------

SCATTER = """
import json, sys
from numba.core import event
seen = event.RecordingListener()
event.register("numba:compile", seen)
from support.compiled_kernels import SPEC, scattered
from dataclasses import replace
from hps_numba.kernels.compiler.host_kernels import for_host
rows = [scattered(for_host(replace(SPEC, dim=dim)), dim) for dim in map(int, sys.argv[1:])]
print(json.dumps({"compiled": len(seen.buffer), "rows": rows}))
"""

CACHE = """
import json, sys
import numpy as np
from numba.core import event
seen = event.RecordingListener()
event.register("numba:compile", seen)
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.kernels.policies._load import load_policy
cache = EmbeddingCache(3, 20, device=None, policy=load_policy("lru"), default=-1.0)
cache.insert(np.array([-4, 5]), np.array([[1, 2, 3], [4, 5, 6]], np.float32))
rows = cache.lookup_arrays(np.array([5, 6, -4])).tolist()
cuda = [name for name in sys.modules if name.startswith(("numba.cuda", "numba_cuda", "cuda."))]
print(json.dumps({"compiled": len(seen.buffer), "rows": rows, "cuda": cuda}))
"""

POLICY = """
import json, sys
from hps_numba.kernels.compiler import host_kernels
from hps_numba.kernels.policies._load import load_policy
from support.compiled_kernels import SPEC
from dataclasses import replace
from hps_numba.kernels.compiler.host_kernels import for_host
made = []
real = host_kernels._compile_for_host
host_kernels._compile_for_host = lambda spec: made.append(spec.name) or real(spec)
kernel = for_host(replace(SPEC, name="touch_kernel", policy=load_policy(sys.argv[1], allow_code=True)))
kernel._compile()
print(json.dumps(made))
"""


def test_a_cache_on_the_cpu_compiles_nothing_once_its_kernels_are_kept():
    first, second = (end(start(CACHE)) for _ in range(2))  # in the folder of the user: the first may find them too
    assert second["compiled"] == 0
    assert first["rows"] == second["rows"] == [[4, 5, 6], [-1, -1, -1], [1, 2, 3]]
    assert second["cuda"] == []


def test_kernels_are_compiled_once_for_all_processes_and_never_mixed_up(place):
    """In each process numba gives the first function the same number, and its linker knows functions by their names."""
    first, loads_one, loads_both = end(start(SCATTER, 3)), end(start(SCATTER, 3, 5)), end(start(SCATTER, 5, 3))
    assert first["compiled"] >= loads_one["compiled"] > 0 == loads_both["compiled"]
    assert first["rows"] == [expected(3)]
    assert loads_one["rows"] == [expected(3), expected(5)]
    assert loads_both["rows"] == [expected(5), expected(3)]
    assert len(list(place.iterdir())) == 2


def test_functions_of_two_kernels_have_no_name_in_common(monkeypatch):
    """Of functions that are not inlined, the linker would take the first of that name for all."""

    def functions(dim):
        monkeypatch.setattr(FunctionIdentity, "_unique_ids", itertools.count(1))  # as in a new process
        (result,) = host_kernels._compile_for_host(replace(SPEC, name="refresh_kernel", dim=dim)).overloads.values()
        return {function.name for function in result.library._final_module.functions if not function.is_declaration}

    three, five = functions(3), functions(5)
    assert any("refresh_line" in name for name in three) and len(three) == len(five)
    assert not three & five


def test_processes_that_start_together_keep_one_file(place):
    results = [end(process) for process in [start(SCATTER, 3) for _ in range(2)]]
    assert [result["rows"] for result in results] == [[expected(3)]] * 2
    assert len(list(place.iterdir())) == 1
    assert end(start(SCATTER, 3))["compiled"] == 0


def test_a_policy_in_a_file_is_found_again_wherever_the_file_is(place, tmp_path):
    file = tmp_path / "newest.py"
    file.write_text(
        "class Newest:\n    def first(now, count):\n        return -now\n\n"
        "    def touch(score, now, count):\n        return -now\n"
    )
    assert end(start(POLICY, f"{file}:Newest")) == ["touch_kernel"]
    other = shutil.move(file, tmp_path / "moved.py")
    assert end(start(POLICY, f"{other}:Newest")) == []


# -- never trusted, never required ------------------------------------------------------------------

DAMAGES = {"cut": lambda data: data[:-5], "bit": lambda data: data[:-1] + bytes([data[-1] ^ 1])}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_compiled_again(place, compiled, monkeypatch, caplog, damage):
    assert scattered(fresh(SPEC, monkeypatch), 3) == expected(3)
    (file,) = place.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    for _ in range(2):
        assert scattered(fresh(SPEC, monkeypatch), 3) == expected(3)
    assert len(compiled) == 2
    (warning,) = warnings(caplog)
    assert file.name in warning and "compiled again" in warning


@pytest.mark.parametrize("content", [b"no pickle", b"\x80\x04)."], ids=["garbage", "nothing"])
def test_what_numba_cannot_restore_is_compiled_again(place, compiled, monkeypatch, caplog, content):
    fresh(SPEC, monkeypatch)._compile()
    (file,) = place.iterdir()
    disk_cache.keep(file.name, content, "symbol")
    for _ in range(2):
        assert scattered(fresh(SPEC, monkeypatch), 3) == expected(3)
    assert len(compiled) == 2
    (warning,) = warnings(caplog)
    assert file.name in warning and "compiled again" in warning


def other_numba(monkeypatch):
    monkeypatch.setattr(numba, "__version__", "0.0")


def other_options(monkeypatch):
    monkeypatch.setattr(numba.config, "OPT", 1)


def other_processor(monkeypatch):
    from numba.core.registry import cpu_target

    codegen = cpu_target.target_context.codegen()
    monkeypatch.setattr(type(codegen), "magic_tuple", lambda self: ("x86_64", "i486", ""))


def other_sources(monkeypatch):
    monkeypatch.setattr(disk_cache, "source_digest", lambda: "0" * 16)


@pytest.mark.parametrize("change", [other_numba, other_options, other_processor, other_sources])
def test_code_for_something_else_is_not_taken(place, compiled, monkeypatch, change):
    fresh(SPEC, monkeypatch)._compile()
    with monkeypatch.context() as patch:
        change(patch)
        fresh(SPEC, monkeypatch)._compile()
    assert len(compiled) == len(list(place.iterdir())) == 2
    fresh(SPEC, monkeypatch)._compile()
    assert len(compiled) == 2


def test_fields_for_a_gpu_have_no_file_of_their_own_on_the_cpu(place, compiled, monkeypatch):
    fresh(SPEC, monkeypatch)._compile()
    fresh(replace(SPEC, lanes=4, group=8, depth=4, registers=32, out_vector=False), monkeypatch)._compile()
    assert compiled == [SPEC]
    for change in ({"dim": 4}, {"policy": load_policy("fifo")}):
        fresh(replace(SPEC, **change), monkeypatch)._compile()
    assert len(compiled) == len(list(place.iterdir())) == 3


@pytest.mark.skipif(os.name == "nt", reason="modes of files are those of POSIX")
def test_a_file_that_others_can_write_is_not_run(place, compiled, monkeypatch, caplog):
    fresh(SPEC, monkeypatch)._compile()
    (file,) = place.iterdir()
    file.chmod(0o620)
    for _ in range(2):
        assert scattered(fresh(SPEC, monkeypatch), 3) == expected(3)
    assert len(compiled) == 2
    (warning,) = warnings(caplog)
    assert "mode 620" in warning


def test_without_a_folder_kernels_are_compiled(tmp_path, compiled, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HPS_NUMBA_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(disk_cache, "_warned", False)
    for _ in range(2):
        assert scattered(fresh(SPEC, monkeypatch), 3) == expected(3)
    assert len(compiled) == 2 and "not kept" in warnings(caplog)[0] and len(warnings(caplog)) == 1


class Refuses:
    """A result of numba's that cannot be written."""

    lifted = ()
    library = SimpleNamespace(has_dynamic_globals=False)

    def _reduce(self):
        return (threading.Lock(),)


@pytest.mark.parametrize(
    "result",
    [
        SimpleNamespace(lifted=(), library=SimpleNamespace(has_dynamic_globals=True)),
        SimpleNamespace(lifted=("loop",), library=SimpleNamespace(has_dynamic_globals=False)),
        Refuses(),
    ],
    ids=["addresses", "lifted", "no pickle"],
)
def test_code_that_means_nothing_elsewhere_is_not_kept(place, caplog, result):
    caplog.set_level(logging.DEBUG, disk_cache.__name__)
    disk_cache.keep_result(disk_cache.name_of("scatter_kernel", "", ".object"), result)
    assert not place.exists() or not list(place.iterdir())
    assert [record.levelno for record in caplog.records] == [logging.DEBUG] and "not kept" in caplog.text
