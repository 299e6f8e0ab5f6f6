"""A thousand sparse models, damaged at random: each reads, or raises a ``ModelFileError`` that names it (F05, F06, F07)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.sample_models import FORMATS, failure, path_for, read_all, resize, sample, save_model

from hps_numba.errors import ModelFileError

Damage = Callable[[Path, np.random.Generator, list[Path]], None]


def _truncate(path: Path, rng: np.random.Generator, others: list[Path]) -> None:
    resize(path, int(rng.integers(0, path.stat().st_size + 1)))


def _extend(path: Path, rng: np.random.Generator, others: list[Path]) -> None:
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 200))))


def _flip(path: Path, rng: np.random.Generator, others: list[Path]) -> None:
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    where = rng.integers(0, max(1, len(data)), rng.choice([1, 1, 3, 20]))
    data[where[where < len(data)]] ^= rng.integers(1, 256, np.count_nonzero(where < len(data)), np.uint8)
    path.write_bytes(data.tobytes())


def _flip_in_head_or_tail(path: Path, rng: np.random.Generator, others: list[Path]) -> None:
    """Where headers and footers are."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 4])):
        if data:
            offset = int(rng.integers(0, min(len(data), 600)))
            data[offset if rng.random() < 0.5 else -1 - offset] = int(
                rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(0, 256)])
            )
    path.write_bytes(data)


def _zero(path: Path, rng: np.random.Generator, others: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    start, stop = sorted(rng.integers(0, len(data) + 1, 2))
    data[start:stop] = bytes(int(stop - start))
    path.write_bytes(data)


def _repeat(path: Path, rng: np.random.Generator, others: list[Path]) -> None:
    """Copy a stretch of the file over another one, or in between."""
    data = path.read_bytes()
    start, stop, where = (int(x) for x in [*sorted(rng.integers(0, len(data) + 1, 2)), rng.integers(0, len(data) + 1)])
    skip = stop - start if rng.random() < 0.5 else 0
    path.write_bytes(data[:where] + data[start:stop] + data[where + skip :])


def _remove(path: Path, rng: np.random.Generator, others: list[Path]) -> None:
    path.unlink()


def _swap(path: Path, rng: np.random.Generator, others: list[Path]) -> None:
    other = others[rng.integers(len(others))]
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


def _empty(path: Path, rng: np.random.Generator, others: list[Path]) -> None:
    path.write_bytes(b"")


def _garbage(path: Path, rng: np.random.Generator, others: list[Path]) -> None:
    path.write_bytes(rng.bytes(int(rng.integers(1, 2 * path.stat().st_size + 2))))


def _become_a_directory(path: Path, rng: np.random.Generator, others: list[Path]) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[Damage] = [
    *[_truncate, _extend, _flip, _flip, _flip_in_head_or_tail, _flip_in_head_or_tail, _flip_in_head_or_tail, _zero, _repeat],
    *[_remove, _swap, _empty, _garbage, _become_a_directory],
]


def files_of(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def variants(folder: Path) -> list[Path]:
    """Undamaged models: every format, and files of other writers' habits for those that have several."""
    keys, rows, meta = sample(40, 5)
    models = [
        save_model(name, path_for(folder, name, f"{number}_{name}"), keys, rows, meta) for number, name in enumerate(FORMATS)
    ]
    plain, packed, lists = folder / "plain.h5", folder / "packed.npz", folder / "lists.parquet"
    with h5py.File(plain, "w") as file:
        file["key"], file["emb_vector"] = keys, rows.astype(np.float64)
        file.create_dataset("meta", data=meta, chunks=(7,), compression="gzip", shuffle=True)
    np.savez_compressed(packed, key=keys, emb_vector=rows)
    pq.write_table(pa.table({"key": keys, "emb_vector": pa.array(rows.tolist())}), lists, row_group_size=11)
    return [*models, plain, packed, lists]


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    models = variants(tmp_path_factory.mktemp("undamaged"))
    assert [read_all(path) for path in models] == [40] * len(models)
    return models


def test_a_truncated_file_never_reads(undamaged: list[Path], tmp_path: Path) -> None:
    for original in undamaged:
        for number, file in enumerate(files_of(original)):
            size = file.stat().st_size
            for kept in {0, 1, size // 3, size // 2, *range(size - 20, size), *range(0, size, size // 23)}:
                path = tmp_path / f"{kept}_{number}_{original.name}"
                (shutil.copytree if original.is_dir() else shutil.copy)(original, path)
                resize(path / file.name if path.is_dir() else path, kept)
                failure(path, 5)


def damaged(undamaged: list[Path], seed: int, folder: Path) -> Path:
    """A copy of one of the models with one or two damages."""
    rng = np.random.default_rng(seed)
    original = undamaged[seed % len(undamaged)]
    path = folder / f"{seed}_{original.name}"
    (shutil.copytree if original.is_dir() else shutil.copy)(original, path)
    other = folder / f"{seed}_other"
    shutil.copy(files_of(undamaged[rng.integers(len(undamaged))])[0], other)
    for _ in range(rng.choice([1, 1, 2])):
        files = [file for file in files_of(path) if file.is_file()] if path.exists() else []
        if files:
            file = files[rng.integers(len(files))]
            others = [sibling for sibling in files if sibling != file] or [other]
            DAMAGES[rng.integers(len(DAMAGES))](file, rng, others)
    return path


def outcome(path: Path, seed: int) -> str:
    """Read with or without dim, in chunks of some size; "read", or the message of the error."""
    try:
        read_all(path, 5 if seed % 2 else None, [1, 7, 40, None][seed % 4])
    except ModelFileError as problem:
        assert str(path) in str(problem) and "\n" not in str(problem)
        return str(problem)
    return "read"


@pytest.mark.parametrize("block", range(10))
def test_1000_damaged_models_read_or_raise_model_file_error(block: int, undamaged: list[Path], tmp_path: Path) -> None:
    outcomes = [outcome(damaged(undamaged, seed, tmp_path), seed) for seed in range(100 * block, 100 * block + 100)]
    raised = len(outcomes) - outcomes.count("read")
    assert 50 <= raised <= 99, "damage that is always or hardly ever noticed is no test"
