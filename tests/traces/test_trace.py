"""Traces: every format yields the same keys; damaged or ambiguous files raise a TraceError that names the position."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba import simulate
from hps_numba.errors import TraceError
from hps_numba.traces.formats.oracle_general import RECORD
from hps_numba.traces.trace import formats

KEYS = [5, -1, 2**63 - 1, 5, 0, -(2**63), 17]


def text_of(keys: list[int]) -> str:
    return "# a trace\n" + "\n".join(f"  {key}" for key in keys[:-1]) + f" # the last one follows\n\n{keys[-1]}"


def save(name: str, folder: Path, keys: list[int]) -> Path:
    """A trace in the format called ``name``."""
    if name == "npy":
        np.save(folder / "t.npy", np.array(keys).reshape(-1, 1))
        return folder / "t.npy"
    if name == "csv":
        (folder / "t.csv").write_text("time,key,size\n" + "".join(f"1,{key},2\n" for key in keys))
        return folder / "t.csv"
    if name == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pyarrow.table({"x": [1] * len(keys), "key": keys}), folder / "t.parquet", row_group_size=2
        )
        return folder / "t.parquet"
    if name == "oracle_general":
        records = np.zeros(len(keys), RECORD)
        records["object"] = np.array(keys, np.int64).view(np.uint64)
        records.tofile(folder / "t.oracleGeneral")
        return folder / "t.oracleGeneral"
    assert name == "text", f"{name}: a new format needs a case here"
    (folder / "t.txt").write_text(text_of(keys))
    return folder / "t.txt"


@pytest.mark.parametrize("name", formats())
def test_every_format_yields_the_keys(name: str, tmp_path: Path) -> None:
    path = save(name, tmp_path, KEYS)
    trace = simulate.open_trace(path)
    assert trace.format == name and trace.name == path.name and trace.requests in (None, len(KEYS))
    for _ in range(2):  # each call starts at the beginning
        assert [key for block in trace.blocks() for key in block.tolist()] == KEYS
    assert trace.keys().dtype == np.int64
    few = simulate.open_trace(path, limit=3)
    assert few.keys().tolist() == KEYS[:3] and few.requests in (None, 3)
    assert simulate.open_trace(path, limit=100).keys().tolist() == KEYS
    other = path.rename(tmp_path / "unnamed")
    with pytest.raises(TraceError, match=r"unnamed: expected a name ending in \.csv"):
        simulate.open_trace(other)
    assert simulate.open_trace(other, format=name, name="mine").name == "mine"


@pytest.mark.parametrize("name", formats())
def test_every_format_yields_blocks_of_limited_size(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("_format", "parquet"):
        monkeypatch.setattr(f"hps_numba.traces.formats.{module}.BLOCK", 4)
    monkeypatch.setattr("hps_numba.traces.formats.csv._ROWS", 4)
    keys = list(range(10))
    blocks = [block.tolist() for block in simulate.open_trace(save(name, tmp_path, keys)).blocks()]
    assert [key for block in blocks for key in block] == keys and max(map(len, blocks)) <= 4


@pytest.mark.parametrize("name", formats())
def test_empty_trace_of_every_format_raises(name: str, tmp_path: Path) -> None:
    path = save(name, tmp_path, KEYS)
    if name == "npy":
        np.save(path, np.empty(0, np.int64))
    elif name == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"key": pyarrow.array([], pyarrow.int64())}), path)
    else:
        path.write_text("key\n" if name == "csv" else "")
    with pytest.raises(TraceError, match=f"{path.name}: expected keys, got an empty trace"):
        simulate.run(path, "lru", 10, progress=False)


def test_open_trace_accepts_arrays_and_traces() -> None:
    keys = np.arange(12, dtype=np.uint32).reshape(3, 4)
    trace = simulate.open_trace(keys, limit=7)
    assert trace.keys().tolist() == list(range(7)) and simulate.open_trace(trace) is trace
    assert simulate.open_trace(np.array([2**64 - 1], np.uint64)).keys().tolist() == [-1]
    assert simulate.open_trace([3, 4]).keys().tolist() == [3, 4]


@pytest.mark.parametrize(
    ("text", "column", "expected"),
    [
        ("7\n8\n", None, [7, 8]),
        ("id\n7\n", None, [7]),
        ("anything\n7\n", None, [7]),
        ("1;2\n3;4\n", "1", [2, 4]),
        ("a\tb\n1\t2\n", "b", [2]),
        ("user_id:token\titem_id:token\n196\t242\n", None, [242]),
        ("user_id:token\titem_id:token\n196\t242\n", "user_id", [196]),
        ('key,x\n"5",a\n\n6,b\n', None, [5, 6]),
        ("key\n18446744073709551615\n", None, [-1]),
        ("Key , other\n5,6\n", None, [5]),
    ],
)
def test_column_of_a_csv_file_is_found(tmp_path: Path, text: str, column: Any, expected: list[int]) -> None:
    (tmp_path / "t.csv").write_text(text)
    assert simulate.open_trace(tmp_path / "t.csv", column=column).keys().tolist() == expected


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", None, "t.csv: expected a header or rows, got an empty file"),
        ("key\n1\nx\n", None, "t.csv:3: expected a 64-bit integer, got 'x'"),
        ("key\n1\n\n1.0\n", None, "t.csv:4: expected a 64-bit integer, got '1.0'"),
        ("key\n99999999999999999999\n", None, "t.csv:2: expected a 64-bit integer, got '99999999999999999999'"),
        ("a,key\n1,2\n1\n", None, "t.csv:3: expected 2 or more columns, got 1"),
        ("a,b\n1,2\n", None, "t.csv: column (--column): expected one of a, b, got 'key'"),
        ("a,b\n1,2\n", "c", "t.csv: column (--column): expected one of a, b, got 'c'"),
        ("1,2\n", None, "t.csv: expected the number of a column (--column), as there are 2 and no header"),
        ("1,2\n", "a", "t.csv: column: expected a number, as there is no header, got 'a'"),
        ("1,2\n", "2", "t.csv: column: expected 0 to 1, got 2"),
        ("key\n1\0\n", None, "t.csv: expected a CSV file, got one with zero bytes"),
    ],
)
def test_damaged_or_ambiguous_csv_raises(tmp_path: Path, text: str, column: Any, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(TraceError) as failed:
        simulate.open_trace(tmp_path / "t.csv", column=column).keys()
    assert message in str(failed.value) and "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.npy", b"", "expected an .npy file of integers"),
        ("t.npy", b"\x93NUMPY\x01\x00garbage", "expected an .npy file of integers"),
        ("t.txt", b"1 2\n3 four\n", "t.txt:2: expected a 64-bit integer, got 'four'"),
        ("t.txt", b"1\n\xff\xfe\n", "t.txt:2: "),
        ("t.csv", b"key\n\xff\xfe\n", "expected a CSV file in UTF-8"),
        ("t.oracleGeneral", bytes(25), "expected whole records of 24 bytes, got 25 bytes"),
        ("t.oracleGeneral", b"\x28\xb5\x2f\xfd" + bytes(20), "expected plain oracleGeneral, got a compressed file: zstd -d"),
        ("t.parquet", b"PAR1 and no more", "expected a Parquet file"),
        ("t.parquet", b"", "expected a Parquet file"),
    ],
)
def test_damaged_file_raises(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TraceError) as failed:
        simulate.open_trace(tmp_path / name).keys()
    assert message in str(failed.value) and "\n" not in str(failed.value)


def test_npy_without_integers_raises(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    np.save(path, np.arange(10_000))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(TraceError, match=r"expected an \.npy file of integers"):
        simulate.open_trace(path)
    for array, message in (
        (np.ones(3), "expected an array of integers, got float64"),
        (np.array([None]), "expected an .npy file of integers"),
        (np.asfortranarray(np.arange(6).reshape(2, 3)), "expected C order, got Fortran order"),
    ):
        np.save(path, array)
        with pytest.raises(TraceError, match=message):
            simulate.open_trace(path)


def test_parquet_without_integers_or_damaged_raises(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    for table, column, message in (
        ({"key": [1.5]}, None, "column 'key': expected integers, got double"),
        ({"key": ["a"]}, None, "column 'key': expected integers, got string"),
        ({"key": [1, None]}, None, "column 'key': expected integers, got 1 nulls"),
        ({"a": [1], "b": [1]}, None, r"column \(--column\): expected one of a, b, got 'key'"),
        ({"a": [1]}, "b", r"column \(--column\): expected one of a, got 'b'"),
    ):
        parquet.write_table(pyarrow.table(table), path)
        with pytest.raises(TraceError, match=message):
            simulate.open_trace(path, column=column).keys()
    parquet.write_table(pyarrow.table({"only": [4]}), path)
    assert simulate.open_trace(path).keys().tolist() == [4]
    parquet.write_table(pyarrow.table({"key": list(range(5000))}), path, compression=None)
    damaged = bytearray(path.read_bytes())
    damaged[4:200] = b"\xff" * 196
    path.write_bytes(damaged)
    with pytest.raises(TraceError, match=r"t\.parquet: damaged"):
        simulate.open_trace(path).keys()


def test_misuse_of_open_trace_raises(tmp_path: Path) -> None:
    for name in ("npy", "oracle_general", "text"):
        with pytest.raises(TraceError, match="column: expected none"):
            simulate.open_trace(save(name, tmp_path, KEYS), column="key")
    with pytest.raises(TraceError, match="expected a trace file, got no such file"):
        simulate.open_trace(tmp_path / "none.npy")
    with pytest.raises(TraceError, match="expected a trace file, got a directory"):
        simulate.open_trace(tmp_path)
    with pytest.raises(TraceError, match="limit: expected 1 or more requests, got 0"):
        simulate.open_trace(KEYS, limit=0)
    with pytest.raises(TraceError, match=r"format: expected one of csv, npy, .*, got 'pickle'"):
        simulate.open_trace(tmp_path / "t.npy", format="pickle")


@pytest.mark.parametrize("name", ["t.npy", "t.oracleGeneral"])
def test_file_that_is_truncated_while_it_is_read_raises(name: str, tmp_path: Path) -> None:
    path, n = tmp_path / name, 3 << 20
    if name.endswith(".npy"):
        np.save(path, np.arange(n))
    else:
        np.zeros(n, RECORD).tofile(path)
    trace = simulate.open_trace(path)
    blocks = trace.blocks()
    assert len(next(blocks)) == 1 << 20
    os.truncate(path, path.stat().st_size // 2)  # a memory map would now end the process with SIGBUS
    with pytest.raises(TraceError, match=r"expected 3,145,728 requests, got 1,57\d,\d+: it has become shorter"):
        list(blocks)


def test_file_that_was_replaced_since_it_was_opened_raises(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    np.save(path, np.arange(10))
    trace = simulate.open_trace(path)
    np.save(tmp_path / "other.npy", np.arange(20))
    (tmp_path / "other.npy").replace(path)
    with pytest.raises(TraceError, match="expected the file that was opened as a trace"):
        trace.keys()


def test_arrays_of_every_header_version_and_byte_order_are_read(tmp_path: Path) -> None:
    keys = np.arange(-3, 9).reshape(3, 4)
    for number, version in enumerate([(1, 0), (2, 0), (3, 0)]):
        for dtype in ("<i8", ">i4", "<i2"):
            path = tmp_path / f"{number}{dtype[1:]}.npy"
            with path.open("wb") as file:
                np.lib.format.write_array(file, keys.astype(dtype), version)
            assert simulate.open_trace(path).keys().tolist() == keys.reshape(-1).tolist()


@pytest.mark.parametrize("shape", [(-5,), (2**62, 8), (2**40,)])
def test_header_that_promises_impossible_sizes_raises(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
        file.write(bytes(64))
    with pytest.raises(TraceError, match="bytes of them, got 64"):
        simulate.open_trace(path)
