"""A real Triton 2.51: rows exact over HTTP and gRPC, errors, instances, load and unload, versions, ensembles."""

from __future__ import annotations

import json
import shutil
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import triton
from support.dense_programs import scores_of
from support.docs import blocks_of
from support.oracles import assert_same_bits, rows_of
from support.processes import ROOT
from support.redis_servers import one_server
from support.services import DIM
from support.shared_memory import new_name
from support.triton_clients import TritonClient
from support.triton_models import ROWS, Served
from support.waiting import HANG_SECONDS, wait_until

import hps_numba
from hps_numba.frontends.triton.repository import RepositoryOptions

pytestmark = pytest.mark.xdist_group("triton")

FLAT = {"KEYS": np.array([[3, 1, 4, ROWS, 5]]), "NUMKEYS": np.array([[2, 3]], np.int32)}
ABSENT = np.float32(-8.5)  # the default value of the second table


@pytest.fixture(params=["http", "grpc"])
def client(served: Served, request: pytest.FixtureRequest) -> TritonClient:
    return served.clients[request.param]


# -- rows ---------------------------------------------------------------------


def test_flat(client: TritonClient) -> None:
    expected = [rows_of([3, 1], 4).ravel(), rows_of([4], 8).ravel(), np.full(8, ABSENT), rows_of([5], 8).ravel()]
    answer = client.ask("m", FLAT)
    assert list(answer) == ["OUTPUT0"]
    assert_same_bits(answer["OUTPUT0"], np.concatenate(expected)[None])


def test_flat_with_no_key_of_some_tables(client: TritonClient) -> None:
    answer = client.ask("m", {"KEYS": np.array([[7]]), "NUMKEYS": np.array([[0, 1]], np.int32)})
    assert_same_bits(answer["OUTPUT0"], rows_of([7], 8))
    empty = client.ask("m", {"KEYS": np.empty((1, 0), np.int64), "NUMKEYS": np.zeros((1, 2), np.int32)})
    assert empty["OUTPUT0"].shape == (1, 0)


@pytest.mark.parametrize("n", [0, 1, 32, 8192])
def test_named(client: TritonClient, n: int) -> None:
    keys = np.random.default_rng(n).integers(0, ROWS, n)
    answer = client.ask("m", {"user": keys, "item": keys[::-1].copy()})
    assert list(answer) == ["user", "item"]
    assert_same_bits(answer["user"], rows_of(keys, 4))
    assert_same_bits(answer["item"], rows_of(keys[::-1], 8))


def test_the_outputs_that_are_wanted(client: TritonClient) -> None:
    answer = client.ask("m", {"user": [1], "item": [2]}, ["item"])
    assert_same_bits(answer["item"], rows_of([2], 8))
    assert list(answer) == ["item"]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_pooled(served: Served, client: TritonClient, mode: str) -> None:
    keys, offsets, weights = np.array([3, 1, 4, 1, 5]), np.array([0, 2, 2, 5]), np.array([1, 2, 0.5, 1, 3], np.float32)
    answer = client.ask("m", {"item": keys, "item.offsets": offsets, "item.weights": weights}, mode=mode)
    with hps_numba.HPS(served.folder / "m.json") as server:
        assert_same_bits(answer["item"], server.lookup_pooled(keys, offsets, "m", "item", weights=weights, combiner=mode))


def test_float16(client: TritonClient) -> None:
    answer = client.ask("m", {"item": [3, 4]}, output_dtype="FP16")
    np.testing.assert_array_equal(answer["item"], rows_of([3, 4], 8).astype(np.float16), strict=True)


