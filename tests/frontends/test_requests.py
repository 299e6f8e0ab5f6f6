"""Lookups as messages: JSON and bytes both ways, the answer, and what is refused."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from support.oracles import rows_of

from hps_numba import HPS, ConfigError, KeyDtypeError, UnknownModelError
from hps_numba.frontends._requests import Request, Response, TableRequest, respond

KEYS, OFFSETS, WEIGHTS = np.array([[1, 2, 3], [4, 5, 99]]), np.array([0, 2, 2, 3]), np.array([1, 0.5, 2], np.float32)


@pytest.fixture
def server(workshop: Any) -> HPS:
    server: HPS = workshop.open(workshop.model((range(20), 4), (range(20), 8)))
    return server


def request_of(**more: Any) -> Request:
    tables = (TableRequest(0, KEYS), TableRequest("sparse_embedding1", KEYS[0], OFFSETS, WEIGHTS, "sum"))
    return Request("m", tables, **more)


def equal(one: Request, other: Request) -> bool:
    def fields(request: Request) -> list[Any]:
        return [request.model, request.output_dtype, request.version, *(list(vars(some).values()) for some in request.tables)]

    return str(fields(one)) == str(fields(other))


@pytest.mark.parametrize("more", [{}, {"output_dtype": "float16", "version": 3}])
def test_a_request_is_json_and_bytes_and_back(more: dict[str, Any]) -> None:
    request = request_of(**more)
    assert equal(Request.from_json(request.to_json()), request)
    assert equal(Request.from_json(request.to_json().encode()), request)
    again = Request.from_bytes(request.to_bytes())
    assert equal(again, request)
    for table in again.tables:
        assert table.keys.ctypes.data % 4 == 0 and not table.keys.flags.writeable


def test_a_request_written_by_hand(server: HPS) -> None:
    tables = '[{"table": 0, "keys": [1, 5]}, {"table": 1, "keys": [7, 8], "offsets": [0, 2], "mode": "mean"}]'
    rows, means = respond(server, Request.from_json(f'{{"model": "m", "tables": {tables}}}')).rows
    assert np.array_equal(rows, rows_of([1, 5], 4))
    assert np.allclose(means, rows_of([7, 8], 8).mean(0, keepdims=True))


def test_a_response_has_the_rows_of_every_table(server: HPS) -> None:
    response = respond(server, request_of(version=1))
    rows, pooled = response.rows
    assert np.array_equal(rows, server.lookup(KEYS, "m", 0))
    assert np.array_equal(pooled, server.lookup_pooled(KEYS[0], OFFSETS, "m", 1, weights=WEIGHTS))
    for again in (Response.from_bytes(response.to_bytes()), Response.from_json(response.to_json())):
        assert (again.model, again.version) == ("m", 1)
        assert all(np.array_equal(one, other) for one, other in zip(again.rows, response.rows, strict=True))


def test_rows_come_in_the_output_dtype(server: HPS) -> None:
    response = respond(server, request_of(output_dtype="float16"))
    assert [rows.dtype for rows in response.rows] == [np.float16, np.float16]
    assert [rows.dtype for rows in Response.from_bytes(response.to_bytes()).rows] == [np.float16, np.float16]


def test_keys_of_every_integer_type(server: HPS) -> None:
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint32, np.uint64):
        request = Request("m", (TableRequest(0, np.arange(5, dtype=dtype)),))
        (rows,) = respond(server, Request.from_bytes(request.to_bytes())).rows
        assert np.array_equal(rows, rows_of(np.arange(5), 4))
    assert (
        Request.from_json('{"model": "m", "tables": [{"table": 0, "keys": [1, 9223372036854775808]}]}').tables[0].keys.dtype
        == "u8"
    )


def test_another_version_or_model_is_refused(server: HPS) -> None:
    with pytest.raises(UnknownModelError, match="version: expected 1, which model 'm' has, got 2"):
        respond(server, request_of(version=2))
    with pytest.raises(UnknownModelError, match="'x' is not deployed"):
        respond(server, Request("x", ()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nonsense", "expected JSON"),
        ([], "request: expected an object, got list"),
        ({"model": 3}, "model: expected a name, got 3"),
        ({"tables": {}}, "tables: expected a list, got dict"),
        ({"tables": None}, "tables: expected a list, got NoneType"),
        ({"more": 1}, "request: expected fields of model, tables, output_dtype, version, got 'more'"),
        ({"output_dtype": "int8"}, "output_dtype: expected one of float32, float16, got 'int8'"),
        ({"version": "1"}, "version: expected an integer, got '1'"),
        ({"tables": [{"table": 0}]}, r"tables\[0\].keys: expected a value, got none"),
        ({"tables": [{"table": 0.5, "keys": []}]}, r"tables\[0\].table: expected the number or name of a table, got 0.5"),
        ({"tables": [{"table": 0, "keys": "abc"}]}, r"tables\[0\].keys: expected a list, got str"),
        ({"tables": [{"table": 0, "keys": [1], "offsets": [0, 1], "mode": "min"}]}, r"tables\[0\].mode: .*, got 'min'"),
        ({"tables": [{"table": 0, "keys": [1], "weights": [1]}]}, r"tables\[0\].offsets: expected offsets with"),
        ({"tables": [{"table": 0, "keys": [True]}]}, r"tables\[0\].keys: expected integers, got bool"),
        ({"tables": [{"table": 0, "keys": None}]}, r"tables\[0\].keys: expected integers, got NoneType"),
        ({"tables": [{"table": 0, "keys": [1], "offsets": [0, 1], "mode": ["sum"]}]}, r"tables\[0\].mode: expected one of"),
        (
            {"tables": [{"table": 0, "keys": [1], "offsets": [0, 1], "weights": ["a"]}]},
            r"tables\[0\].weights: expected lists of numbers, all of one length",
        ),
        ("[" * 200_000, "request: expected JSON"),
    ],
)
def test_malformed_requests_are_refused(change: Any, message: str) -> None:
    valid = json.loads(request_of().to_json())
    text = change if isinstance(change, str) else json.dumps({**valid, **change} if isinstance(change, dict) else change)
    with pytest.raises(ConfigError, match=message):
        Request.from_json(text)


@pytest.mark.parametrize("wrong", [None, "2", "", True, {}, "NaN", 1e39, 10**400])
def test_weights_and_rows_that_are_no_numbers_are_refused(wrong: Any) -> None:
    """NumPy would read null as NaN, "2" and true as numbers, and 1e39 as infinity."""
    table = {"table": 0, "keys": [1, 2], "offsets": [0, 2]}
    for weights in ([1, wrong], [wrong, 0.5], [wrong, wrong]):
        with pytest.raises(ConfigError, match=r"tables\[0\]\.weights: expected lists of numbers"):
            Request.from_json(json.dumps({"model": "m", "tables": [{**table, "weights": weights}]}))
    with pytest.raises(ConfigError, match=r"rows\[0\]: expected lists of numbers"):
        Response.from_json(json.dumps({"model": "m", "version": 1, "rows": [[[1, wrong]]]}))


def test_keys_that_are_not_integers_are_named() -> None:
    with pytest.raises(KeyDtypeError, match=r"tables\[0\].keys\[1\]: expected integers, got 2.5"):
        Request.from_json('{"model": "m", "tables": [{"table": 0, "keys": [1, 2.5]}]}')


def test_cut_and_foreign_messages_are_refused() -> None:
    whole = request_of().to_bytes()
    for size in range(len(whole)):
        with pytest.raises(ConfigError):
            Request.from_bytes(whole[:size])
    with pytest.raises(ConfigError, match="message: expected HPS1 at its start, got b'HPS2'"):
        Request.from_bytes(b"HPS2" + whole[4:])
    with pytest.raises(ConfigError, match="expected dtype and shape"):
        Request.from_bytes(whole.replace(b'"<i8"', b'"|O8"'))


@pytest.mark.parametrize("shape", [[0, 2**70], [0] * 100])
def test_shapes_that_numpy_lacks_are_refused(shape: list[int]) -> None:
    head = json.dumps({"model": "m", "tables": [{"table": 0, "keys": {"dtype": "<i8", "shape": shape}}]}).encode()
    with pytest.raises(ConfigError, match=r"tables\[0\].keys: expected a shape that NumPy has"):
        Request.from_bytes(struct.pack("<4sI", b"HPS1", len(head)) + head + bytes(8))


def test_dtypes_that_are_no_text_are_refused() -> None:
    head = json.dumps({"model": "m", "tables": [{"table": 0, "keys": {"dtype": ["<i8"], "shape": [0]}}]}).encode()
    with pytest.raises(ConfigError, match="expected dtype and shape"):
        Request.from_bytes(struct.pack("<4sI", b"HPS1", len(head)) + head)


def test_rows_of_several_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rows\[0\]: expected lists of numbers, all of one length"):
        Response.from_json('{"model": "m", "version": 1, "rows": [[[1, 2], [3]]]}')
