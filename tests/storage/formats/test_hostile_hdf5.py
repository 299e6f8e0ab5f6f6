"""HDF5 files that are damaged or lead elsewhere: typed errors, whatever libhdf5 would do with them."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support.factories import Workshop
from support.sample_models import failure
from support.waiting import HANG_SECONDS

from hps_numba.errors import ModelFileError
from hps_numba.storage.model_files import open_model

ROWS, DIM = 300, 5
KEYS = np.arange(ROWS)
VALUES = np.random.default_rng(0).random((ROWS, DIM), dtype=np.float32)
FUZZ_CASES = int(os.environ.get("HPS_NUMBA_FUZZ_ROUNDS", "200"))
LAYOUTS: dict[str, dict[str, Any]] = {
    "checksums": {"chunks": (50, DIM), "fletcher32": True},
    "gzip and checksums": {"chunks": (50, DIM), "fletcher32": True, "compression": "gzip", "shuffle": True},
    "gzip": {"chunks": (50, DIM), "compression": "gzip"},
    "shuffle": {"chunks": (50, DIM), "shuffle": True},
    "lzf and shuffle": {"chunks": (50, DIM), "compression": "lzf", "shuffle": True},
    "lzf": {"chunks": (50, 3), "compression": "lzf"},
    "plain": {"chunks": (50, DIM)},
    "tiles": {"chunks": (7, 2)},
    "contiguous": {},
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def write(path: Path, layout: dict[str, Any], libver: str | None = None) -> Path:
    with h5py.File(path, "w", libver=libver) as file:
        file.create_dataset("emb_vector", data=VALUES, **layout)
        flat = {**layout, "chunks": layout["chunks"][:1]} if layout else layout
        file.create_dataset("key", data=KEYS, **flat)
    return path


def read_all(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with open_model(path) as model:
        keys, rows = np.empty(model.rows, np.int64), np.empty((model.rows, model.dim), np.float32)
        model.read(0, model.rows, keys, rows)
    return keys, rows


@every_layout
@pytest.mark.parametrize("libver", [None, "latest"])
def test_every_layout_of_h5py_reads(layout: dict[str, Any], libver: str | None, tmp_path: Path) -> None:
    keys, rows = read_all(write(tmp_path / "a.h5", layout, libver))
    assert np.array_equal(keys, KEYS) and np.array_equal(rows, VALUES)


# -- what a chunk says of itself ----------------------------------------------------


def chunks_of(path: Path) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    with h5py.File(path) as file:
        for name, dataset in file.items():
            for number in range(dataset.id.get_num_chunks()):
                found.append((name, dataset.id.get_chunk_info(number)))
    return found


def described(name: str, chunk: Any) -> bytes:
    """A key of the version 1 B-tree of chunks: size, filter mask, offset in elements with one more for the element."""
    return struct.pack("<II", chunk.size, chunk.filter_mask) + b"".join(
        struct.pack("<Q", start) for start in (*chunk.chunk_offset, 0)
    )


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize("name", ["checksums", "gzip and checksums", "gzip", "plain"])
def test_sizes_that_a_chunk_cannot_have(name: str, size: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", LAYOUTS[name])
    whole = path.read_bytes()
    possible = {"gzip": range(1, 6), "gzip and checksums": range(5, 6)}.get(name, ())  # the filter finds the damage
    refused = 0
    for dataset, chunk in chunks_of(path):
        old = described(dataset, chunk)
        assert whole.count(old) == 1
        path.write_bytes(whole.replace(old, struct.pack("<I", size) + old[4:]))
        message = failure(path)
        refused += "chunk at [" in message
    path.write_bytes(whole)
    assert size in possible or refused == len(chunks_of(path))


@pytest.mark.parametrize("mask", [1, 2, 3, 4, 1 << 31])
def test_a_chunk_without_its_checksum_is_refused(mask: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", LAYOUTS["checksums"])
    whole = path.read_bytes()
    for dataset, chunk in chunks_of(path):
        old = described(dataset, chunk)
        path.write_bytes(whole.replace(old, old[:4] + struct.pack("<I", mask) + old[8:]))
        assert "mask" in failure(path)


def test_chunks_at_other_addresses_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", LAYOUTS["plain"])
    whole = path.read_bytes()
    first, second = (described(*found) for found in chunks_of(path)[:2])
    place = whole.index(first) + len(first)
    for address, expected in (
        (len(whole), "within the file"),
        (2**62, "within the file"),
        (chunks_of(path)[1][1].byte_offset, "two chunks lie at the same address"),
    ):
        path.write_bytes(whole[:place] + struct.pack("<Q", address) + whole[place + 8 :])
        assert expected in failure(path)
    path.write_bytes(whole.replace(second, second[:8] + first[8:]))  # a corner twice
    failure(path)


def test_optional_filters_may_be_left_out_of_a_chunk(tmp_path: Path) -> None:
    """As HDF5 does where a chunk does not shrink; some writers do so by hand."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["key"] = KEYS
        rows = file.create_dataset("emb_vector", VALUES.shape, np.float32, chunks=(100, DIM), compression="gzip")
        for start in range(0, ROWS, 100):
            rows.id.write_direct_chunk((start, 0), VALUES[start : start + 100].tobytes(), filter_mask=1)
    assert np.array_equal(read_all(path)[1], VALUES)


