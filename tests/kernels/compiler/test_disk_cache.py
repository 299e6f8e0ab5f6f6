"""Kernels for GPUs on disk, and their launch: files are never trusted and never required; a launch passes what it was given.

No GPU: the compiler and the driver are stood in for.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.processes import ROOT, environment
from support.waiting import HANG_SECONDS

from hps_numba.errors import DeviceError
from hps_numba.kernels.compiler import disk_cache, launch
from hps_numba.kernels.compiler.spec import KernelSpec
from hps_numba.kernels.policies._load import load_policy

SPEC = KernelSpec(name="erase_kernel", dim=4, policy=load_policy("lru"))
CHIP = (9, 0)
PTX = ".visible .entry erase_symbol("
CUBIN = b"\x7fELF\n machine code \0\n of a kernel"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of kernels of a process that has not warned yet."""
    monkeypatch.setenv("HPS_NUMBA_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(disk_cache, "_warned", False)
    return tmp_path / "kept" / "cuda"


@pytest.fixture
def compiler(monkeypatch):
    """Counts compilations."""
    made = []
    monkeypatch.setattr(launch, "ptx_of", lambda spec, chip: made.append((spec, chip)) or PTX)
    monkeypatch.setattr(launch, "link", lambda ptx, chip, registers: CUBIN)
    return made


def files(place):
    return sorted(file.name for file in place.iterdir())


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# -- found again ------------------------------------------------------------------------------------


def test_a_kernel_is_compiled_once_and_then_found(place, compiler, caplog):
    assert launch.cubin_of(SPEC, CHIP) == (CUBIN, "erase_symbol")
    assert launch.cubin_of(SPEC, CHIP) == (CUBIN, "erase_symbol")
    assert compiler == [(SPEC, CHIP)]
    assert len(files(place)) == 1 and not warnings(caplog)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "dump_kernel"},
        {"dim": 5},
        {"policy": load_policy("lfu")},
        {"fixed": True},
        {"row_type": "int8"},
        {"out_type": "float16"},
        {"key_form": "uint32"},
        {"out_vector": False},
        {"lanes": 4},
        {"group": 16},
        {"depth": 4},
        {"registers": 40},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_of_a_spec_has_a_file_of_its_own(place, compiler, change):
    launch.cubin_of(SPEC, CHIP)
    fields = {name: getattr(SPEC, name) for name in SPEC.__dataclass_fields__}
    launch.cubin_of(KernelSpec(**{**fields, **change}), CHIP)
    assert len(compiler) == len(files(place)) == 2


def test_every_chip_has_a_file_of_its_own(place, compiler):
    launch.cubin_of(SPEC, (9, 0))
    launch.cubin_of(SPEC, (8, 0))
    assert len(compiler) == len(files(place)) == 2


def test_a_change_of_any_kernel_source_recompiles(place, compiler, monkeypatch):
    launch.cubin_of(SPEC, CHIP)
    monkeypatch.setattr(disk_cache, "source_digest", lambda: "0" * 16)
    launch.cubin_of(SPEC, CHIP)
    assert len(compiler) == 2


def test_the_digest_sees_sources_layouts_and_versions(monkeypatch):
    def digest():
        return disk_cache.source_digest.__wrapped__()

    before = digest()
    assert before == digest() == disk_cache.source_digest()
    read = disk_cache.Path.read_bytes
    files = {*(ROOT / "hps_numba" / "kernels").rglob("*.py")}
    assert {"compiler", "policies", "simt", "layouts", "cache", "host"} <= {file.parent.name for file in files}
    for changed in files:
        with monkeypatch.context() as patch:
            patch.setattr(disk_cache.Path, "read_bytes", lambda file, changed=changed: read(file) + b"#" * (file == changed))
            assert digest() != before, changed
    monkeypatch.setattr(disk_cache.importlib.metadata, "version", lambda name: "0.0")
    assert digest() != before


