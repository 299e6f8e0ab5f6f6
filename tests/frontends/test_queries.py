"""The queries of layers, and the answers to them: no framework is needed here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.oracles import rows_of

from hps_numba import ConfigError, HpsError, KeyDtypeError, UnknownModelError
from hps_numba.frontends import _queries
from hps_numba.frontends._queries import Query, TableQuery, answer
from hps_numba.server.registry import Servers


@pytest.fixture
def servers() -> Iterator[Servers]:
    made = Servers()
    yield made
    made.close()


def config_of(workshop: Any, **entry: Any) -> dict[str, Any]:
    return {"supportlonglong": True, "models": [workshop.model((range(20), 4), name="m", **entry)]}


#: what the first version wrote into saved graphs: every later one reads it
SAVED = (
    '{"config": "ps.json", "global_batch_size": 4, "replicas": 2, "wanted": [{"clipped": false, "combiner": null, '
    '"default_id": null, "dim": 16, "model": "m", "paired": false, "table": 0, "weighted": false}, {"clipped": true, '
    '"combiner": "sum", "default_id": 3, "dim": 8, "model": "m", "paired": true, "table": "t", "weighted": true}]}'
)


def test_text_of_saved_graphs_is_read_and_still_written() -> None:
    pooled = TableQuery("m", "t", 8, combiner="sum", weighted=True, paired=True, clipped=True, default_id=3)
    query = Query("ps.json", (TableQuery("m", 0, 16), pooled), 4, 2)
    assert Query.from_json(SAVED) == query == Query.from_json(SAVED.encode())
    assert query.to_json() == SAVED and query.encoded == SAVED.encode()


def test_a_query_round_trips_through_json() -> None:
    tables = (
        TableQuery("m", 0, 4),
        TableQuery("m", "t", 8, combiner="sum", weighted=True, paired=True, clipped=True, default_id=7),
    )
    for config in ("ps.json", {"models": [1.5, None]}):
        query = Query(config, tables, 8, 2)
        assert Query.from_json(query.encoded) == query
    with pytest.raises(ConfigError, match=r"ps_config_file: .*not JSON serializable"):
        _ = Query({"models": object()}, tables).encoded


def test_a_query_is_joined_from_pieces() -> None:
    tables = (TableQuery("m", 0, 4), TableQuery("m", "t", 8), TableQuery("m", 2, 16))
    head, pieces, tail = Query({"models": []}, tables).pieces()
    assert Query.from_json(head + ", ".join(pieces[1:]) + tail) == Query({"models": []}, tables[1:])


def test_an_answer_holds_rows_and_pooled_rows(workshop: Any, servers: Servers) -> None:
    pooled = TableQuery("m", 0, 4, combiner="sum", weighted=True, paired=True, clipped=True, default_id=5)
    query = Query(config_of(workshop), (TableQuery("m", 0, 4), pooled))
    keys, indices = np.array([[1, 2], [3, 99]]), np.array([[0, 0], [0, 1], [2, 0]])
    inputs = [keys, np.array([1, 2, 3]), indices, np.int64(4), np.array([1.0, 2.0, 0.5]), indices.copy(), np.float32(1e9)]
    rows, sums = answer(query.encoded, inputs, servers)
    assert np.array_equal(rows[0], rows_of(np.array([1, 2]), 4)) and (rows[1, 1] == -7.5).all()
    one, two, three, five = rows_of(np.array([1, 2, 3, 5]), 4)
    assert np.allclose(sums, [one + 2 * two, five, 0.5 * three, five], rtol=1e-6)
    for array in (rows, sums):
        assert array.dtype == np.float32 and array.ctypes.data % 64 == 0


def test_many_tables_are_looked_up_by_all_threads(workshop: Any, servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_queries, "SPLIT_BYTES", 1)
    config = {"supportlonglong": True, "models": [workshop.model(*[(range(20), 4 + i) for i in range(9)])]}
    query = Query(config, tuple(TableQuery("m", i, 4 + i) for i in range(9)))
    for _ in range(20):
        keys = [np.arange(i, 20) for i in range(9)]
        answers = answer(query.encoded, keys, servers)
        assert all(np.array_equal(rows, rows_of(some, 4 + i)) for i, (some, rows) in enumerate(zip(keys, answers)))
    with pytest.raises(KeyDtypeError):
        answer(query.encoded, [np.arange(3)] * 8 + [np.ones(3)], servers)


def test_a_query_reopens_its_server_after_close(workshop: Any, servers: Servers) -> None:
    config = config_of(workshop)
    text = Query(config, (TableQuery("m", 0, 4),)).encoded
    for _ in range(2):
        (rows,) = answer(text, [np.arange(5)], servers)
        assert np.array_equal(rows, rows_of(np.arange(5), 4))
        servers.close()
    assert all(server.closed for server in _queries._ready[text].servers)


@pytest.mark.parametrize(
    ("table", "error", "match"),
    [
        (TableQuery("x", 0, 4), UnknownModelError, "'x' is not deployed"),
        (TableQuery("m", 9, 4), UnknownModelError, "no table 9"),
        (TableQuery("m", 0, 5), ConfigError, "emb_vec_size: expected 4, as rows of .* have, got 5"),
    ],
)
def test_answers_refuse_unknown_models_tables_and_widths(
    workshop: Any, servers: Servers, table: TableQuery, error: type[HpsError], match: str
) -> None:
    with pytest.raises(error, match=match):
        answer(Query(config_of(workshop), (table,)).encoded, [np.arange(3)], servers)


@pytest.mark.parametrize(
    ("indices", "bags", "weights", "others", "match"),
    [
        ([[1, 0], [0, 0]], 2, [1, 1], None, "row of id 1: expected ascending .*, got 0"),
        ([[0, 0], [2, 0]], 2, [1, 1], None, "row of id 1: expected .*, got 2"),
        ([[0, 0], [1, 0]], 2, [1, 1], [[0, 0], [1, 1]], "sp_weights: expected the indices of sp_ids, got others"),
        ([[0, 0], [1, 0]], 2, [1], None, "sp_weights: expected 2 values, as many as ids, got 1"),
    ],
)
def test_answers_refuse_malformed_sparse_matrices(
    workshop: Any, servers: Servers, indices: Any, bags: int, weights: Any, others: Any, match: str
) -> None:
    query = Query(config_of(workshop), (TableQuery("m", 0, 4, combiner="sum", weighted=True, paired=True),))
    where = np.array(indices)
    inputs = [np.array([1, 2]), where, np.int64(bags), np.array(weights), where if others is None else np.array(others)]
    with pytest.raises(ConfigError, match=match):
        answer(query.encoded, inputs, servers)


def test_low_precision_rows_are_answered_as_float32(workshop: Any, servers: Servers) -> None:
    config = config_of(workshop, output_dtype="bfloat16")
    (rows,) = answer(Query(config, (TableQuery("m", 0, 4),)).encoded, [np.arange(5)], servers)
    assert np.array_equal(rows, rows_of(np.arange(5), 4))


@pytest.mark.parametrize(
    "text", ["", "x", "5", "[]", "null", "{}", '{"wanted": 5}', '{"wanted": [{}]}', b"\xff", "[" * 200_000]
)
def test_a_text_that_is_no_query_is_a_typed_error(servers: Servers, text: Any) -> None:
    with pytest.raises(ConfigError, match="request of a layer: expected what this package wrote"):
        answer(text, [np.arange(3)], servers)
