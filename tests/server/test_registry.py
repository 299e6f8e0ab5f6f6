"""The servers of a process, by config, and the requests of layers, without any framework."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.oracles import rows_of

from hps_numba import ArrayError, ConfigError, HpsError, KeyDtypeError, UnknownModelError
from hps_numba.frontends import _requests
from hps_numba.frontends._requests import Request, TableQuery, answer
from hps_numba.server.registry import Servers


@pytest.fixture
def servers() -> Iterator[Servers]:
    made = Servers()
    yield made
    made.close()


def config_of(workshop: Any, *names: str, **entry: Any) -> dict[str, Any]:
    return {"supportlonglong": True, "models": [workshop.model((range(20), 4), name=name, **entry) for name in names or ("m",)]}


def file_of(workshop: Any, config: dict[str, Any], name: str = "ps.json") -> str:
    path = workshop.folder / name
    path.write_text(json.dumps(config))
    return str(path)


def test_equal_configs_share_a_server(workshop: Any, servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(workshop)
    path = file_of(workshop, config)
    first = servers.open(path)
    monkeypatch.chdir(workshop.folder)
    assert servers.open("ps.json") is first
    second = servers.open(config)
    assert second is not first and servers.open(json.loads(json.dumps(config))) is second
    assert servers.opened == [first, second]
    first.close()
    assert servers.opened == [second] and servers.open(path) is not first


def test_threads_share_the_server_that_one_of_them_builds(workshop: Any, servers: Servers) -> None:
    config, found, start = config_of(workshop), [], threading.Barrier(8)

    def open_server() -> None:
        start.wait()
        found.append(servers.open(config))

    threads = [threading.Thread(target=open_server) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len({id(server) for server in found}) == 1


def test_a_failed_open_can_be_retried(workshop: Any, servers: Servers) -> None:
    config = config_of(workshop)
    path = file_of(workshop, {**config, "models": []})
    with pytest.raises(ConfigError):
        servers.open(path)
    file_of(workshop, config)
    assert servers.open(path).models == ("m",)


@pytest.mark.parametrize(
    ("batch", "replicas", "match"),
    [
        (0, 1, "global_batch_size: 0 came, at least 1"),
        (3, 2, "global_batch_size: 3 came, a multiple of the 2 replicas"),
        (10, 2, r"5 for each of 2 replicas, but models\[0\].max_batch_size is 4"),
    ],
)
def test_open_refuses_a_batch_that_replicas_cannot_share(
    workshop: Any, servers: Servers, batch: int, replicas: int, match: str
) -> None:
    config = config_of(workshop)
    with pytest.raises(ConfigError, match=match):
        servers.open(config, global_batch_size=batch, replicas=replicas)
    assert servers.opened == []
    servers.open(config, global_batch_size=8, replicas=2)
    servers.open(config, global_batch_size=batch, replicas=replicas)  # the server is there: the first call decides


def test_an_empty_config_finds_the_only_server_with_the_model(workshop: Any, servers: Servers) -> None:
    with pytest.raises(ConfigError, match="ps_config_file: an empty one came"):
        servers.of_model("", "m")
    first = servers.open(config_of(workshop, "a", "b"))
    second = servers.open(config_of(workshop, "b", "c"))
    assert servers.of_model("", "a") is first and servers.of_model("", "c") is second
    with pytest.raises(UnknownModelError, match="several have it"):
        servers.of_model("", "b")
    with pytest.raises(UnknownModelError, match=r"'d' came without ps_config_file.* they have a, b, c"):
        servers.of_model("", "d")


def test_a_request_round_trips_through_json() -> None:
    queries = (
        TableQuery("m", 0, 4),
        TableQuery("m", "t", 8, combiner="sum", weighted=True, paired=True, clipped=True, default_id=7),
    )
    for config in ("ps.json", {"models": [1.5, None]}):
        request = Request(config, queries, 8, 2)
        assert Request.of_text(request.text) == request
    with pytest.raises(ConfigError, match=r"ps_config_file: .*not JSON serializable"):
        _ = Request({"models": object()}, queries).text


def test_a_request_is_joined_from_pieces() -> None:
    queries = (TableQuery("m", 0, 4), TableQuery("m", "t", 8), TableQuery("m", 2, 16))
    head, pieces, tail = Request({"models": []}, queries).pieces()
    assert Request.of_text(head + ", ".join(pieces[1:]) + tail) == Request({"models": []}, queries[1:])


def test_an_answer_holds_rows_and_pooled_rows(workshop: Any, servers: Servers) -> None:
    pooled = TableQuery("m", 0, 4, combiner="sum", weighted=True, paired=True, clipped=True, default_id=5)
    request = Request(config_of(workshop), (TableQuery("m", 0, 4), pooled))
    keys, indices = np.array([[1, 2], [3, 99]]), np.array([[0, 0], [0, 1], [2, 0]])
    inputs = [keys, np.array([1, 2, 3]), indices, np.int64(4), np.array([1.0, 2.0, 0.5]), indices.copy(), np.float32(1e9)]
    rows, sums = answer(request.text, inputs, servers)
    assert np.array_equal(rows[0], rows_of(np.array([1, 2]), 4)) and (rows[1, 1] == -7.5).all()
    one, two, three, five = rows_of(np.array([1, 2, 3, 5]), 4)
    assert np.allclose(sums, [one + 2 * two, five, 0.5 * three, five], rtol=1e-6)
    for array in (rows, sums):
        assert array.dtype == np.float32 and array.ctypes.data % 64 == 0


def test_many_tables_are_looked_up_by_all_threads(workshop: Any, servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_requests, "SPLIT_BYTES", 1)
    config = {"supportlonglong": True, "models": [workshop.model(*[(range(20), 4 + i) for i in range(9)])]}
    request = Request(config, tuple(TableQuery("m", i, 4 + i) for i in range(9)))
    for _ in range(20):
        keys = [np.arange(i, 20) for i in range(9)]
        answers = answer(request.text, keys, servers)
        assert all(np.array_equal(rows, rows_of(some, 4 + i)) for i, (some, rows) in enumerate(zip(keys, answers)))
    with pytest.raises(KeyDtypeError):
        answer(request.text, [np.arange(3)] * 8 + [np.ones(3)], servers)


def test_a_request_reopens_its_server_after_close(workshop: Any, servers: Servers) -> None:
    config = config_of(workshop)
    text = Request(config, (TableQuery("m", 0, 4),)).text
    for _ in range(2):
        (rows,) = answer(text, [np.arange(5)], servers)
        assert np.array_equal(rows, rows_of(np.arange(5), 4))
        servers.close()
    assert all(server.closed for server in _requests._ready[text].servers)


@pytest.mark.parametrize(
    ("query", "error", "match"),
    [
        (TableQuery("x", 0, 4), UnknownModelError, "'x' is not deployed"),
        (TableQuery("m", 9, 4), UnknownModelError, "no table 9"),
        (TableQuery("m", 0, 5), ConfigError, "emb_vec_size: 5 came, rows of .* have 4 elements"),
    ],
)
def test_answers_refuse_unknown_models_tables_and_widths(
    workshop: Any, servers: Servers, query: TableQuery, error: type[HpsError], match: str
) -> None:
    with pytest.raises(error, match=match):
        answer(Request(config_of(workshop), (query,)).text, [np.arange(3)], servers)


@pytest.mark.parametrize(
    ("indices", "bags", "weights", "others", "match"),
    [
        ([[1, 0], [0, 0]], 2, [1, 1], None, "row of id 1: expected ascending .*, got 0"),
        ([[0, 0], [2, 0]], 2, [1, 1], None, "row of id 1: expected .*, got 2"),
        ([[0, 0], [1, 0]], 2, [1, 1], [[0, 0], [1, 1]], "sp_weights: its indices differ"),
        ([[0, 0], [1, 0]], 2, [1], None, "sp_weights: 1 values came, 2 are wanted"),
    ],
)
def test_answers_refuse_malformed_sparse_matrices(
    workshop: Any, servers: Servers, indices: Any, bags: int, weights: Any, others: Any, match: str
) -> None:
    request = Request(config_of(workshop), (TableQuery("m", 0, 4, combiner="sum", weighted=True, paired=True),))
    where = np.array(indices)
    inputs = [np.array([1, 2]), where, np.int64(bags), np.array(weights), where if others is None else np.array(others)]
    with pytest.raises(ConfigError, match=match):
        answer(request.text, inputs, servers)


def test_low_precision_rows_are_answered_as_float32(workshop: Any, servers: Servers) -> None:
    config = config_of(workshop, output_dtype="bfloat16")
    (rows,) = answer(Request(config, (TableQuery("m", 0, 4),)).text, [np.arange(5)], servers)
    assert np.array_equal(rows, rows_of(np.arange(5), 4))


def test_lookup_into_writes_float32_rows(workshop: Any, servers: Servers) -> None:
    server = servers.open(config_of(workshop, output_dtype="float16"))
    out = np.empty((2, 3, 4), np.float32)
    keys = np.arange(6).reshape(2, 3).astype(np.uint32)
    server.lookup_into(keys, "m", 0, out)
    assert np.array_equal(out, rows_of(keys, 4))
    for wrong in (np.empty((2, 3, 5), np.float32), np.empty((2, 3, 4)), np.empty((2, 3, 8), np.float32)[..., ::2]):
        with pytest.raises(ArrayError, match=r"out: float.* came, contiguous writable float32\[2, 3, 4\]"):
            server.lookup_into(keys, "m", 0, wrong)


def test_a_missing_config_file_is_named(workshop: Any, servers: Servers, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.json"):
        servers.open(str(tmp_path / "nothing.json"))
