"""``hps.Init``: explicit and implicit, in graphs, under strategies and beside other processes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.framework_rig import DIM, Rig, finish, rig_of, run_program, start_program, tensorflow
from support.servers import free_port
from support.waiting import join_all

from hps_numba import ConfigError, HpsError
from hps_numba.server.registry import SERVERS

tf, keras, hps = tensorflow()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    yield rig_of(tmp_path)
    SERVERS.close()


def test_explicit_once(rig: Rig) -> None:
    ok = hps.Init(global_batch_size=64, ps_config_file=rig.path)
    assert ok.dtype == tf.string and ok.shape == () and ok.numpy() == b"OK"
    (server,) = SERVERS.opened
    assert hps.Init(global_batch_size=1, ps_config_file=Path(rig.path)).numpy() == b"OK"
    assert SERVERS.opened == [server]
    rows = hps.LookupLayer("m", 0, DIM)(tf.constant([1], tf.int64))  # the layer's own arguments at their defaults
    assert np.array_equal(rows, rig.rows[[1]]) and SERVERS.opened == [server]


def test_from_a_dict(rig: Rig) -> None:
    hps.Init(global_batch_size=8, ps_config_file=rig.config)
    assert np.array_equal(hps.LookupLayer("m", 0, DIM)(tf.constant([1])), rig.rows[[1]])


def test_implicit_by_the_first_call(rig: Rig) -> None:
    layer = hps.LookupLayer("m", 0, DIM, ps_config_file=rig.path, global_batch_size=64)
    assert SERVERS.opened == []
    assert np.array_equal(tf.function(layer)(tf.constant([1])), rig.rows[[1]]) and len(SERVERS.opened) == 1


def test_implicit_by_many_threads_at_once(rig: Rig) -> None:
    layer, start, wrong = hps.LookupLayer("m", 0, DIM, ps_config_file=rig.path), threading.Barrier(16), []

    def call() -> None:
        start.wait()
        if not np.array_equal(layer(tf.constant([1, 2])), rig.rows[1:3]):
            wrong.append(1)

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert not wrong and len(SERVERS.opened) == 1


def test_neither_explicit_nor_implicit() -> None:
    layer = hps.LookupLayer("m", 0, DIM)
    with pytest.raises(ConfigError, match="ps_config_file: expected a path or a dict, got an empty one, and no server"):
        layer(tf.constant([1]))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"global_batch_size": 0}, ConfigError, "global_batch_size: expected at least 1, got 0"),
        ({"global_batch_size": -3}, ConfigError, "global_batch_size: expected at least 1, got -3"),
        ({"global_batch_size": 1.5}, ConfigError, "global_batch_size: expected an integer, got 1.5"),
        ({"global_batch_size": 65}, ConfigError, "max_batch_size is 64"),
        ({"global_batch_size": 8, "ps_config_file": "nothing.json"}, ConfigError, "nothing.json"),
        ({"global_batch_size": 8, "ps_config_file": ""}, ConfigError, "an empty one"),
        ({}, KeyError, "global_batch_size: missing"),
    ],
)
def test_failures_raise_and_a_later_call_may_succeed(rig: Rig, arguments: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        hps.Init(**{"ps_config_file": rig.path, **arguments})
    with pytest.raises(KeyError, match="ps_config_file: missing"):
        hps.Init(global_batch_size=8)
    assert SERVERS.opened == []
    assert hps.Init(global_batch_size=8, ps_config_file=rig.path).numpy() == b"OK"


def test_a_layer_imports_nothing_that_its_config_names(rig: Rig, tmp_path: Path) -> None:
    config = {**rig.config, "volatile_db": {"type": "disabled"}, "persistent_db": {"type": "support.fakes:DictTier"}}
    layer, keys = hps.LookupLayer("m", 0, DIM, ps_config_file=config), tf.constant([1, 2])
    inputs = keras.Input((2,), dtype="int64")
    keras.Model(inputs, layer(inputs)).save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras").layers[1]
    for model in (layer, loaded, tf.function(layer)):
        with pytest.raises((ConfigError, tf.errors.OpError), match="a config inside a model never imports anything"):
            model(keys)

    @tf.function(autograph=False)
    def in_graph(**allowed: Any) -> Any:
        return hps.Init(global_batch_size=8, ps_config_file=config, **allowed)

    with pytest.raises(tf.errors.OpError, match="a config inside a model never imports anything"):
        in_graph()
    with pytest.raises(ConfigError, match="allow_code: expected a call of Init outside of a graph"):
        in_graph(allow_code=True)
    with pytest.raises(HpsError, match="allow_code=True"):
        hps.Init(global_batch_size=8, ps_config_file=config)
    hps.Init(global_batch_size=8, ps_config_file=config, allow_code=True)
    assert np.array_equal(loaded(keys), rig.rows[1:3])


def test_arguments_that_nobody_knows(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    hps.Init(global_batch_size=8, ps_config_file=rig.path, anything=1)
    assert "ignored anything" in caplog.text


def test_in_a_function(rig: Rig) -> None:
    @tf.function
    def init() -> Any:
        return hps.Init(global_batch_size=8, ps_config_file=rig.path)

    init.get_concrete_function()
    assert SERVERS.opened == []
    assert init().numpy() == b"OK" and len(SERVERS.opened) == 1


def test_graph_and_session(rig: Rig) -> None:
    with tf.compat.v1.Graph().as_default(), tf.compat.v1.Session() as session:
        ids = tf.compat.v1.placeholder(tf.int64, [None])
        init = hps.Init(global_batch_size=8, ps_config_file=rig.path)
        rows = hps.LookupLayer("m", 0, DIM)(ids)
        sums = hps.SparseLookupLayer("m", 0, DIM)(tf.compat.v1.sparse_placeholder(tf.int64, [None, 2]), combiner="sum")
        with pytest.raises(tf.errors.OpError, match="no server was initialised"):
            session.run(rows, {ids: [1]})
        assert session.run(init) == b"OK"
        assert np.array_equal(session.run(rows, {ids: [1, 2]}), rig.rows[1:3])
        assert sums.shape.as_list() == [None, DIM]


@pytest.mark.parametrize(("size", "batch", "fits"), [("2", 8, True), ("2", 7, False), ("4", 512, False), ("1", 7, True)])
def test_processes_of_mpi_share_the_batch(rig: Rig, monkeypatch: pytest.MonkeyPatch, size: str, batch: int, fits: bool) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", size)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    if fits:
        hps.Init(global_batch_size=batch, ps_config_file=rig.path)
    else:
        with pytest.raises(ConfigError, match="replicas"):
            hps.Init(global_batch_size=batch, ps_config_file=rig.path)


def test_an_invalid_size_of_mpi_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ("0", "two", ""):
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", size)
        with pytest.raises(ConfigError, match="OMPI_COMM_WORLD_SIZE"):
            hps.Init(global_batch_size=8, ps_config_file=rig.path)


def test_horovod_comes_before_mpi(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "horovod.tensorflow", SimpleNamespace(size=lambda: 3))
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a multiple of the 3 replicas"):
        hps.Init(global_batch_size=8, ps_config_file=rig.path)
    hps.Init(global_batch_size=9, ps_config_file=rig.path)


@pytest.mark.parametrize("devices", [[], [0], [1, 0], [3]])
def test_any_device_list_serves_without_a_gpu(tmp_path: Path, devices: list[int]) -> None:
    rig = rig_of(tmp_path, deployed_device_list=devices)
    hps.Init(global_batch_size=8, ps_config_file=rig.path)
    assert np.array_equal(hps.LookupLayer("m", 0, DIM)(tf.constant([1])), rig.rows[[1]])
    SERVERS.close()


_MIRRORED = """
import sys, numpy as np, tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4)
import hps_numba.frontends.tensorflow as hps
from hps_numba.server.registry import SERVERS
path, rows, DIM = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3])
strategy = tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(4)])
keras = tf.keras
assert strategy.num_replicas_in_sync == 4
with strategy.scope():
    try:
        hps.Init(global_batch_size=7, ps_config_file=path)
        raise SystemExit("7 is no multiple of 4")
    except hps_error:
        pass
    answers = hps.Init(global_batch_size=8, ps_config_file=path)
    assert [answer.numpy() for answer in answers] == [b"OK"] * 4
    assert len(SERVERS.opened) == 1
    lookup = hps.LookupLayer("m", 0, DIM, ps_config_file=path, global_batch_size=8)
    inputs = keras.Input([3], dtype="int64")
    head = keras.layers.Dense(1)
    model = keras.Model(inputs, head(keras.layers.Flatten()(lookup(inputs))))
    model.compile("sgd", "mse")
    frozen = hps.LookupLayer("m", 0, DIM, ps_config_file=path, global_batch_size=8)