@pytest.mark.skipif(os.name == "nt", reason="modes of files are those of POSIX")
def test_folder_and_files_are_the_users_own(place, compiler):
    place.mkdir(parents=True, mode=0o755)
    launch.cubin_of(SPEC, CHIP)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert [stat.S_IMODE(file.stat().st_mode) for file in place.iterdir()] == [0o600]


# -- not trusted ------------------------------------------------------------------------------------


def cut(data):
    return data[:-5]


def swapped_bit(data):
    return data[:-1] + bytes([data[-1] ^ 1])


DAMAGES = {"empty": lambda data: b"", "garbage": lambda data: b"garbage" * 99, "cut": cut, "bit": swapped_bit}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_replaced_with_one_warning(place, compiler, caplog, damage):
    launch.cubin_of(SPEC, CHIP)
    (file,) = place.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    for _ in range(3):
        assert launch.cubin_of(SPEC, CHIP) == (CUBIN, "erase_symbol")
    assert file.read_bytes() == good and len(compiler) == 2
    (warning,) = warnings(caplog)
    assert file.name in warning and "compiled again" in warning


def test_the_file_of_another_kernel_is_not_taken_for_it(place, compiler, caplog):
    launch.cubin_of(SPEC, (8, 0))
    (other,) = place.iterdir()
    launch.cubin_of(SPEC, CHIP)
    (own,) = set(place.iterdir()) - {other}
    own.write_bytes(other.read_bytes())
    launch.cubin_of(SPEC, CHIP)
    assert len(compiler) == 3 and len(warnings(caplog)) == 1
    assert own.read_bytes() != other.read_bytes()


def test_a_folder_instead_of_a_file_is_no_error(place, compiler, caplog):
    launch.cubin_of(SPEC, CHIP)
    (file,) = place.iterdir()
    file.unlink()
    file.mkdir()
    assert launch.cubin_of(SPEC, CHIP) == (CUBIN, "erase_symbol")
    assert "cannot be read" in warnings(caplog)[0]
    assert files(place) == [file.name]  # nothing is left of the attempt to write


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")
def test_code_of_another_user_is_not_run(place, compiler, caplog, monkeypatch):
    launch.cubin_of(SPEC, CHIP)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    launch.cubin_of(SPEC, CHIP)
    assert len(compiler) == 2
    assert "expected a folder of user" in warnings(caplog)[0]


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")
@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_could_have_written_is_not_run(place, compiler, caplog, mode):
    launch.cubin_of(SPEC, CHIP)
    (file,) = place.iterdir()
    file.chmod(mode)
    for _ in range(2):
        assert launch.cubin_of(SPEC, CHIP) == (CUBIN, "erase_symbol")
    assert len(compiler) == 2 and stat.S_IMODE(file.stat().st_mode) == 0o600
    (warning,) = warnings(caplog)
    assert "cannot be read, compiled again" in warning and f"mode {mode:o}" in warning


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")
def test_a_file_of_another_user_in_the_folder_is_not_run(place, compiler, caplog, monkeypatch):
    launch.cubin_of(SPEC, CHIP)
    real = os.fstat

    def of_the_next_user(opened):
        status = list(real(opened))
        status[stat.ST_UID] += 1
        return os.stat_result(status)

    monkeypatch.setattr(disk_cache.os, "fstat", of_the_next_user)
    launch.cubin_of(SPEC, CHIP)
    assert len(compiler) == 2 and f"user {os.getuid() + 1}" in warnings(caplog)[0]


# -- not required -----------------------------------------------------------------------------------


def test_without_a_writable_folder_there_is_one_warning(tmp_path, monkeypatch, compiler, caplog):
    monkeypatch.setattr(disk_cache, "_warned", False)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HPS_NUMBA_CACHE_DIR", str(tmp_path / "file"))
    for _ in range(3):
        assert launch.cubin_of(SPEC, CHIP) == (CUBIN, "erase_symbol")
    assert len(compiler) == 3
    (warning,) = warnings(caplog)
    assert "not kept" in warning and "HPS_NUMBA_CACHE_DIR" in warning


