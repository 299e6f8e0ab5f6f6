"""What every sparse-model format promises; the list of formats comes from the folder (rows F01, F02, F04, F06, F09, F15)."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sample_models import ARRAY_WRITERS, FORMATS, part, path_for, sample, save_model

from hps_numba.errors import ClosedError, ModelFileError
from hps_numba.storage.formats._format import SparseModelReader
from hps_numba.storage.model_files import formats, open_model

every_format = pytest.mark.parametrize("name", FORMATS)
array_format = pytest.mark.parametrize("name", sorted(ARRAY_WRITERS))


def read_all(model: SparseModelReader, cuts: list[int] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """All arrays, read range by range into the middle of larger ones whose edges must stay as they were."""
    keys = np.full(model.rows + 2, -7, np.int64)
    rows = np.full((model.rows + 2, model.dim), -7, np.float32)
    meta = []
    bounds = [0, *sorted(cuts or []), model.rows]
    for start, stop in itertools.pairwise(bounds):
        model.read(start, stop, keys[1 + start : 1 + stop], rows[1 + start : 1 + stop])
        if model.has_meta:
            meta.append(model.read_meta(start, stop))
    assert keys[0] == keys[-1] == -7 and (rows[[0, -1]] == -7).all()
    return keys[1:-1], rows[1:-1], np.concatenate(meta) if meta else None


def test_the_folder_lists_the_formats() -> None:
    assert {"directory", "hdf5", "npy", "npz", "parquet", "safetensors"} <= set(FORMATS)
    assert [part(name).name for name in FORMATS] == FORMATS


@every_format
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_round_trip(name: str, data: st.DataObject) -> None:
    n, dim = data.draw(st.integers(0, 50)), data.draw(st.sampled_from([1, 3, 16, 17]))
    keys, rows, meta = sample(n, dim)
    meta = meta if data.draw(st.booleans()) else None
    cuts = data.draw(st.lists(st.integers(0, n), max_size=3))
    with tempfile.TemporaryDirectory() as folder:
        path = save_model(name, path_for(Path(folder), name), keys, rows, meta)
        with open_model(path, dim) as model:
            assert (model.path, model.rows, model.dim, model.has_meta) == (path, n, dim, meta is not None)
            got_keys, got_rows, got_meta = read_all(model, cuts)
    np.testing.assert_array_equal(got_keys, keys)
    np.testing.assert_array_equal(got_rows.view(np.uint32), rows.view(np.uint32))
    if got_meta is not None:
        np.testing.assert_array_equal(got_meta, meta)


@every_format
@pytest.mark.parametrize("n", range(1, 10))
def test_tables_of_1_to_9_rows(name: str, n: int, tmp_path: Path) -> None:
    keys, rows, _ = sample(n, 4)
    with open_model(save_model(name, path_for(tmp_path, name), keys, rows)) as model:
        assert (model.rows, model.dim, model.has_meta) == (n, 4, False)
        got_keys, got_rows, _ = read_all(model)
    assert got_keys.tolist() == keys.tolist() and got_rows.tobytes() == rows.tobytes()


@every_format
def test_nan_and_infinity_keep_their_bits(name: str, tmp_path: Path) -> None:
    bits = np.array([[0x7F800000, 0xFF800000, 0x7FC00001], [0x80000000, 0x00000001, 0x7F7FFFFF]], np.uint32)
    with open_model(save_model(name, path_for(tmp_path, name), np.arange(2), bits.view(np.float32))) as model:
        assert read_all(model)[1].view(np.uint32).tolist() == bits.tolist()


@every_format
def test_another_width_is_an_error_with_numbers(name: str, tmp_path: Path) -> None:
    keys, rows, _ = sample(25, 10)
    path = save_model(name, path_for(tmp_path, name), keys, rows)
    for dim in (1, 9, 11, 16, 20):
        with pytest.raises(ModelFileError, match=rf"emb_vector.*1?0.*{dim}") as caught, open_model(path, dim):
            pass
        assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="dim: 0, wanted"):
        open_model(path, 0)


@every_format
def test_keys_first_and_rows_later_and_gaps(name: str, tmp_path: Path) -> None:
    keys, rows, meta = sample(50, 3)
    with open_model(save_model(name, path_for(tmp_path, name), keys, rows, meta)) as model:
        all_keys, some_rows = np.empty(50, np.int64), np.empty((2, 3), np.float32)
        model.read(0, 50, all_keys, None)
        for start in (7, 9, 48):
            model.read(start, start + 2, None, some_rows)
            assert some_rows.tobytes() == rows[start : start + 2].tobytes()
        assert model.read_meta(40, 43).tolist() == meta[40:43].tolist()
    assert all_keys.tolist() == keys.tolist()


@every_format
def test_ranges_and_arrays_that_do_not_fit_are_value_errors(name: str, tmp_path: Path) -> None:
    keys, rows, _ = sample(10, 3)
    with open_model(save_model(name, path_for(tmp_path, name), keys, rows)) as model:
        for start, stop in ((-1, 2), (3, 2), (0, 11)):
            with pytest.raises(ValueError, match=f"rows {start}..{stop} asked for"):
                model.read(start, stop, None, None)
        wrong_rows = [
            np.empty((2, 4), np.float32),
            np.empty((3, 3), np.float32),
            np.empty((2, 3)),
            np.empty((3, 2), np.float32).T,
            np.broadcast_to(np.float32(0), (2, 3)),
        ]
        for wrong in wrong_rows:
            with pytest.raises(ValueError, match=r"rows (is|must)"):
                model.read(0, 2, None, wrong)
        with pytest.raises(ValueError, match=r"keys is int32\[2\], wanted int64\[2\]"):
            model.read(0, 2, np.empty(2, np.int32), None)  # type: ignore[arg-type]
        with pytest.raises(ModelFileError, match="has no meta"):
            model.read_meta(0, 2)
        model.read(4, 6, np.empty(2, np.int64), None)
        with pytest.raises(ValueError, match="key is read to row 6 already, 5 asked for"):
            model.read(5, 7, np.empty(2, np.int64), None)
        out = np.empty((10, 3), np.float32)
        model.read(0, 10, None, out)  # what was refused moved nothing
        assert out.tobytes() == rows.tobytes()
    model.close()
    with pytest.raises(ClosedError, match="closed"):
        model.read(6, 7, None, None)


@every_format
def test_no_rows_is_an_empty_table(name: str, tmp_path: Path) -> None:
    keys, rows, _ = sample(0, 5)
    with open_model(save_model(name, path_for(tmp_path, name), keys, rows), 5) as model:
        assert (model.rows, model.dim) == (0, 5)
        model.read(0, 0, np.empty(0, np.int64), np.empty((0, 5), np.float32))
        assert list(model.chunks()) == []


@every_format
@pytest.mark.parametrize("chunk_rows", [1, 7, 50, 1000, None])
def test_chunks_cover_the_table(name: str, chunk_rows: int | None, tmp_path: Path) -> None:
    keys, rows, meta = sample(50, 3)
    with open_model(save_model(name, path_for(tmp_path, name), keys, rows, meta)) as model:
        got = [(k.copy(), r.copy(), m) for k, r, m in model.chunks(chunk_rows)]
    assert np.concatenate([k for k, _, _ in got]).tolist() == keys.tolist()
    assert np.concatenate([r for _, r, _ in got]).tobytes() == rows.tobytes()
    assert np.concatenate([m for _, _, m in got if m is not None]).tolist() == meta.tolist()
    assert max(len(k) for k, _, _ in got) == min(50, chunk_rows or 50)


@every_format
def test_content_decides_and_not_the_name(name: str, tmp_path: Path) -> None:
    keys, rows, _ = sample(8, 3)
    for number, suffix in enumerate(sorted({suffix for other in FORMATS for suffix in part(other).suffixes} | {".xyz"})):
        path = save_model(name, tmp_path / f"{number}{suffix}", keys, rows)
        assert [found.name for found in formats() if found.detect(path)] == [name]
        with open_model(path) as model:
            assert read_all(model)[1].tobytes() == rows.tobytes()
        with open_model(path, 3, format=name) as model:
            assert model.rows == 8


@array_format
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_keys_of_any_integer_dtype(name: str, dtype: str, tmp_path: Path) -> None:
    limits = np.iinfo(dtype)
    keys = np.array([limits.min, min(limits.max, 2**63 - 1), 1], dtype)
    path = path_for(tmp_path, name)
    ARRAY_WRITERS[name](path, {"key": keys, "emb_vector": np.zeros((3, 2), np.float32), "meta": keys})
    with open_model(path) as model:
        got_keys, _, got_meta = read_all(model)
    assert got_keys.tolist() == keys.tolist() and got_meta is not None and got_meta.tolist() == keys.tolist()


@array_format
def test_uint64_keys_above_int64_are_an_error(name: str, tmp_path: Path) -> None:
    path = path_for(tmp_path, name)
    keys = np.array([1, 2**63 - 1, 2**63 + 5], np.uint64)
    ARRAY_WRITERS[name](path, {"key": keys, "emb_vector": np.zeros((3, 2), np.float32)})
    with open_model(path) as model:
        out = np.empty(3, np.int64)
        model.read(0, 2, out[:2], None)
        with pytest.raises(ModelFileError, match=f"key holds {2**63 + 5}, which does not fit int64"):
            model.read(2, 3, out[2:], None)
        with pytest.raises(ModelFileError, match="an earlier read"):
            model.read(0, 3, None, np.empty((3, 2), np.float32))


@array_format
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floats_are_converted(name: str, dtype: str, tmp_path: Path) -> None:
    path = path_for(tmp_path, name)
    rows = np.concatenate([np.random.default_rng(0).standard_normal((40, 3)), [[np.inf, np.nan, 1e-300]]]).astype(dtype)
    ARRAY_WRITERS[name](path, {"key": np.arange(41), "emb_vector": rows})
    with open_model(path) as model:
        assert read_all(model, [5, 17])[1].tobytes() == rows.astype(np.float32).tobytes()


@array_format
def test_float64_beyond_float32_is_an_error(name: str, tmp_path: Path) -> None:
    path = path_for(tmp_path, name)
    ARRAY_WRITERS[name](path, {"key": np.arange(2), "emb_vector": np.array([[1.0], [1e39]])})
    with open_model(path) as model, pytest.raises(ModelFileError, match="emb_vector holds a float64 value beyond"):
        read_all(model)


@pytest.mark.parametrize("name", ["hdf5", "npy", "npz"])
def test_big_endian_arrays(name: str, tmp_path: Path) -> None:
    path = path_for(tmp_path, name)
    keys, rows, _ = sample(30, 3)
    ARRAY_WRITERS[name](path, {"key": keys.astype(">i8"), "emb_vector": rows.astype(">f4")})
    with open_model(path) as model:
        got_keys, got_rows, _ = read_all(model, [11])
    assert got_keys.tolist() == keys.tolist() and got_rows.tobytes() == rows.tobytes()


@every_format
def test_reading_needs_little_memory_of_python(name: str, tmp_path: Path) -> None:
    n, dim = 100_000, 32
    rows = np.ones((n, dim), np.float32)
    path = save_model(name, path_for(tmp_path, name), np.arange(n), rows)
    keys = np.empty(n, np.int64)
    with open_model(path) as model:
        model.read(0, 1, keys[:1], rows[:1])
        tracemalloc.start()
        try:
            model.read(1, n, keys[1:], rows[1:])
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 3 << 20, f"{peak} bytes beside the caller's {keys.nbytes + rows.nbytes}"


_PEAKS = """
import re, sys
from pathlib import Path
from hps_numba.storage.model_files import formats, open_model
peaks = []
for path in sys.argv[1:]:
    with open_model(path) as model:
        for _ in model.chunks():
            pass
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with the peak of the parent process
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024)
print(*peaks)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_streaming_needs_little_memory_of_the_process(tmp_path: Path) -> None:
    """Bytes that HDF5 and Arrow allocate count too. Small models first, so that libraries are loaded before the large ones."""
    n, dim = 120_000, 128
    paths = []
    for stem, rows in (("small", np.ones((10, dim), np.float32)), ("large", np.ones((n, dim), np.float32))):
        for name in FORMATS:
            paths.append(save_model(name, path_for(tmp_path, name, f"{stem}_{name}"), np.arange(len(rows)), rows))
    command = [sys.executable, "-c", _PEAKS, *map(str, paths)]
    peaks = [int(peak) for peak in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]
    assert len(peaks) == 2 * len(FORMATS)
    for name, (before, after) in zip(FORMATS, itertools.pairwise(peaks[len(FORMATS) - 1 :])):
        assert after - before < 32 << 20, f"{name}: {after - before} bytes for a model of {n * (8 + 4 * dim)}"