def test_json(served: Served) -> None:
    body = {"inputs": [{"name": "user", "datatype": "INT64", "shape": [2], "data": [3, 4]}]}
    request = urllib.request.Request(f"http://{served.server.http}/v2/models/m/infer", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=HANG_SECONDS) as told:
        (output,) = json.load(told)["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("user", "FP32", [2, 4])
    assert output["data"] == rows_of([3, 4], 4).ravel().tolist()


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ({"KEYS": FLAT["KEYS"]}, [], "inputs: expected tables of user, item, got 'KEYS'"),
        ({**FLAT, "user": [1]}, [], "inputs: expected KEYS and NUMKEYS alone, got user too"),
        ({**FLAT, "NUMKEYS": np.array([[2, 4]], np.int32)}, [], "NUMKEYS: expected counts whose sum is 5"),
        ({**FLAT, "NUMKEYS": np.array([[6, -1]], np.int32)}, [], "NUMKEYS: expected counts whose sum is 5"),
        ({**FLAT, "NUMKEYS": np.array([[5]], np.int32)}, [], "NUMKEYS: expected 2 counts, one for each table"),
        ({"user": [1], "user.offsets": [0, 2]}, [], "offsets: expected 0 to 1, the number of keys"),
        ({"user": [1]}, ["OUTPUT0"], "outputs: expected some of user, got OUTPUT0"),
        ({"user": [[1]]}, [], "unexpected shape for input 'user'"),
        ({"user": np.array([1], np.int32)}, [], "data-type is 'INT32', but model 'm' expects 'INT64'"),
        ({"users": [1]}, [], "unexpected inference input 'users' for model 'm'"),
    ],
)
def test_wrong_requests(client: TritonClient, inputs: Any, outputs: list[str], message: str) -> None:
    status, told = client.error("m", inputs, outputs)
    assert status == "400" and message in told
    assert ".py" not in told and "At:" not in told


def test_wrong_parameters(client: TritonClient) -> None:
    assert client.error("m", {"user": [1]}, output_dtype="FP8")[0] == "400"
    assert client.error("m", {"user": [1], "user.offsets": [0, 1]}, mode="median")[0] == "400"


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_system_shared_memory(served: Served, protocol: str) -> None:
    regions = pytest.importorskip("tritonclient.utils.shared_memory")
    client, keys = served.clients[protocol], np.arange(8192)
    sizes = {"in": keys.nbytes, "out": len(keys) * 8 * 4}
    made = {name: regions.create_shared_memory_region(name, f"/{new_name()}", size) for name, size in sizes.items()}

    def unregistered() -> bool:
        try:
            client.raw.unregister_system_shared_memory()
        except client.module.InferenceServerException:  # Triton ends a request some time after it has answered it
            return False
        return True

    try:
        regions.set_shared_memory_region(made["in"], [keys])
        for name, region in made.items():
            client.raw.register_system_shared_memory(name, region._shm_key, sizes[name])
        given, wanted = client.module.InferInput("item", keys.shape, "INT64"), client.module.InferRequestedOutput("item")
        given.set_shared_memory("in", sizes["in"])
        wanted.set_shared_memory("out", sizes["out"])
        client.raw.infer("m", [given], outputs=[wanted])
        rows = regions.get_contents_as_numpy(made["out"], np.float32, (len(keys), 8))
        assert_same_bits(rows.copy(), rows_of(keys, 8))
        del rows
    finally:
        wait_until(unregistered)
        for region in made.values():
            regions.destroy_shared_memory_region(region)


def test_a_model_that_batches(client: TritonClient) -> None:
    answer = client.ask("batched", FLAT)["OUTPUT0"]
    assert_same_bits(answer, client.ask("m", FLAT)["OUTPUT0"])
    keys = np.arange(12).reshape(4, 3)
    assert_same_bits(client.ask("batched", {"user": keys, "item": keys})["item"], rows_of(keys, 8))
    status, told = client.error("batched", {"user": np.zeros((17, 1), np.int64)})
    assert status == "400" and "must be <= 16" in told


def test_the_client_of_the_page(served: Served) -> None:
    text = next(block.text for block in blocks_of(ROOT / "docs" / "triton.md") if block.language == "py")
    assert "localhost:8001" in text
    exec(text.replace("localhost:8001", served.server.grpc), {})


# -- instances ---------------------------------------------------------------------