assert len(model.trainable_variables) == 2
ids = np.random.default_rng(0).integers(0, len(rows), (64, 3))
seen = strategy.run(tf.function(lambda: frozen(tf.constant(ids))))
for one in strategy.experimental_local_results(seen):
    assert np.array_equal(one, rows[ids])
wanted = rows[ids].sum((1, 2))[:, None]
before = head.kernel.numpy().copy()
history = model.fit(ids, wanted, batch_size=8, epochs=3, verbose=0).history["loss"]
assert history[-1] < history[0] and not np.array_equal(before, head.kernel.numpy())
assert np.array_equal(SERVERS.opened[0].lookup(ids, "m", 0), rows[ids])
print("mirrored", history)
""".replace("hps_error", "ValueError")


def test_a_mirrored_strategy_serves_and_trains_a_head(rig: Rig, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", rig.rows)
    assert "mirrored" in run_program(_MIRRORED, rig.path, str(tmp_path / "rows.npy"), str(DIM))


_WORKER = """
import atexit, json, os, pathlib, sys, numpy as np, tensorflow as tf
from support.waiting import wait_until
path, rows, DIM = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3])
rank, folder = json.loads(os.environ["TF_CONFIG"])["task"]["index"], pathlib.Path(sys.argv[2]).parent
if rank == 0:
    atexit.register((folder / "leader is done").touch)  # whatever happens