def test_asking_for_chunks_by_number_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a libhdf5 that has no iterator."""
    from hps_numba.storage.formats import _hdf5_storage

    path = write(tmp_path / "a.h5", LAYOUTS["tiles"])
    with h5py.File(path) as file:
        in_one_pass = sorted(_hdf5_storage._chunks(file["emb_vector"]))
        assert sorted(_hdf5_storage._by_number(file["emb_vector"], len(in_one_pass))) == in_one_pass


UNSAFE: dict[str, dict[str, Any]] = {"szip": {"compression": "szip"}, "scaleoffset": {"scaleoffset": 3}}


@pytest.mark.parametrize("name", [*UNSAFE, "nbit"])
def test_filters_that_trust_their_chunks_are_refused(name: str, tmp_path: Path) -> None:
    """Of 1,500 damaged files with scaleoffset one ended the process with SIGSEGV, of those with szip one with SIGFPE."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["key"] = KEYS
        if name in UNSAFE:
            file.create_dataset("emb_vector", data=VALUES, chunks=(50, DIM), **UNSAFE[name])
        else:
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_chunk((50, DIM))
            plist.set_filter(h5py.h5z.FILTER_NBIT, h5py.h5z.FLAG_OPTIONAL, ())
            space = h5py.h5s.create_simple(VALUES.shape)
            dataset = h5py.h5d.create(file.id, b"emb_vector", h5py.h5t.IEEE_F32LE, space, plist)
            dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, VALUES)
    expected = "expected gzip, lzf, shuffle, fletcher32 or no filter, got "
    message = failure(path)
    assert f"emb_vector: {expected}{name}" in message and "h5repack -f NONE" in message


# -- no byte of a file ends the process ---------------------------------------------

_READ_DAMAGED = """
import os, sys
import numpy as np
from hps_numba.errors import ModelFileError
from hps_numba.storage.model_files import open_model

path, first, cases, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
whole = open(path, "rb").read()
chance = np.random.default_rng(seed)
for number in range(cases):
    data = bytearray(whole)
    for offset in chance.integers(0, len(data), chance.choice([1, 1, 1, 3])):
        if chance.random() < 0.9:  # where most of what describes the chunks is
            offset %= 4096
        data[offset] = chance.choice([0, 1, 2, 0x7F, 0x80, 0xFF, chance.integers(256)])
    if number < first:
        continue
    print(number, flush=True)
    with open(path + ".damaged", "wb") as file:
        file.write(data)
    try:
        with open_model(path + ".damaged") as model:
            model.read(0, model.rows, np.empty(model.rows, np.int64), np.empty((model.rows, model.dim), np.float32))
    except ModelFileError:
        pass
print("done", flush=True)
"""