def test_a_full_disk_leaves_nothing_behind(place, compiler, caplog, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk_cache.Path, "replace", full)
    assert launch.cubin_of(SPEC, CHIP) == (CUBIN, "erase_symbol")
    assert files(place) == []
    assert os.strerror(errno.ENOSPC) in warnings(caplog)[0]


# -- piling up --------------------------------------------------------------------------------------


def test_files_of_older_sources_go_when_many_pile_up(place, compiler, monkeypatch):
    launch.cubin_of(SPEC, CHIP)
    (own,) = files(place)
    monkeypatch.setattr(disk_cache, "MAX_FILES", 5)
    for i in range(4):
        (place / f"erase_kernel-{i:016}-{i:032}.cubin").write_bytes(b"old")
    (place / "kept.txt").write_text("of somebody else")
    launch.cubin_of(SPEC, (8, 0))
    assert len(files(place)) == 3
    assert own in files(place) and "kept.txt" in files(place)


def test_few_old_files_stay(place, compiler):
    launch.cubin_of(SPEC, CHIP)
    old = place / f"erase_kernel-{0:016}-{0:032}.cubin"
    old.write_bytes(b"old")
    launch.cubin_of(SPEC, (8, 0))
    assert old.exists()


def test_what_a_dead_writer_left_goes_and_what_is_being_written_stays(place, compiler, monkeypatch):
    launch.cubin_of(SPEC, CHIP)
    monkeypatch.setattr(disk_cache, "MAX_FILES", 2)
    left, fresh = place / "tmpa.part", place / "tmpb.part"
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    fresh.write_bytes(b"half")
    launch.cubin_of(SPEC, (8, 0))
    assert not left.exists() and fresh.exists()


# -- many at once -----------------------------------------------------------------------------------

PROGRAM = """
import hashlib, sys
from hps_numba.kernels.compiler import disk_cache
disk_cache.MAX_FILES = 4
def code(i, n):
    return hashlib.sha256(b"%d" % i).digest() * n, f"symbol{i}"
seen = 0
for turn in range(150):
    i = turn % 5
    name = disk_cache.name_of("erase_kernel", str(i))
    kept = disk_cache.find(name)
    if kept is not None:
        assert kept == code(i, 2000), name
        seen += 1
    if turn % 3 == int(sys.argv[1]) % 3:
        disk_cache.keep(name, *code(i, 2000))
print(seen)
"""


def test_processes_that_write_and_read_the_same_files_see_whole_ones(tmp_path):
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM, str(i)],
            env=environment(HPS_NUMBA_CACHE_DIR=str(tmp_path)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(4)
    ]
    done = [process.communicate(timeout=HANG_SECONDS) for process in running]
    assert [process.returncode for process in running] == [0] * 4, done
    assert all(errors == "" and int(seen) > 50 for seen, errors in done), done
    assert len(files(tmp_path / "cuda")) == 5


def test_threads_that_ask_for_one_kernel_get_one(place, monkeypatch, driver):
    made = []
    gate = threading.Barrier(4)
    monkeypatch.setattr(launch, "ptx_of", lambda spec, chip: made.append(spec) or PTX)
    monkeypatch.setattr(launch, "link", lambda ptx, chip, registers: CUBIN)
    monkeypatch.setattr(launch, "_loaded", {})
    got = []

    def ask():
        gate.wait(HANG_SECONDS)
        got.append(launch.load(SPEC, 0, CHIP))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, got))) == 1 and len(got) == 4 and len(made) == 1
    assert launch.load(SPEC, 1, CHIP) is not got[0] and len(made) == 1  # another device loads the same file


# -- launch -----------------------------------------------------------------------------------------


class Result(int):
    """What the driver answers."""

    name = "CUDA_ERROR_INVALID_VALUE"