def test_instances_answer_at_a_time_from_shared_rows(served: Served) -> None:
    def work(worker: int) -> None:
        generator = np.random.default_rng(worker)
        client = TritonClient("grpc", served.server.grpc)
        for _ in range(20):
            keys = generator.integers(0, ROWS, generator.integers(0, 200))
            assert_same_bits(client.ask("shared", {"item": keys})["item"], rows_of(keys, 8))
        client.close()

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, worker) for worker in range(6)]:
            done.result(HANG_SECONDS)


def test_a_row_that_another_process_writes_reaches_all_instances(served: Served) -> None:
    with hps_numba.HPS(served.folder / "shared.json") as server:
        new = np.arange(8, dtype=np.float32)[None] - 5
        server.update([17], new, "shared", "item")
        for _ in range(12):
            assert_same_bits(served.clients["http"].ask("shared", {"item": [17]})["item"], new)
        server.update([17], rows_of([17], 8), "shared", "item")


def test_counts_are_among_tritons_metrics(served: Served) -> None:
    def keys() -> float:
        lines = [line for line in served.server.metric_lines() if line.startswith("hps_keys_total")]
        values = [float(line.split()[-1]) for line in lines if 'model="shared"' in line and 'table="user"' in line]
        return sum(values)

    before = keys()
    for _ in range(9):
        served.clients["http"].ask("shared", {"user": np.arange(100)})
    wait_until(lambda: keys() >= before + 900)
    assert keys() == before + 900


# -- loading ---------------------------------------------------------------------


def test_load_and_unload(served: Served, client: TritonClient) -> None:
    client.raw.unload_model("m")
    wait_until(lambda: not client.raw.is_model_ready("m"))
    status, told = client.error("m", {"user": [1]})
    assert status in ("400", "404", "503") and "m" in told
    client.raw.load_model("m")
    assert_same_bits(client.ask("m", {"user": [1]})["user"], rows_of([1], 4))


