"""Writing and converting sparse models: whole or not at all, also when the writer is killed (rows F01, F02, F15, file side)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.sample_models import FORMATS, part, path_for, sample, save_model

from hps_numba.errors import KeyDtypeError, ModelFileError
from hps_numba.runtime import rename
from hps_numba.storage.model_files import convert_model, open_model, write_model

WRITABLE = [name for name in FORMATS if part(name).can_write]
every_writer = pytest.mark.parametrize("name", WRITABLE)


def contents(path: Path, dim: int | None = None) -> tuple[list[int], bytes, list[int] | None]:
    with open_model(path, dim) as model:
        keys, rows = np.empty(model.rows, np.int64), np.empty((model.rows, model.dim), np.float32)
        model.read(0, model.rows, keys, rows)
        return keys.tolist(), rows.tobytes(), model.read_meta(0, model.rows).tolist() if model.has_meta else None


def hidden(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.name.startswith(".")]


def in_chunks(*arrays: np.ndarray, step: int) -> Iterator[tuple[np.ndarray, ...]]:
    for start in range(0, len(arrays[0]), step):
        yield tuple(array[start : start + step] for array in arrays)


@every_writer
@pytest.mark.parametrize("with_meta", [False, True])
@pytest.mark.parametrize("step", [1, 7, 100])
def test_write_and_read_back(name: str, with_meta: bool, step: int, tmp_path: Path) -> None:
    keys, rows, meta = sample(50, 3)
    path = path_for(tmp_path, name)
    arrays = (keys, rows, meta) if with_meta else (keys, rows)
    assert write_model(path, 3, in_chunks(*arrays, step=step)) == 50
    assert contents(path) == (keys.tolist(), rows.tobytes(), meta.tolist() if with_meta else None)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("file_name", "name"),
    [("a", "directory"), ("a.model", "directory"), ("a.h5", "hdf5"), ("a.HDF5", "hdf5"), ("A.b.h5", "hdf5")],
)
def test_the_name_decides_the_format(file_name: str, name: str, tmp_path: Path) -> None:
    write_model(tmp_path / file_name, 2, [([1], np.ones((1, 2)))])
    assert part(name).detect(tmp_path / file_name)
    write_model(tmp_path / "b.v2", 2, [([1], np.ones((1, 2)))], format=name)
    assert part(name).detect(tmp_path / "b.v2")


def test_names_and_formats_that_cannot_be_written(tmp_path: Path) -> None:
    for suffix, format, expected in (
        (".xyz", None, r"expected a suffix of directory \(no suffix, .model\), hdf5 \(.h5, .hdf5\) or format=, got '\.xyz'"),
        (".npz", None, r"expected a format that can write \(directory .*, got npz"),
        (".h5", "parquet", r"expected a format that can write \(directory .*, got parquet"),
        (".h5", "hdf6", "'hdf6' is unknown, known are .*; did you mean 'hdf5'"),
    ):
        with pytest.raises(ModelFileError, match=expected):
            write_model(tmp_path / f"a{suffix}", 2, [], format=format)
    with pytest.raises(ModelFileError, match="there is no directory"):
        write_model(tmp_path / "none" / "a.model", 2, [])
    with pytest.raises(ValueError, match="dim: expected at least 1, got 0"):
        write_model(tmp_path / "a.model", 0, [])
    assert list(tmp_path.iterdir()) == []


def good() -> tuple[np.ndarray, np.ndarray]:
    return np.arange(3), np.ones((3, 2), np.float32)


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [
        ((np.arange(3),), r"chunk 1: expected \(keys, rows\) or \(keys, rows, meta\), got 1 parts"),
        ((np.arange(3.0), np.ones((3, 2))), "chunk 1: keys: expected integers, got float64"),
        ((np.ones((3, 1), int), np.ones((3, 2))), r"chunk 1: keys: expected one dimension, got shape \[3, 1\]"),
        ((np.array([2**63], np.uint64), np.ones((1, 2))), f"chunk 1: keys holds {2**63}, which does not fit int64"),
        ((np.arange(3), np.ones((3, 2), int)), "chunk 1: rows: expected float32, got int64"),
        ((np.arange(3), np.ones((3, 3))), r"chunk 1: rows: expected shape \[3, 2\], got \[3, 3\]"),
        ((np.arange(3), np.ones((2, 2))), r"chunk 1: rows: expected shape \[3, 2\], got \[2, 2\]"),
        ((np.arange(3), np.full((3, 2), 1e39)), "chunk 1: rows holds a float64 value beyond"),
        ((*good(), np.arange(3)), "chunk 1: expected meta in all chunks or none, got one with"),
        ((*good(), np.arange(2)), "chunk 1: meta: expected 3 elements, as many as keys, got 2"),
        ((*good(), np.ones(3)), "chunk 1: meta: expected integers, got float64"),
    ],
)
@every_writer
def test_chunks_that_do_not_fit_leave_nothing(name: str, chunk: tuple[Any, ...], expected: str, tmp_path: Path) -> None:
    path = path_for(tmp_path, name)
    with pytest.raises((ModelFileError, KeyDtypeError), match=expected) as caught:
        write_model(path, 2, [good(), chunk])
    assert isinstance(caught.value, KeyDtypeError) == ("integers" in str(caught.value))
    assert list(tmp_path.iterdir()) == []


def test_other_integers_and_floats_are_converted(tmp_path: Path) -> None:
    rows = np.array([[0.1, 2.0]])
    write_model(tmp_path / "a", 2, [(np.array([7], np.uint8), rows), ([8], rows.astype(np.float16))])
    expected = np.concatenate([rows.astype(np.float32), rows.astype(np.float16).astype(np.float32)])
    assert contents(tmp_path / "a") == ([7, 8], expected.tobytes(), None)
    write_model(tmp_path / "b", 2, [(np.arange(6)[::2], np.ones((2, 3), np.float32).T)])
    assert contents(tmp_path / "b")[0] == [0, 2, 4]


@every_writer
def test_announced_rows_and_progress(name: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_model(path_for(tmp_path, name, "a"), 2, [good()] * 3, rows=9, on_progress=lambda *at: seen.append(at))
    write_model(path_for(tmp_path, name, "b"), 2, [good()] * 2, on_progress=lambda *at: seen.append(at))
    assert seen == [(3, 9), (6, 9), (9, 9), (3, 3), (6, 6)]
    for rows, expected in (
        (8, "expected 8 rows, as announced, got 9 up to chunk 2"),
        (10, "expected 10 rows, as announced, got 9$"),
    ):
        with pytest.raises(ModelFileError, match=expected):
            write_model(path_for(tmp_path, name, "c"), 2, [good()] * 3, rows=rows)
    assert not path_for(tmp_path, name, "c").exists() and hidden(tmp_path) == []


@every_writer
def test_no_chunks_are_an_empty_table(name: str, tmp_path: Path) -> None:
    path = path_for(tmp_path, name)
    assert write_model(path, 4, []) == 0
    with open_model(path, 4) as model:
        assert (model.rows, model.dim, model.has_meta) == (0, 4, False)


@every_writer
def test_an_error_of_the_caller_passes_and_the_old_model_stays(name: str, tmp_path: Path) -> None:
    path = save_model(name, path_for(tmp_path, name), *sample(9, 2)[:2])
    before = contents(path)

    def broken() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield good()
        raise ZeroDivisionError("of the caller")

    with pytest.raises(ZeroDivisionError, match="of the caller"):
        write_model(path, 2, broken(), overwrite=True)
    assert contents(path) == before and hidden(tmp_path) == []


@pytest.mark.parametrize("old", WRITABLE)
@every_writer
def test_overwrite(name: str, old: str, tmp_path: Path) -> None:
    path = save_model(old, tmp_path / "table", *sample(9, 2))
    before = contents(path)
    with pytest.raises(ModelFileError, match="exists already; pass overwrite=True"):
        write_model(path, 2, [good()], format=name)
    assert contents(path) == before
    assert write_model(path, 2, [good()], format=name, overwrite=True) == 3
    assert contents(path)[0] == [0, 1, 2] and contents(path)[2] is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["table"]


def test_a_reader_keeps_the_model_it_opened(tmp_path: Path) -> None:
    path = save_model("directory", tmp_path / "t.model", *sample(9, 2)[:2])
    expected = contents(path)[1]
    with open_model(path) as model:
        write_model(path, 2, [good()] * 3, overwrite=True)
        rows = np.empty((9, 2), np.float32)
        model.read(0, 9, None, rows)
    assert rows.tobytes() == expected != contents(path)[1]


def test_overwrite_through_a_link_replaces_what_it_points_to(tmp_path: Path) -> None:
    save_model("directory", tmp_path / "v1", *sample(9, 2)[:2])
    (tmp_path / "now").symlink_to("v1")
    write_model(tmp_path / "now", 2, [good()], overwrite=True)
    assert (tmp_path / "now").is_symlink() and contents(tmp_path / "v1")[0] == [0, 1, 2]


def test_a_directory_that_is_more_than_a_model_is_never_replaced(tmp_path: Path) -> None:
    path = save_model("directory", tmp_path / "t.model", *sample(9, 2)[:2])
    (path / "thesis.tex").write_text("x")
    with pytest.raises(ModelFileError, match=r"holds 'thesis.tex', which is not part of a sparse model"):
        write_model(path, 2, [good()], overwrite=True)
    (path / "thesis.tex").unlink()
    (path / "meta").mkdir()
    with pytest.raises(ModelFileError, match="holds 'meta'"):
        write_model(path, 2, [good()], overwrite=True)


def run(script: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, **options)


_SLOW_WRITER = """
import sys, time
import numpy as np
from hps_numba.storage.model_files import write_model