@every_layout
def test_no_byte_kills_the_process(layout: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", layout)
    program = [sys.executable, "-c", _READ_DAMAGED, str(path), "0", str(FUZZ_CASES), "1"]
    child = subprocess.run(program, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    said = child.stdout.split()
    assert (child.returncode, said[-1:]) == (0, ["done"]), f"case {said[-1:]}: {child.returncode}: {child.stderr[-2000:]}"


# -- other files --------------------------------------------------------------------


def elsewhere(folder: Path) -> Path:
    return write(folder / "other.h5", {})


def through_soft_link(file: h5py.File, folder: Path) -> None:
    file["outside"] = h5py.ExternalLink(str(elsewhere(folder)), "/emb_vector")
    file["emb_vector"] = h5py.SoftLink("/outside")


def through_folder(file: h5py.File, folder: Path) -> None:
    file["outside"] = h5py.ExternalLink(str(elsewhere(folder)), "/")
    file["a"] = h5py.SoftLink("outside")
    file["emb_vector"] = h5py.SoftLink("a/emb_vector")


def to_nothing(file: h5py.File, folder: Path) -> None:
    file["outside"] = h5py.ExternalLink(str(folder / "gone.h5"), "/emb_vector")
    file["emb_vector"] = h5py.SoftLink("outside")


def to_a_fifo(file: h5py.File, folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    file["outside"] = h5py.ExternalLink(str(folder / "fifo"), "/emb_vector")
    file["emb_vector"] = h5py.SoftLink("outside")


def direct_to_a_fifo(file: h5py.File, folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    file["emb_vector"] = h5py.ExternalLink(str(folder / "fifo"), "/emb_vector")


def raw_file(file: h5py.File, folder: Path) -> None:
    (folder / "raw").write_bytes(VALUES.tobytes())
    file.create_dataset("hidden", VALUES.shape, np.float32, external=[(str(folder / "raw"), 0, VALUES.nbytes)])
    file["emb_vector"] = h5py.SoftLink("hidden")


def raw_fifo(file: h5py.File, folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    file.create_dataset("emb_vector", VALUES.shape, np.float32, external=[(str(folder / "fifo"), 0, VALUES.nbytes)])


def virtual(file: h5py.File, folder: Path) -> None:
    layout = h5py.VirtualLayout(VALUES.shape, np.float32)
    layout[:] = h5py.VirtualSource(str(elsewhere(folder)), "emb_vector", VALUES.shape)
    file.create_virtual_dataset("hidden", layout)
    file["emb_vector"] = h5py.SoftLink("hidden")


def virtual_of_itself(file: h5py.File, folder: Path) -> None:
    file["source"] = VALUES
    layout = h5py.VirtualLayout(VALUES.shape, np.float32)
    layout[:] = h5py.VirtualSource(".", "source", VALUES.shape)
    file.create_virtual_dataset("emb_vector", layout)


OTHER_FILES = (
    through_soft_link, through_folder, to_nothing, to_a_fifo, direct_to_a_fifo, raw_file, raw_fifo, virtual, virtual_of_itself,
)  # fmt: skip


@pytest.mark.parametrize("make", OTHER_FILES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("others_there", [True, False])
def test_data_in_other_files_are_refused(make: Callable[[h5py.File, Path], None], others_there: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["key"] = KEYS
        make(file, tmp_path)
    if not others_there:
        for other in tmp_path.iterdir():
            if other != path:
                other.unlink()
    assert "emb_vector: expected data in this file, got data in another one" in failure(path)


def test_links_within_the_file_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        table = file.create_group("tables/users")
        table["ids"], table["rows"] = KEYS, VALUES
        table["latest"] = h5py.SoftLink("rows")
        file["short"] = h5py.SoftLink("/tables/./users")
        file["key"] = h5py.SoftLink("short/ids")
        file["emb_vector"] = h5py.SoftLink("//tables//users/latest")
    keys, rows = read_all(path)
    assert np.array_equal(keys, KEYS) and np.array_equal(rows, VALUES)


def loop(file: h5py.File) -> None:
    file["emb_vector"], file["a"] = h5py.SoftLink("a"), h5py.SoftLink("emb_vector")


def growing(file: h5py.File) -> None:
    file["emb_vector"] = h5py.SoftLink("emb_vector/emb_vector/emb_vector")


def missing(file: h5py.File) -> None:
    file["emb_vector"] = h5py.SoftLink("nowhere")


def through_a_dataset(file: h5py.File) -> None:
    file["emb_vector"] = h5py.SoftLink("key/emb_vector")


def root(file: h5py.File) -> None:
    file["emb_vector"] = h5py.SoftLink("/")


@pytest.mark.parametrize("make", [loop, growing, missing, through_a_dataset, root], ids=lambda make: make.__name__)
def test_links_that_lead_nowhere(make: Callable[[h5py.File], None], tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["key"] = KEYS
        make(file)
    failure(path)


# -- memory -------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk", "options", "share"), [(20_000, {"compression": "gzip"}, 2), (20_000, {}, 1), (100, {}, 0)])
def test_the_plan_counts_what_large_chunks_take(
    chunk: int, options: dict[str, Any], share: int, workshop: Workshop, tmp_path: Path
) -> None:
    path, rows = tmp_path / "a.h5", np.ones((20_000, 64), np.float32)
    with h5py.File(path, "w") as file:
        file["key"] = np.arange(20_000)
        file.create_dataset("emb_vector", data=rows, chunks=(chunk, 64), **options)
    with open_model(path) as model:
        assert model.working_bytes == share * rows.nbytes
    small = workshop.model((range(3), 64))
    plain = workshop.open(small).plan()
    large = workshop.open({**small, "model": "n", "sparse_files": [str(path)]}).plan()
    assert large.loading_bytes - plain.loading_bytes == share * rows.nbytes
    assert large.tables[0].reading_bytes == share * rows.nbytes


def test_what_is_there_is_named_where_an_array_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["rows"], file["ids\n"], file["emb_vector"] = VALUES, KEYS, VALUES
    with pytest.raises(ModelFileError, match=r"has no array 'key', found 'ids\\n', emb_vector, rows$"):
        open_model(path)