@pytest.fixture
def driver(monkeypatch):
    """A driver that notes launches: (blocks, threads, stream, values read as the device would)."""
    launches, starts = [], []
    fine = Result(0)

    def cu_launch(config, function, pointers, extra):
        *shape, shared, stream, attributes, count = struct.unpack("@7I4xQQI4x", ctypes.string_at(config, 56))[:10]
        blocks, threads = shape[0], shape[3]
        assert (shape[1:3], shape[4:], shared, function, extra) == ([1, 1], [1, 1], 0, 78, None)
        early = count == 1 and struct.unpack("@I4xi", ctypes.string_at(attributes, 12)) == (6, 1)
        assert early or (attributes, count) == (0, 0)
        if blocks == 0:
            return 1
        addresses = (ctypes.c_void_p * 3).from_address(pointers)
        kinds = (ctypes.c_int64, ctypes.c_float, ctypes.c_int64)
        launches.append((blocks, threads, stream, *(kind.from_address(at).value for kind, at in zip(kinds, addresses))))
        starts.append(early)
        return 0

    made = SimpleNamespace(
        cuLibraryLoadData=lambda code, *rest: (Result(code == b"bad"), 77),
        cuLibraryGetKernel=lambda library, symbol: (fine, 78),
        cuKernelGetFunction=lambda kernel: (fine, 79),
        cuFuncGetAttribute=lambda what, function: (fine, 40),
        CUfunction_attribute=SimpleNamespace(CU_FUNC_ATTRIBUTE_NUM_REGS=4),
        CUresult=Result,
        launches=launches,
        starts=starts,
    )
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", made)
    monkeypatch.setattr(launch.importlib, "import_module", lambda name: made)
    monkeypatch.setattr(launch, "_launch_function", lambda: cu_launch)
    return made


def test_a_launch_passes_values_as_they_are(driver):
    kernel = launch.LoadedKernel(CUBIN, "symbol", "qfq")
    kernel.launch(3, 11, 2**63 - 1, np.float32(0.1), -(2**63), threads=128)
    kernel.launch(4, 12, np.int64(-5), 0.5, 7)
    assert driver.launches == [
        (3, 128, 11, 2**63 - 1, float(np.float32(0.1)), -(2**63)),
        (4, launch.THREADS, 12, -5, 0.5, 7),
    ]
    assert kernel.registers == 40


def test_a_kernel_that_may_start_early_says_so(driver):
    launch.LoadedKernel(CUBIN, "symbol", "qfq", pdl=True).launch(1, 0, 1, 1.0, 1)
    launch.LoadedKernel(CUBIN, "symbol", "qfq").launch(1, 0, 1, 1.0, 1)
    assert driver.starts == [True, False]


def test_threads_do_not_share_the_memory_of_arguments(driver):
    kernel = launch.LoadedKernel(CUBIN, "symbol", "qfq")

    def work(me):
        for i in range(500):
            kernel.launch(1, me, me * 1000 + i, me / 4, i)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.launches) == 2000
    assert all(a == me * 1000 + i and f == me / 4 for _, _, me, a, f, i in driver.launches)


def test_what_the_driver_refuses_is_a_device_error(driver):
    with pytest.raises(DeviceError, match="loading symbol: CUDA_ERROR_INVALID_VALUE"):
        launch.LoadedKernel(b"bad", "symbol", "q")
    kernel = launch.LoadedKernel(CUBIN, "symbol", "qfq")
    with pytest.raises(DeviceError, match="launch of symbol in 0 blocks of 256: CUDA_ERROR_INVALID_VALUE"):
        kernel.launch(0, 0, 1, 1.0, 1)


@pytest.mark.parametrize("args", [(1, 1.0), (1, 1.0, 1, 1), (1.5, 1.0, 1), (2**63, 1.0, 1)])
def test_wrong_arguments_start_nothing(driver, args):
    kernel = launch.LoadedKernel(CUBIN, "symbol", "qfq")
    with pytest.raises(launch.struct.error):
        kernel.launch(1, 0, *args)
    assert driver.launches == []