def chunks():
    while True:
        yield np.arange(1000), np.ones((1000, 8), np.float32)
        time.sleep(0.001)

def progress(done, total):
    if done == 5000:
        print("writing", flush=True)

write_model(sys.argv[1], 8, chunks(), overwrite=True, on_progress=progress)
"""


@every_writer
@pytest.mark.parametrize("had_old", [False, True])
def test_a_killed_writer_leaves_the_old_model_or_none(name: str, had_old: bool, tmp_path: Path) -> None:
    path = path_for(tmp_path, name)
    if had_old:
        save_model(name, path, *sample(9, 8)[:2])
        before = contents(path)
    with subprocess.Popen([sys.executable, "-c", _SLOW_WRITER, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
        (workspace,) = hidden(tmp_path)
        convert_or_write(path, tmp_path)  # another writer leaves the workspace of a live one alone
        assert workspace.exists()
        os.kill(writer.pid, signal.SIGKILL)
    assert hidden(tmp_path) == [workspace] and workspace.name.endswith(".hps-partial")
    if had_old:
        assert contents(path) == before
    else:
        with pytest.raises(ModelFileError, match=r"no such file or directory$"):
            open_model(path)
    write_model(path, 2, [good()], overwrite=True)
    assert contents(path)[0] == [0, 1, 2] and hidden(tmp_path) == []


def convert_or_write(path: Path, folder: Path) -> None:
    """A write to the same name that fails late, so that it changes nothing."""
    with pytest.raises(ModelFileError, match="announced"):
        write_model(path, 2, [good()], rows=4, overwrite=True)


_DIES_AT_RENAME = """
import os, sys
from pathlib import Path
import numpy as np
from hps_numba.runtime import rename
from hps_numba.storage.model_files import write_model