def test_a_new_version_takes_over_while_requests_go_on(served: Served) -> None:
    client, stop = served.clients["grpc"], threading.Event()
    seen: list[list[int]] = [[], []]  # of each client: an answer of one may come later than a newer one of the other

    def ask(of_client: list[int]) -> None:
        own = TritonClient("http", served.server.http)
        keys = np.arange(0, ROWS, 97)
        while not stop.is_set():
            answer = own.ask("changing", {"user": keys, "item": keys})
            stamps = {float(answer["user"][0, 0] // 1), float(answer["item"][0, 0] // 1)}
            (stamp,) = stamps  # both tables are of one version
            shift = int(np.log2(stamp))
            assert_same_bits(answer["item"], rows_of(keys, 8, shift))
            of_client.append(shift)
        own.close()

    def all_saw(version: int) -> bool:
        return all(one and one[-1] == version for one in seen) or any(work.done() for work in works)

    with ThreadPoolExecutor(2) as pool:
        works = [pool.submit(ask, one) for one in seen]
        try:
            wait_until(lambda: all_saw(0))
            for number, (keys, dim) in enumerate([(range(ROWS), 4), (range(ROWS), 8)]):
                replace_table(served, f"changing_{number}.model", keys, dim)
            shutil.copytree(served.models / "changing" / "1", served.models / "changing" / "2")
            client.raw.load_model("changing")
            wait_until(lambda: all_saw(1))
        finally:
            stop.set()
        for work in works:
            work.result(HANG_SECONDS)
    assert all(one == sorted(one) and {*one} == {0, 1} for one in seen)
    assert client.raw.is_model_ready("changing", "2")
    wait_until(lambda: not client.raw.is_model_ready("changing", "1"))


def replace_table(served: Served, name: str, keys: Any, dim: int) -> None:
    """New rows in the place of a sparse model; its files are complete at any moment."""
    fresh = Path(served.workshop.table(f"new_{name}", keys, dim, stamp=1))
    for file in fresh.iterdir():
        file.replace(served.folder / name / file.name)


def test_a_model_that_cannot_be_loaded_says_why(served: Served, client: TritonClient) -> None:
    if not (served.models / "broken").exists():
        served.write("broken", ["user", "item"])
    shutil.rmtree(served.folder / "broken_1.model")
    with pytest.raises(client.failure, match=r"broken_1\.model"):
        client.raw.load_model("broken")
    assert not client.raw.is_model_ready("broken")
    served.workshop.table("broken_1.model", range(ROWS), 8)
    client.raw.load_model("broken")
    assert_same_bits(client.ask("broken", {"item": [7]})["item"], rows_of([7], 8))
    client.raw.unload_model("broken")
    wait_until(lambda: not client.raw.is_model_ready("broken") and client.raw.is_server_ready())


def test_the_timer_refreshes_what_caches_have(served: Served, tmp_path: Path) -> None:
    """A row that another process writes to Redis reaches a model whose only copy is in its cache."""
    with one_server(tmp_path / "redis") as redis:
        tiers = [{"type": "redis_cluster", "address": redis.address}]
        options = RepositoryOptions(refresh_interval=0.05)
        path = served.write("far", ["user"], options, rows=100, dims=(DIM,), tiers=tiers, cache_on_cpu=True)
        client = served.clients["http"]
        client.raw.load_model("far")
        try:
            new = np.full((1, DIM), 3, np.float32)
            assert_same_bits(client.ask("far", {"user": [5]})["user"], rows_of([5], DIM))
            elsewhere = json.loads(path.read_text())
            elsewhere["tiers"][0]["initialize_after_startup"] = False
            with hps_numba.HPS({**elsewhere, "cache_on_cpu": False}) as server:
                server.update([5], new, "far", "user")
            wait_until(lambda: np.array_equal(client.ask("far", {"user": [5]})["user"], new))
        finally:
            client.raw.unload_model("far")
            wait_until(lambda: not client.raw.is_model_ready("far"))


# -- whole models ---------------------------------------------------------------------


def test_an_ensemble_with_a_dense_model_gives_exact_scores(client: TritonClient) -> None:
    user, item, dense = np.array([[1, 2], [3, 4], [5, 6]]), np.array([7, 8, 9]), np.ones((3, 3), np.float32)
    answer = client.ask("scored_scores", {"user": user, "item": item, "dense": dense})
    expected = scores_of(user=rows_of(user, 4), item=rows_of(item, 8), dense=dense)
    np.testing.assert_array_equal(answer["OUTPUT0"], expected, strict=True)


def test_an_ensemble_pools(client: TritonClient) -> None:
    user, dense = np.array([[1, 2], [3, 4]]), np.zeros((2, 3), np.float32)
    bags = {"item": np.array([7, 8, 9]), "item.offsets": np.array([0, 2, 3])}
    answer = client.ask("scored_scores", {"user": user, "dense": dense, **bags})
    pooled = np.stack([rows_of([7, 8], 8).sum(0), rows_of([9], 8)[0]])
    np.testing.assert_array_equal(answer["OUTPUT0"], scores_of(user=rows_of(user, 4), item=pooled, dense=dense), strict=True)


def test_a_request_that_the_dense_model_refuses(client: TritonClient) -> None:
    wrong = {"user": np.array([[1, 2]]), "item": np.array([1, 2]), "dense": np.zeros((1, 3), np.float32)}
    status, told = client.error("scored_scores", wrong)
    assert status == "400" and "scored_dense" in told and ".py" not in told


# -- load ---------------------------------------------------------------------


def test_perf_analyzer(served: Served, tmp_path: Path) -> None:
    keys = {"KEYS": {"content": list(range(32)), "shape": [1, 32]}, "NUMKEYS": {"content": [16, 16], "shape": [1, 2]}}
    (tmp_path / "keys.json").write_text(json.dumps({"data": [keys]}))
    told = triton.perf_analyzer(
        "-m", "m", "-u", served.server.grpc, "-i", "grpc", "--input-data", str(tmp_path / "keys.json"),
        "--measurement-mode", "count_windows", "--measurement-request-count", "20", "--max-trials", "3", "-s", "99999",
    )  # fmt: skip
    assert "Throughput:" in told and "Error" not in told, told