_CSV_FORMAT = """
import numpy as np
from hps_numba.storage.formats._arrays import check_arrays
from hps_numba.storage.formats._format import SparseModelFormat, SparseModelReader

class CsvReader(SparseModelReader):
    def __init__(self, path, dim):
        table = np.loadtxt(path, delimiter=",", ndmin=2)
        self.arrays = {"key": table[:, 0].astype(np.int64), "emb_vector": table[:, 1:].astype(np.float32)}
        super().__init__(path, *check_arrays(path, self.arrays, dim), has_meta=False)

    def _fill(self, name, start, out):
        out[...] = self.arrays[name][start : start + len(out)]

    def _close(self):
        self.arrays.clear()

class CsvFormat(SparseModelFormat):
    name, suffixes = "csv", (".csv",)

    def detect(self, path):
        return False

    def _open(self, path, dim):
        return CsvReader(path, dim)

PLUGIN = CsvFormat()
"""


def test_a_format_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "csv_of_mine.py").write_text(_CSV_FORMAT)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a.csv").write_text("7,1.5,2\n-9,0,4\n")
    with open_model(tmp_path / "a.csv", 2, format="csv_of_mine:PLUGIN") as model:
        keys, rows, _ = read_all(model)
    assert keys.tolist() == [7, -9] and rows.tolist() == [[1.5, 2], [0, 4]]
    with pytest.raises(ModelFileError, match="emb_vector has rows of width 2, wanted 3"):
        open_model(tmp_path / "a.csv", 3, format="csv_of_mine:PLUGIN")
    (tmp_path / "a.csv").write_text("7,x\n")
    with pytest.raises(ModelFileError, match=r"a\.csv: cannot be read: ValueError: could not convert"):
        open_model(tmp_path / "a.csv", format="csv_of_mine:PLUGIN")


def test_libraries_are_imported_only_where_they_are_needed() -> None:
    script = """
import sys
import hps_numba.simulate.workloads
from hps_numba.storage.model_files import formats
assert len(formats()) > 5
print(sorted({"h5py", "pyarrow", "safetensors", "torch"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "[]\n"