rename._system_call = lambda: None  # a file system that cannot swap

left = int(sys.argv[2])
def dying(original):
    def rename(self, target):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return original(self, target)
    return rename

Path.rename, Path.replace = dying(Path.rename), dying(Path.replace)
write_model(sys.argv[1], 2, [(np.arange(3), np.ones((3, 2), np.float32))], overwrite=True)
os._exit(0)
"""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_crash_between_the_renames_of_a_directory(renames: int, tmp_path: Path) -> None:
    path = save_model("directory", tmp_path / "t.model", *sample(9, 2)[:2])
    before = contents(path)
    assert run(_DIES_AT_RENAME, path, renames).returncode == (0 if renames == 2 else 9)
    if renames == 0:
        assert contents(path) == before
    elif renames == 2:
        assert contents(path)[0] == [0, 1, 2]
    else:
        with pytest.raises(ModelFileError, match=r"an interrupted overwrite left the old one at .*hps-partial/old"):
            open_model(path)
        with pytest.raises(ModelFileError, match="exists already"):  # the next writer puts it back
            write_model(path, 2, [good()])
        assert contents(path) == before
    write_model(path, 2, [good()], overwrite=True)
    assert hidden(tmp_path) == []


def test_a_rename_that_fails_restores_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model("directory", tmp_path / "t.model", *sample(9, 2)[:2])
    before = contents(path)

    monkeypatch.setattr(rename, "_system_call", lambda: None)  # a file system that cannot swap

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ModelFileError, match=r"cannot be written: .*No space left"):
        write_model(path, 2, [good()], overwrite=True)
    assert contents(path) == before and hidden(tmp_path) == []


def test_an_old_model_that_cannot_be_restored_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model("directory", tmp_path / "t.model", *sample(9, 2)[:2])
    before = contents(path)
    original = Path.rename

    def only_away(self: Path, target: Path) -> Path:
        if self != path:
            raise OSError(5, "Input/output error")
        return original(self, target)

    monkeypatch.setattr(rename, "_system_call", lambda: None)  # a file system that cannot swap
    monkeypatch.setattr(Path, "rename", only_away)
    monkeypatch.setattr(Path, "replace", only_away)
    with pytest.raises(ModelFileError, match=r"cannot be written: .*Input/output error"):
        write_model(path, 2, [good()], overwrite=True)
    monkeypatch.undo()
    (workspace,) = hidden(tmp_path)
    assert contents(workspace / "old") == before
    with pytest.raises(ModelFileError, match="an interrupted overwrite left the old one at"):
        open_model(path)


_FULL_DISK = """
import resource, signal, sys
import numpy as np
from hps_numba.errors import ModelFileError
from hps_numba.storage.model_files import write_model

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    write_model(sys.argv[1], 64, [(np.arange(10_000), np.ones((10_000, 64), np.float32))] * 3)
except ModelFileError as problem:
    print(problem)
