"""Writers never remove what is not theirs: whatever lies at the target, whenever it came there."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.sample_models import sample, save_model
from support.waiting import HANG_SECONDS, join_all

from hps_numba.errors import ModelFileError, TraceError
from hps_numba.runtime import rename, replacing
from hps_numba.storage.bin_dump import read_bin, write_bin
from hps_numba.storage.model_files import open_model, write_model
from hps_numba.training.checkpoint_files import write_checkpoint

ROWS = [(np.arange(3), np.ones((3, 2), np.float32))]
WRITERS: dict[str, Callable[[Any], object]] = {
    "directory": lambda path: write_model(path, 2, ROWS, format="directory", overwrite=True),
    "hdf5": lambda path: write_model(path, 2, ROWS, format="hdf5", overwrite=True),
    "dump": lambda path: write_bin(path, 8, 2, ROWS, overwrite=True),
    "checkpoint": lambda path: write_checkpoint(Path(path), [], {"note": b"new"}),
}
every_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
both_ways = pytest.mark.parametrize("swaps", [True, False], ids=["swap", "renames"])


@pytest.fixture
def way(swaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rename as Linux does, or as a system that knows plain renames only."""
    if not swaps:
        monkeypatch.setattr(rename, "_system_call", lambda: None)


def snapshot(folder: Path) -> dict[str, Any]:
    """Every entry below a folder: what it is and holds."""
    found: dict[str, Any] = {}
    for entry in sorted(folder.rglob("*")):
        status = entry.lstat()
        kind = stat.S_IFMT(status.st_mode)
        content = entry.read_bytes() if entry.is_file() and not entry.is_symlink() else None
        found[str(entry.relative_to(folder))] = (kind, str(entry.readlink()) if entry.is_symlink() else content)
    return found


def home(folder: Path) -> Path:
    """A directory that somebody would miss."""
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    (folder / "key").write_bytes(bytes(8))
    (folder / "empty").mkdir()
    return folder


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


FOREIGN: dict[str, Callable[[Path], object]] = {
    "home": home,
    "text": lambda path: path.write_text("dear diary"),
    "zip of others": lambda path: with_numpy(path, lambda file: np.savez(file, weights=np.ones(3))),
    "hdf5 of others": lambda path: hdf5_of_others(path),
    "npy": lambda path: with_numpy(path, lambda file: np.save(file, np.ones(3))),
    "fifo": os.mkfifo,
    "socket": a_socket,
    "looped link": lambda path: path.symlink_to(path.name),
    "link to a home": lambda path: path.symlink_to(home(path.with_name("home")).name),
    "link to a text": lambda path: (path.with_name("text").write_text("dear diary"), path.symlink_to("text")),
    "key of ssh": lambda path: (path.mkdir(), (path / "key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----")),
    "model with more": lambda path: (save_model("directory", path, *sample(3, 2)[:2]), (path / "notes").write_text("x")),
    "model with a folder": lambda path: (save_model("directory", path, *sample(3, 2)[:2]), (path / "meta").mkdir()),
    "damaged model": lambda path: (save_model("directory", path, *sample(3, 2)[:2]), os.truncate(path / "key", 23)),
}


def with_numpy(path: Path, save: Callable[[Any], object]) -> None:
    with path.open("wb") as file:
        save(file)


