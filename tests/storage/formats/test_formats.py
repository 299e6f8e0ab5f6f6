"""What every sparse-model format promises; the list of formats comes from the folder (rows F01, F02, F04, F06, F09, F15)."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.producers import PRODUCERS
from support.sample_models import ARRAY_WRITERS, FORMATS, part, path_for, sample, save_model

from hps_numba.errors import ModelFileError
from hps_numba.storage import SparseModelFormat
from hps_numba.storage.model_files import formats, open_model
from hps_numba.testing import FormatContract
from hps_numba.testing.formats import read_all

every_format = pytest.mark.parametrize("name", FORMATS)
array_format = pytest.mark.parametrize("name", sorted(ARRAY_WRITERS))


def test_the_folder_lists_the_formats() -> None:
    assert {"directory", "hdf5", "npy", "npz", "parquet", "safetensors"} <= set(FORMATS)
    assert [found.name for found in formats()] == sorted([*FORMATS, *PRODUCERS])


class TestEveryFormat(FormatContract):  # F09
    @pytest.fixture(params=FORMATS)
    def tested(self, request: pytest.FixtureRequest) -> SparseModelFormat:
        return part(request.param)

    def save(self, tested: SparseModelFormat, path: Path, keys: np.ndarray, rows: np.ndarray, meta: np.ndarray | None) -> None:
        save_model(tested.name, path, keys, rows, meta)


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
def test_another_width_is_an_error_with_numbers(name: str, tmp_path: Path) -> None:
    keys, rows, _ = sample(25, 10)
    path = save_model(name, path_for(tmp_path, name), keys, rows)
    for dim in (1, 9, 11, 16, 20):
        with pytest.raises(ModelFileError, match=rf"emb_vector.*\b{dim}\b.*got \d*0\b") as caught, open_model(path, dim):
            pass
        assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=r"dim: expected at least 1.*, got 0"):
        open_model(path, 0)


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


_PEAKS = """
import re, sys
from pathlib import Path
from hps_numba.storage.model_files import formats, open_model
from hps_numba.testing import FormatContract
from hps_numba.testing.formats import read_all
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
    size = n * (8 + 4 * dim)
    for name, (before, after) in zip(FORMATS, itertools.pairwise(peaks[len(FORMATS) - 1 :])):
        assert after - before < size * 3 // 4, f"{name}: {after - before} bytes for a model of {size}"  # half, by Arrow


_CSV_FORMAT = """
import numpy as np
from hps_numba.storage.formats._arrays import check_arrays
from hps_numba.storage import SparseModelFormat, SparseModelReader

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
    with open_model(tmp_path / "a.csv", 2, format="csv_of_mine:PLUGIN", allow_code=True) as model:
        keys, rows, _ = read_all(model)
    assert keys.tolist() == [7, -9] and rows.tolist() == [[1.5, 2], [0, 4]]
    with pytest.raises(ModelFileError, match="emb_vector: expected rows of width 3, got 2"):
        open_model(tmp_path / "a.csv", 3, format="csv_of_mine:PLUGIN", allow_code=True)
    (tmp_path / "a.csv").write_text("7,x\n")
    with pytest.raises(ModelFileError, match=r"a\.csv: cannot be read: ValueError: could not convert"):
        open_model(tmp_path / "a.csv", format="csv_of_mine:PLUGIN", allow_code=True)


def test_libraries_are_imported_only_where_needed() -> None:
    script = """
import sys
import hps_numba.simulate.workloads
from hps_numba.storage.model_files import formats
assert len(formats()) > 5
print(sorted({"h5py", "pyarrow", "safetensors", "torch"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "[]\n"