"""


@every_writer
@pytest.mark.parametrize("limit", [0, 1000, 100_000, 2_000_000, 7_600_000])
def test_a_full_disk_leaves_nothing(name: str, limit: int, tmp_path: Path) -> None:
    result = run(_FULL_DISK, path_for(tmp_path, name), limit)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"{path_for(tmp_path, name)}: cannot be written" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_another_writer_replaced_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = path_for(tmp_path, "directory")
    write_model(path, 2, [(np.arange(3), np.zeros((3, 2), np.float32))])
    listing = Path.iterdir

    def gone(self: Path) -> Any:
        if self == path:
            self.rename(tmp_path / "elsewhere")
        return listing(self)

    with monkeypatch.context() as other:
        other.setattr(Path, "iterdir", gone)
        assert write_model(path, 2, [(np.arange(5), np.ones((5, 2), np.float32))], overwrite=True) == 5
    assert len(contents(path)[0]) == 5


@every_writer
def test_writers_at_the_same_time_end_with_one_whole_model(name: str, tmp_path: Path) -> None:
    path = path_for(tmp_path, name)
    unexpected: list[BaseException] = []

    def write(value: int) -> None:
        try:
            for _ in range(8):
                chunks = [(np.full(3, value), np.full((3, 2), value, np.float32))] * 3
                write_model(path, 2, chunks, overwrite=True)
        except ModelFileError as problem:
            assert "cannot be written" in str(problem)
        except BaseException as problem:
            unexpected.append(problem)

    threads = [threading.Thread(target=write, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert unexpected == []
    keys, rows, _ = contents(path)
    assert len(keys) == 9 and len(set(keys)) == 1 and set(np.frombuffer(rows, np.float32)) == {keys[0]}
    assert hidden(tmp_path) == []


@every_writer
@pytest.mark.parametrize("source", FORMATS)
def test_convert(source: str, name: str, tmp_path: Path) -> None:
    src = save_model(source, path_for(tmp_path, source, "src"), *sample(50, 3))
    dst = path_for(tmp_path, name, "dst")
    seen: list[tuple[int, int]] = []
    assert convert_model(src, dst, chunk_rows=20, on_progress=lambda *at: seen.append(at)) == 50
    assert part(name).detect(dst) and contents(dst) == contents(src)
    assert seen == [(20, 50), (40, 50), (50, 50)]
    with pytest.raises(ModelFileError, match="exists already"):
        convert_model(src, dst)
    assert convert_model(src, dst, dim=3, overwrite=True) == 50
    with pytest.raises(ModelFileError, match="expected"):
        convert_model(src, dst, dim=4, overwrite=True)
    with pytest.raises(ValueError, match="chunk_rows: expected at least 1, got 0"):
        convert_model(src, dst, chunk_rows=0, overwrite=True)


@every_writer
def test_convert_in_place_and_without_rows(name: str, tmp_path: Path) -> None:
    path = save_model(name, path_for(tmp_path, name), *sample(50, 3))
    before = contents(path)
    assert convert_model(path, path, chunk_rows=7, overwrite=True) == 50
    assert contents(path) == before
    empty = save_model("directory", tmp_path / "empty", *sample(0, 3)[:2])
    assert convert_model(empty, path_for(tmp_path, name, "b"), dim=3) == 0