# -- where ------------------------------------------------------------------------------------------


def test_the_folder_is_that_of_the_variable_else_of_the_systems_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HPS_NUMBA_CACHE_DIR", str(tmp_path / "ours"))
    assert disk_cache.user_cache() == tmp_path / "ours"
    monkeypatch.delenv("HPS_NUMBA_CACHE_DIR")
    assert disk_cache.user_cache().name == "hps_numba"
    if sys.platform == "linux":
        assert disk_cache.user_cache() == tmp_path / "xdg" / "hps_numba"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert disk_cache.user_cache() == tmp_path / ".cache" / "hps_numba"


def test_without_a_home_there_is_no_cache_folder(monkeypatch):
    monkeypatch.delenv("HPS_NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *args, **kwargs: Path("~/.cache/hps_numba"))
    with pytest.raises(RuntimeError, match="there is no home directory"):
        disk_cache.user_cache()


# -- what others could have put there ----------------------------------------------------------------

posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")


@posix
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
@pytest.mark.parametrize("ending", [".cubin", ".object"])
def test_a_folder_that_others_can_write_is_not_used(tmp_path, monkeypatch, caplog, ending, mode):
    monkeypatch.setenv("HPS_NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(disk_cache, "_warned", False)
    name = disk_cache.name_of("erase_kernel", "", ending)
    disk_cache.keep(name, b"code", "symbol")
    inside = tmp_path / disk_cache.FOLDERS[ending]
    inside.chmod(mode)
    for _ in range(2):
        assert disk_cache.find(name) is None and disk_cache.folder(ending) is None
    assert stat.S_IMODE(inside.stat().st_mode) == mode
    (warning,) = warnings(caplog)
    assert str(inside) in warning and f"mode {mode:o}" in warning and "chmod go-w" in warning
    inside.chmod(0o700)
    assert disk_cache.find(name) == (b"code", "symbol")


@posix
@pytest.mark.parametrize("mode", [0o757, 0o777])
def test_no_folder_above_may_be_replaced_by_others(tmp_path, monkeypatch, caplog, mode):
    monkeypatch.setenv("HPS_NUMBA_CACHE_DIR", str(tmp_path / "open" / "between" / "kept"))
    monkeypatch.setattr(disk_cache, "_warned", False)
    (tmp_path / "open" / "between").mkdir(parents=True)
    (tmp_path / "open").chmod(mode)
    assert disk_cache.folder() is None
    (warning,) = warnings(caplog)
    assert f"{tmp_path / 'open'}: expected" in warning and f"mode {mode:o}" in warning
    (tmp_path / "open").chmod(0o1777)  # as /tmp: others cannot replace what is not theirs
    assert disk_cache.folder() is not None


@posix
def test_a_folder_of_the_users_own_group_is_used(tmp_path, monkeypatch):
    import grp
    import pwd

    user = pwd.getpwuid(os.getuid())
    monkeypatch.setenv("HPS_NUMBA_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(disk_cache, "_warned", False)
    tmp_path.chmod(0o770)
    members = []
    monkeypatch.setattr(grp, "getgrgid", lambda number: SimpleNamespace(gr_name=user.pw_name, gr_mem=members))
    monkeypatch.setattr(pwd, "getpwuid", lambda number: SimpleNamespace(pw_name=user.pw_name, pw_gid=tmp_path.stat().st_gid))
    assert disk_cache.folder() is not None
    members.append("somebody else")
    assert disk_cache.folder() is None


@posix
def test_a_folder_of_another_user_above_is_not_used(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HPS_NUMBA_CACHE_DIR", str(tmp_path / "theirs" / "kept"))
    monkeypatch.setattr(disk_cache, "_warned", False)
    (tmp_path / "theirs").mkdir()
    real = Path.stat

    def status(path, **how):
        found = list(real(path, **how))
        if path == tmp_path / "theirs":
            found[stat.ST_UID] = 4321
        return os.stat_result(found)

    monkeypatch.setattr(disk_cache.Path, "stat", status)
    assert disk_cache.folder() is None
    assert (
        f"{tmp_path / 'theirs'}: expected a folder of user {os.getuid()} or of root, got one of user 4321"
        in warnings(caplog)[0]
    )


@posix
def test_links_are_neither_followed_nor_replaced(place, compiler, caplog, tmp_path):
    launch.cubin_of(SPEC, CHIP)
    (file,) = place.iterdir()
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    assert launch.cubin_of(SPEC, CHIP) == (CUBIN, "erase_symbol") and len(compiler) == 2
    assert file.is_symlink() and elsewhere.read_bytes() == before
    assert "cannot be read, compiled again" in warnings(caplog)[0]
    file.unlink()
    place.rename(tmp_path / "moved")
    place.symlink_to(tmp_path / "moved")
    disk_cache._warned = False
    assert disk_cache.folder() is None
    assert f"{place}: expected a folder, got a link" in warnings(caplog)[-1]


@posix
def test_the_folder_of_the_cache_itself_may_be_a_link(tmp_path, monkeypatch, compiler):
    (tmp_path / "large disk").mkdir(mode=0o700)
    (tmp_path / "kept").symlink_to(tmp_path / "large disk")
    monkeypatch.setenv("HPS_NUMBA_CACHE_DIR", str(tmp_path / "kept"))
    for _ in range(2):
        launch.cubin_of(SPEC, CHIP)
    assert len(compiler) == 1


@posix
def test_a_pipe_instead_of_a_file_is_not_waited_for(place, compiler, caplog):
    launch.cubin_of(SPEC, CHIP)
    (file,) = place.iterdir()
    file.unlink()
    os.mkfifo(file, 0o600)
    assert launch.cubin_of(SPEC, CHIP) == (CUBIN, "erase_symbol")
    assert stat.S_ISFIFO(file.lstat().st_mode) and "cannot be read" in warnings(caplog)[0]


@posix
def test_folders_are_made_for_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HPS_NUMBA_CACHE_DIR", str(tmp_path / "kept"))
    before = os.umask(0)
    try:
        assert disk_cache.folder() == tmp_path / "kept" / "cuda"
    finally:
        os.umask(before)
    assert [stat.S_IMODE(made.stat().st_mode) for made in (tmp_path / "kept", tmp_path / "kept" / "cuda")] == [0o700] * 2


@pytest.mark.parametrize("ending", [".cubin", ".object"])
def test_one_changed_bit_anywhere_makes_a_file_useless(place, caplog, ending):
    name = disk_cache.name_of("erase_kernel", "", ending)
    disk_cache.keep(name, bytes(range(256)), "symbol")
    (file,) = (place.parent / disk_cache.FOLDERS[ending]).iterdir()
    good = file.read_bytes()
    for offset in range(len(good)):
        for bit in (0, 5, 7):
            file.write_bytes(good[:offset] + bytes([good[offset] ^ 1 << bit]) + good[offset + 1 :])
            assert disk_cache.find(name) is None, offset
    for longer in (good + b"\0", good[:-1], b"\0" + good, good + good):
        file.write_bytes(longer)
        assert disk_cache.find(name) is None
    file.write_bytes(good)
    assert disk_cache.find(name) == (bytes(range(256)), "symbol")


def test_files_of_somebody_else_stay_when_many_pile_up(place, compiler, monkeypatch):
    launch.cubin_of(SPEC, CHIP)
    monkeypatch.setattr(disk_cache, "MAX_FILES", 1)
    theirs = ["scene.object", "net.cubin", "a-b-c.object", "download.part"]
    for name in theirs:
        (place / name).write_bytes(b"of somebody else")
        os.utime(place / name, (1, 1))
    launch.cubin_of(SPEC, (8, 0))
    assert set(theirs) < set(files(place))