def hdf5_of_others(path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file["measurements"] = np.ones(3)


@both_ways
@every_writer
@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("form", ["absolute", "relative", "link"])
@pytest.mark.usefixtures("way")
def test_what_is_not_ours_stays(
    make: Callable[[Path], object], write: Callable[[Any], object], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    make(folder / "target")
    path = {"absolute": str(folder / "target"), "relative": "target", "link": "link"}[form]
    if form == "link":
        Path("link").symlink_to("target")
    before = snapshot(folder)
    with pytest.raises(ModelFileError, match=r"target|link"):
        write(path)
    assert snapshot(folder) == before


@every_writer
@pytest.mark.parametrize("path", ["", ".", "..", "./", "../work", "sub/..", "/", "//", "/proc", "/dev/null", "/dev/full"])
def test_the_working_directory_and_devices_are_no_targets(
    path: str, write: Callable[[Any], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = home(tmp_path / "work")
    (work / "sub").mkdir()
    monkeypatch.chdir(work)
    before = snapshot(tmp_path)
    with pytest.raises(ModelFileError):
        write(path)
    assert snapshot(tmp_path) == before
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode) and stat.S_ISCHR(Path("/dev/full").stat().st_mode)


@every_writer
def test_an_empty_working_directory_is_no_target(
    write: Callable[[Any], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for path in (".", work, "../work"):
        with pytest.raises(ModelFileError, match=r"is the working directory|expected a file, got a directory"):
            write(path)
    assert Path.cwd() == work and list(tmp_path.iterdir()) == [work]


@both_ways
@every_writer
@pytest.mark.usefixtures("way")
def test_empty_files_and_what_we_wrote_are_replaced(write: Callable[[Any], object], tmp_path: Path) -> None:
    path = tmp_path / "target"
    path.touch()
    for _ in range(3):
        inode = path.stat().st_ino
        write(path)
        assert path.stat().st_ino != inode and [entry.name for entry in tmp_path.iterdir()] == ["target"]


class Interloper:
    """Puts something at the target after it was looked at, right before the given rename."""

    def __init__(self, target: Path, make: Callable[[Path], object]) -> None:
        self.target, self.make, self.done = target, make, False

    def before(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if not self.done:
                self.done = True
                if os.path.lexists(self.target):
                    self.target.rename(self.target.with_name("former"))
                self.make(self.target)
            return original(*arguments)

        return call


@every_writer
@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("had_old", [True, False])
@pytest.mark.parametrize("moment", ["rename_new", "swap"])
def test_what_comes_between_the_check_and_the_rename_stays(
    moment: str,
    had_old: bool,
    make: Callable[[Path], object],
    write: Callable[[Any], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if moment == "swap" and not had_old:
        pytest.skip("nothing to swap")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "target"
    if had_old:
        write(path)
    interloper = Interloper(path, make)
    monkeypatch.setattr(rename, moment, interloper.before(getattr(rename, moment)))
    with pytest.raises(ModelFileError, match=r"not replaced|exists already"):
        write(path)
    assert interloper.done
    found = snapshot(tmp_path)
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    make(tmp_path / "again" / "target")
    expected = snapshot(tmp_path / "again")
    assert {name: entry for name, entry in found.items() if not name.startswith("former")} == expected


def test_what_cannot_be_put_back_is_kept_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, swap, calls = tmp_path / "target", rename.swap, []
    WRITERS["hdf5"](path)

    def once(one: Path, other: Path) -> None:
        calls.append(one)
        if len(calls) > 1:
            raise OSError(5, "Input/output error")
        path.unlink()
        path.write_text("dear diary")
        swap(one, other)

    monkeypatch.setattr(rename, "swap", once)
    with pytest.raises(ModelFileError, match=r"is now at .*hps-partial/new: .*Input/output error"):
        WRITERS["hdf5"](path)
    (workspace,) = replacing.leftovers(path)
    assert (workspace / "new").read_text() == "dear diary"
    monkeypatch.undo()
    WRITERS["hdf5"](path)  # the next writer does not delete it either
    assert (workspace / "new").read_text() == "dear diary"


def test_a_write_without_overwrite_never_replaces_what_came_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "m"

    def chunks() -> Iterator[Any]:
        yield ROWS[0]
        save_model("directory", path, *sample(9, 2)[:2])

    with pytest.raises(ModelFileError, match="exists already"):
        write_model(path, 2, chunks())
    with open_model(path) as model:
        assert model.rows == 9


def test_errors_are_of_the_type_of_the_caller(tmp_path: Path) -> None:
    judge = replacing.file_judge("a trace", lambda head: False)
    (tmp_path / "a").write_text("x")
    for path in (tmp_path / "a", tmp_path, tmp_path / "none" / "a", tmp_path / "a" / "b"):
        with pytest.raises(TraceError), replacing.replacing(path, overwrite=True, judge=judge, error=TraceError):
            pytest.fail("the block was entered")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions bind")
@every_writer
def test_a_read_only_folder(write: Callable[[Any], object], tmp_path: Path) -> None:
    write(tmp_path / "target")
    before = snapshot(tmp_path)
    tmp_path.chmod(0o500)
    try:
        for name in ("target", "other"):
            with pytest.raises(ModelFileError, match=r"cannot be written: .*Permission denied"):
                write(tmp_path / name)
    finally:
        tmp_path.chmod(0o700)
    assert snapshot(tmp_path) == before


# -- workspaces of dead writers -----------------------------------------------------


def workspace_of(path: Path, *entries: str, writer: bytes | None = None) -> Path:
    """As a dead writer leaves it: some of its entries, and a lock that names the writer's machine."""
    workspace = path.with_name(f".{path.name}.x1.hps-partial")
    workspace.mkdir()
    for entry in entries:
        if entry == "old":
            save_model("directory", workspace / "old", *sample(9, 2)[:2])
        else:
            (workspace / entry).write_bytes(b"x" * 1000)
    if writer is not None:
        (workspace / "lock").write_bytes(writer)
    return workspace


@every_writer
@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("entries", [(), ("new",), ("placing",), ("whatever", "new")])
def test_workspaces_are_swept_in_whatever_order_they_were_being_deleted(
    entries: tuple[str, ...], locked: bool, write: Callable[[Any], object], tmp_path: Path
) -> None:
    path = tmp_path / "target"
    workspace_of(path, *entries, writer=replacing._this_machine() if locked else None)
    write(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("locked", [True, False])
def test_an_old_model_goes_back_whether_or_not_there_is_a_lock(locked: bool, tmp_path: Path) -> None:
    path = tmp_path / "target"
    workspace_of(path, "new", "old", writer=b"" if locked else None)
    with pytest.raises(ModelFileError, match="announced"):
        write_model(path, 2, ROWS, rows=4, overwrite=True)
    with open_model(path) as model:
        assert model.rows == 9


def test_a_workspace_of_another_machine_is_swept_after_a_day(tmp_path: Path) -> None:
    path = tmp_path / "target"
    workspace = workspace_of(path, "new", writer=b"another machine")
    WRITERS["dump"](path)
    assert workspace.exists()
    yesterday = workspace.stat().st_mtime - 90_000
    for entry in (*workspace.iterdir(), workspace):
        os.utime(entry, (yesterday, yesterday))
    WRITERS["dump"](path)
    assert not workspace.exists()


def test_a_live_writer_keeps_its_workspace(tmp_path: Path) -> None:
    path = tmp_path / "target"
    writing, go_on = threading.Event(), threading.Event()

    def chunks() -> Iterator[Any]:
        yield ROWS[0]
        writing.set()
        assert go_on.wait(HANG_SECONDS)

    thread = threading.Thread(target=write_bin, args=(path, 8, 2, chunks()), kwargs={"overwrite": True})
    thread.start()
    assert writing.wait(HANG_SECONDS)
    (workspace,) = replacing.leftovers(path)
    for entry in (*workspace.iterdir(), workspace):
        os.utime(entry, (1, 1))
    write_bin(path, 8, 2, [(np.arange(7), np.ones((7, 2), np.float32))])
    assert replacing.leftovers(path) == [workspace]
    go_on.set()
    join_all(thread)
    assert read_bin(path).pairs == 3 and replacing.leftovers(path) == []


_DIES_WHILE_DELETING = """
import os, sys
from hps_numba.storage.model_files import write_model
import numpy as np

left = int(sys.argv[2])
def dying(original):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return original(*arguments, **options)
    return call

for name in ("unlink", "rmdir"):
    setattr(os, name, dying(getattr(os, name)))
write_model(sys.argv[1], 2, [(np.arange(3), np.ones((3, 2), np.float32))], overwrite=True)
os._exit(0)
"""


def test_a_writer_killed_at_any_step_of_its_clean_up_leaves_nothing_for_long(tmp_path: Path) -> None:
    path = save_model("directory", tmp_path / "target", *sample(9, 2)[:2])
    left = set()
    for steps in range(12):
        code = subprocess.run([sys.executable, "-c", _DIES_WHILE_DELETING, path, str(steps)], check=False).returncode
        left |= {entry.name for workspace in replacing.leftovers(path) for entry in workspace.iterdir()}
        with open_model(path) as model:
            assert model.rows == 3
        WRITERS["directory"](path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["target"], steps
        if code == 0:
            break
    assert code == 0 and "new" in left


_KILLED = """
import sys
import numpy as np
from hps_numba.storage.model_files import write_model

rows = [(np.arange(500), np.ones((500, 8), np.float32))]
print("ready", flush=True)
while True:
    write_model(sys.argv[1], 8, rows, overwrite=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal on this system")
@pytest.mark.parametrize("name", ["m", "m.h5"])
def test_writers_killed_at_random_leave_one_whole_model_and_nothing_else(name: str, tmp_path: Path) -> None:
    path, chance = tmp_path / name, np.random.default_rng(0)
    for _ in range(int(os.environ.get("HPS_NUMBA_KILLS", "3"))):
        with subprocess.Popen([sys.executable, "-c", _KILLED, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
            with contextlib.suppress(subprocess.TimeoutExpired):
                writer.wait(chance.uniform(0.02, 0.1))
            writer.kill()
        write_model(path, 8, [(np.arange(2), np.ones((2, 8), np.float32))], overwrite=True)
        assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_swap_and_rename_new(tmp_path: Path) -> None:
    if rename._system_call() is None:
        pytest.skip("this system has no renameat2")
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1")
    home(other)
    try:
        rename.swap(one, other)
    except OSError as problem:
        pytest.skip(f"this file system cannot swap: {problem}")
    assert other.read_text() == "1" and (one / "thesis.tex").exists()
    with pytest.raises(FileExistsError):
        rename.rename_new(other, one)
    rename.rename_new(other, tmp_path / "third")
    with pytest.raises(FileNotFoundError):
        rename.swap(one, other)


def test_reports_replace_reports_only_and_are_written_into_devices(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        replacing.write_report(path, "<!doctype html>new", "<!doctype html", error=TraceError)

    path = tmp_path / "report.html"
    for _ in range(2):
        write(path)
        assert path.read_text() == "<!doctype html>new" and list(tmp_path.iterdir()) == [path]
    for name, content in (("trace.npy", b"\x93NUMPY"), ("ps.json", b"{}"), ("thesis", b"years of work")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TraceError, match="not such a report; it is not replaced"):
            write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    with pytest.raises(TraceError, match="is a directory"):
        write(tmp_path)
    write(Path("/dev/null"))
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    with pytest.raises(TraceError, match="/dev/full: cannot be written: No space left"):
        write(Path("/dev/full"))
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    write(tmp_path / "fifo")
    assert os.read(reader, 100) == b"<!doctype html>new"
    os.close(reader)