strategy = tf.distribute.MultiWorkerMirroredStrategy()
import hps_numba.frontends.tensorflow as hps
from hps_numba.server.registry import SERVERS
assert strategy.num_replicas_in_sync == 2
with strategy.scope():
    (ok,) = hps.Init(global_batch_size=8, ps_config_file=path)
    lookup = hps.LookupLayer("m", 0, DIM, ps_config_file=path, global_batch_size=8)
    head = tf.Variable(tf.zeros([DIM, 1]))

@tf.function
def step(ids, wanted):
    def replica(ids, wanted):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((tf.reduce_sum(lookup(ids), 1) @ head - wanted) ** 2)
        gradient = tape.gradient(loss, head)
        context = tf.distribute.get_replica_context()
        mean = context.all_reduce(tf.distribute.ReduceOp.MEAN, gradient)
        down = lambda strategy, mean: strategy.extended.update(head, lambda v, g: v.assign_sub(0.02 * g), (mean,))
        context.merge_call(down, (mean,))
        return context.all_reduce(tf.distribute.ReduceOp.MEAN, loss)
    return strategy.run(replica, (ids, wanted))

random, losses = np.random.default_rng(rank), []
for _ in range(15):
    ids = random.integers(0, len(rows), (4, 3))
    assert np.array_equal(lookup(tf.constant(ids)), rows[ids])
    losses.append(float(step(tf.constant(ids), tf.constant(rows[ids].sum((1, 2))[:, None]))))
assert losses[-1] < losses[0] and len(SERVERS.opened) == 1
print("worker", float(tf.reduce_sum(head)), losses[-1], flush=True)
if rank == 0:  # who leads must not end before the others, nor they before it has what they sent
    (folder / "leader is done").touch()
    wait_until((folder / "others are gone").exists)
else:
    wait_until((folder / "leader is done").exists)
"""


def test_two_workers_of_a_multi_worker_strategy(rig: Rig, tmp_path: Path) -> None:
    import json

    np.save(tmp_path / "rows.npy", rig.rows)
    workers = [f"127.0.0.1:{port}" for port in (free_port(), free_port())]
    arguments = (rig.path, str(tmp_path / "rows.npy"), str(DIM))
    settings = [json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": i}}) for i in range(2)]
    started = [start_program(_WORKER, *arguments, TF_CONFIG=one) for one in settings]
    leader, other = started
    try:
        printed = [finish(other).split()]
    finally:
        (tmp_path / "others are gone").touch()
    printed.append(finish(leader).split())
    assert printed[0][0] == printed[1][0] == "worker" and printed[0] == printed[1]  # one head, one loss


_RANK = """
import os, sys, numpy as np, tensorflow as tf, hps_numba.frontends.tensorflow as hps
path, rows, DIM = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3])
hps.Init(global_batch_size=8, ps_config_file=path)
ids = np.random.default_rng(int(os.environ["OMPI_COMM_WORLD_RANK"])).integers(0, len(rows), (4, 3))
assert np.array_equal(hps.LookupLayer("m", 0, DIM)(tf.constant(ids)), rows[ids])
try:
    hps.Init(global_batch_size=9, ps_config_file={**__import__("json").load(open(path)), "supportlonglong": False})
except ValueError as problem:
    print("rank", problem)
"""


def test_one_process_a_rank(rig: Rig, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", rig.rows)
    arguments = (rig.path, str(tmp_path / "rows.npy"), str(DIM))
    ranks = [start_program(_RANK, *arguments, OMPI_COMM_WORLD_RANK=str(i), OMPI_COMM_WORLD_SIZE="2") for i in range(2)]
    assert all("expected a multiple of the 2 replicas, got 9" in finish(rank) for rank in ranks)
