"""What every sparse-model format has to do (``hps_numba.storage.SparseModelFormat``)."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from hps_numba.errors import ClosedError, ModelFileError
from hps_numba.storage.formats._format import SparseModelFormat, SparseModelReader

__all__ = ["FormatContract"]

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def sample(n: int, dim: int, *, meta: bool = True) -> Arrays:
    """Distinct keys from all over int64, rows and meta of ``n`` rows."""
    rng = np.random.default_rng([n, dim])
    low, high = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    extremes = np.array([0, -1, low, high, 2**32 - 1, 2**32])
    keys = np.unique(np.concatenate([extremes, rng.integers(low, high, n)]))
    rng.shuffle(keys)
    return keys[:n], rng.standard_normal((n, dim)).astype(np.float32), rng.integers(0, 1 << 40, n) if meta else None


def read_all(model: SparseModelReader, cuts: Sequence[int] = ()) -> Arrays:
    """All arrays, read range by range into the middle of larger ones whose edges must stay as they were."""
    keys = np.full(model.rows + 2, -7, np.int64)
    rows = np.full((model.rows + 2, model.dim), -7, np.float32)
    meta = []
    for start, stop in itertools.pairwise([0, *sorted(cuts), model.rows]):
        model.read(start, stop, keys[1 + start : 1 + stop], rows[1 + start : 1 + stop])
        if model.has_meta:
            meta.append(model.read_meta(start, stop))
    assert keys[0] == keys[-1] == -7 and (rows[[0, -1]] == -7).all(), "read: wrote outside of the arrays"
    return keys[1:-1], rows[1:-1], np.concatenate(meta) if meta else None


def assert_same_model(got: Arrays, expected: Arrays) -> None:
    """Equal keys and meta, and rows of equal bits."""
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1].view(np.uint32), expected[1].view(np.uint32))
    assert (got[2] is None) == (expected[2] is None)
    if got[2] is not None:
        np.testing.assert_array_equal(got[2], expected[2])


class FormatContract:
    """Subclass it and set ``format``; override ``save`` for a format that cannot write.

    Or override the fixture ``tested``, which gives the format, to run the suite over several. Set ``has_meta`` to False for a
    format without ``meta``.
    """

    format: ClassVar[SparseModelFormat]
    has_meta: ClassVar[bool] = True

    @pytest.fixture
    def tested(self) -> SparseModelFormat:
        return self.format

    def save(self, tested: SparseModelFormat, path: Path, keys: np.ndarray, rows: np.ndarray, meta: np.ndarray | None) -> None:
        """Write a model at ``path``, which does not exist."""
        assert tested.can_write, f"format {tested.name} cannot write: override save"
        assert tested.write(path, rows.shape[1], [(keys, rows, meta)]) == len(keys)

    def saved(self, tested: SparseModelFormat, folder: Path, model: Arrays) -> Path:
        """A model in ``folder``, under a name with a suffix of the format."""
        keys, rows, meta = model
        path = folder / f"table{tested.suffixes[-1]}"
        self.save(tested, path, keys, rows, meta if self.has_meta else None)
        return path

    def sample(self, n: int, dim: int, *, meta: bool = True) -> Arrays:
        """``n`` rows; with meta only if the format has it."""
        return sample(n, dim, meta=meta and self.has_meta)

    @pytest.mark.parametrize("meta", [True, False])
    @pytest.mark.parametrize(("n", "dim"), [(0, 5), (1, 1), (2, 16), (7, 3), (50, 17)])
    def test_what_was_saved_is_read(self, tested: SparseModelFormat, tmp_path: Path, n: int, dim: int, meta: bool) -> None:
        model = self.sample(n, dim, meta=meta)
        path = self.saved(tested, tmp_path, model)
        for cuts in ((), (n // 2,), (n // 3, n // 2)):
            with tested.open(path, dim) as reader:
                assert (reader.path, reader.rows, reader.dim) == (path, n, dim)
                got = read_all(reader, cuts)
            assert_same_model(got, model if n else (*model[:2], got[2]))

    @pytest.mark.parametrize("n", range(1, 10))
    def test_tables_of_1_to_9_rows(self, tested: SparseModelFormat, tmp_path: Path, n: int) -> None:
        model = self.sample(n, 4, meta=False)
        with tested.open(self.saved(tested, tmp_path, model)) as reader:
            assert (reader.rows, reader.dim, reader.has_meta) == (n, 4, False)
            assert_same_model(read_all(reader), model)

    def test_nan_and_infinity_keep_their_bits(self, tested: SparseModelFormat, tmp_path: Path) -> None:
        bits = np.array([[0x7F800000, 0xFF800000, 0x7FC00001], [0x80000000, 0x00000001, 0x7F7FFFFF]], np.uint32)
        with tested.open(self.saved(tested, tmp_path, (np.arange(2), bits.view(np.float32), None))) as reader:
            assert read_all(reader)[1].view(np.uint32).tolist() == bits.tolist()

    def test_another_width_is_an_error_with_numbers(self, tested: SparseModelFormat, tmp_path: Path) -> None:
        path = self.saved(tested, tmp_path, self.sample(25, 10, meta=False))
        for dim in (1, 9, 11, 16, 20):
            with pytest.raises(ModelFileError, match=rf"\b{dim}\b") as caught, tested.open(path, dim):
                pass
            assert str(path) in str(caught.value)
        with pytest.raises(ValueError, match="dim: expected at least 1"):
            tested.open(path, 0)

    def test_keys_first_and_rows_later_and_gaps(self, tested: SparseModelFormat, tmp_path: Path) -> None:
        keys, rows, meta = self.sample(50, 3)
        with tested.open(self.saved(tested, tmp_path, (keys, rows, meta))) as reader:
            all_keys, some_rows = np.empty(50, np.int64), np.empty((2, 3), np.float32)
            reader.read(0, 50, all_keys, None)
            for start in (7, 9, 48):
                reader.read(start, start + 2, None, some_rows)
                assert some_rows.tobytes() == rows[start : start + 2].tobytes()
            if meta is not None:
                assert reader.read_meta(40, 43).tolist() == meta[40:43].tolist()
        assert all_keys.tolist() == keys.tolist()

    def test_ranges_and_arrays_that_do_not_fit_are_value_errors(self, tested: SparseModelFormat, tmp_path: Path) -> None:
        keys, rows, _ = self.sample(10, 3)
        with tested.open(self.saved(tested, tmp_path, (keys, rows, None))) as reader:
            for start, stop in ((-1, 2), (3, 2), (0, 11)):
                with pytest.raises(ValueError, match=rf"rows: expected a range within 0\.\.10, got {start}\.\.{stop}"):
                    reader.read(start, stop, None, None)
            wrong_rows: list[Any] = [
                np.empty((2, 4), np.float32),
                np.empty((3, 3), np.float32),
                np.empty((2, 3)),
                np.empty((3, 2), np.float32).T,
                np.broadcast_to(np.float32(0), (2, 3)),
            ]
            for wrong in wrong_rows:
                with pytest.raises(ValueError, match=r"rows: expected"):
                    reader.read(0, 2, None, wrong)
            with pytest.raises(ValueError, match=r"keys: expected int64\[2\], got int32\[2\]"):
                reader.read(0, 2, np.empty(2, np.int32), None)
            with pytest.raises(ModelFileError, match="has no meta"):
                reader.read_meta(0, 2)
            reader.read(4, 6, np.empty(2, np.int64), None)
            with pytest.raises(ValueError, match="key: expected a range from row 6 on, got row 5"):
                reader.read(5, 7, np.empty(2, np.int64), None)
            out = np.empty((10, 3), np.float32)
            reader.read(0, 10, None, out)  # the refused calls moved nothing
            assert out.tobytes() == rows.tobytes()
        reader.close()
        with pytest.raises(ClosedError, match="closed"):
            reader.read(6, 7, None, None)

    def test_no_rows_is_an_empty_table(self, tested: SparseModelFormat, tmp_path: Path) -> None:
        with tested.open(self.saved(tested, tmp_path, self.sample(0, 5, meta=False)), 5) as reader:
            assert (reader.rows, reader.dim) == (0, 5)
            reader.read(0, 0, np.empty(0, np.int64), np.empty((0, 5), np.float32))
            assert list(reader.chunks()) == []

    @pytest.mark.parametrize("chunk_rows", [1, 7, 50, 1000, None])
    def test_chunks_cover_the_table(self, tested: SparseModelFormat, tmp_path: Path, chunk_rows: int | None) -> None:
        keys, rows, meta = self.sample(50, 3)
        with tested.open(self.saved(tested, tmp_path, (keys, rows, meta))) as reader:
            got = [(k.copy(), r.copy(), m) for k, r, m in reader.chunks(chunk_rows)]
        assert np.concatenate([k for k, _, _ in got]).tolist() == keys.tolist()
        assert np.concatenate([r for _, r, _ in got]).tobytes() == rows.tobytes()
        if meta is not None:
            assert np.concatenate([m for _, _, m in got if m is not None]).tolist() == meta.tolist()
        assert max(len(k) for k, _, _ in got) == min(50, chunk_rows or 50)

    def test_detection_looks_at_the_content_and_not_at_the_name(self, tested: SparseModelFormat, tmp_path: Path) -> None:
        """A format may be undetectable; then its suffix decides."""
        keys, rows, _ = self.sample(8, 3)
        answers = set()
        for number, suffix in enumerate((*tested.suffixes, ".xyz", ".npz")):
            path = tmp_path / f"{number}{suffix}"
            self.save(tested, path, keys, rows, None)
            answers.add(tested.detect(path))
        assert len(answers) == 1
        (tmp_path / "other.txt").write_text("neither keys nor rows")
        assert not tested.detect(tmp_path / "other.txt")

    def test_reading_needs_little_memory_of_python(self, tested: SparseModelFormat, tmp_path: Path) -> None:
        n, dim = 100_000, 32
        path = self.saved(tested, tmp_path, (np.arange(n), np.ones((n, dim), np.float32), None))
        keys, rows = np.empty(n, np.int64), np.empty((n, dim), np.float32)
        with tested.open(path) as reader:
            reader.read(0, 1, keys[:1], rows[:1])
            tracemalloc.start()
            try:
                reader.read(1, n, keys[1:], rows[1:])
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        assert peak < 3 << 20, f"{peak} bytes beside the caller's {keys.nbytes + rows.nbytes}"
