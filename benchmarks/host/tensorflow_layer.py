"""P10: the overhead of the TensorFlow layer, and a DLRM-like model with its embeddings in TensorFlow and in a server.

*Overhead.* A graph calls Python once a step. The cost of the layer beyond ``HPS.lookup(out=)`` on the same keys is compared
with a bare ``py_function`` with a fixed token that returns a ready array of the same shape, the lower bound for a call into
Python.

*DLRM* (the shape of the table published for HugeCTR HPS, with fewer rows): 26 tables of 128 columns, 13 numbers, bottom MLP
512-256-128, pairwise dot products, top MLP 1024-1024-512-256-1, one id for each table and sample. "native" are 26
``tf.Variable`` and ``tf.nn.embedding_lookup`` by row number; "hps_numba" is one ``LookupCollection``, which hashes the ids. The
embeddings only and the whole model are timed with new random ids for each call, and the rows are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from model import config_of, save_model
from others import Watch
from report import add_options, finish, print_machine, print_table, verdict

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
from tensorflow.python.ops import script_ops

import hps_numba.frontends.tensorflow as hps
from hps_numba.arrays.buffer_pool import aligned_empty
from hps_numba.server.registry import SERVERS

DIM, ROWS = 32, 100_000
BATCHES, QUICK_BATCHES = (32, 256, 2048, 16_384), (32, 256)
TABLES, QUICK_TABLES = 26, 4
WIDTH, NUMBERS = 128, 13
DLRM_ROWS, QUICK_DLRM_ROWS = 50_000, 500
DLRM_BATCHES, QUICK_DLRM_BATCHES = (32, 64, 256, 1024, 4096, 16_384), (32,)
ROUNDS, QUICK_ROUNDS = 41, 3
SECONDS, QUICK_SECONDS = 4.0, 0.2
TARGET = 1.3

Call = Callable[[int], Any]

_kept: list[Callable[..., Any]] = []  # the registry of TensorFlow holds callbacks weakly


def microseconds(calls: dict[str, Call], rounds: int, seconds: float) -> dict[str, float]:
    """Median microseconds per call, the calls in turn; fewer rounds if they would take longer than ``seconds``."""
    for call in calls.values():
        for turn in range(3):
            call(turn)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for turn in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call(turn)
            taken[name].append((time.perf_counter() - start) * 1e6)
        if turn >= 4 and time.perf_counter() > end:
            break
    return {name: statistics.median(some) for name, some in taken.items()}


# -- overhead ---------------------------------------------------------------------


def bare_call(shape: tuple[int, ...]) -> Callable[[Any], Any]:
    """A graph that gets a ready array of ``shape`` from Python, with its own token."""
    ready, token = aligned_empty(shape), f"bench.ready.{shape[0]}"
    ready[:] = 1
    _kept.append(lambda *_: [ready])
    script_ops._py_funcs._funcs[token] = _kept[-1]

    @tf.function
    def bare(ids: Any) -> Any:
        (rows,) = tf.raw_ops.PyFunc(input=[tf.constant(b"request"), ids], token=token, Tout=[tf.float32])
        rows.set_shape(shape)
        return rows

    return bare


def measure_overhead(server: Any, layer: Any, keys: np.ndarray, rows: np.ndarray, n: int, *, quick: bool) -> dict[str, float]:
    random = np.random.default_rng(n)
    numbers = [random.integers(0, len(keys), n) for _ in range(8)]
    ids = [tf.constant(keys[some]) for some in numbers]
    plain = [keys[some] for some in numbers]
    out = aligned_empty((n, DIM))
    graph = tf.function(layer).get_concrete_function(tf.TensorSpec([n], tf.int64))
    bare = bare_call((n, DIM)).get_concrete_function(tf.TensorSpec([n], tf.int64))
    if not all(np.array_equal(graph(some), rows[which]) for some, which in zip(ids, numbers, strict=True)):
        raise SystemExit(f"layer, {n} keys: wrong rows")
    calls: dict[str, Call] = {
        "layer in a graph": lambda turn: graph(ids[turn % 8]),
        "layer, eager": lambda turn: layer(ids[turn % 8]),
        "HPS.lookup(out=)": lambda turn: server.lookup(plain[turn % 8], "m", 0, out=out),
        "bare py_function": lambda turn: bare(ids[turn % 8]),
    }
    rounds, seconds = (QUICK_ROUNDS, QUICK_SECONDS) if quick else (10 * ROUNDS, SECONDS)
    return microseconds(calls, rounds, seconds)


def overhead(folder: Path, *, quick: bool) -> dict[int, dict[str, float]]:
    keys = save_model(folder / "table.model", ROWS, DIM)
    rows = np.fromfile(folder / "table.model" / "emb_vector", np.float32).reshape(-1, DIM)
    config = config_of(folder / "table.model", DIM)
    layer = hps.LookupLayer("m", 0, DIM, tf.float32, ps_config_file=config)
    server = SERVERS.open(config)
    batches = QUICK_BATCHES if quick else BATCHES
    taken = {n: measure_overhead(server, layer, keys, rows, n, quick=quick) for n in batches}
    cells = []
    for n, times in taken.items():
        added = times["layer in a graph"] - times["HPS.lookup(out=)"]
        times["added by the layer"] = added
        ratio = added / times["bare py_function"]
        cells.append([f"{n}", *(f"{value:.0f}" for value in times.values()), f"{ratio:.2f}", verdict(ratio, at_most=TARGET)])
    head = ["keys", *next(iter(taken.values())), "added / bare", "P10"]
    print_table(f"The layer, D={DIM}: us per call", head, cells)
    return taken


# -- DLRM ---------------------------------------------------------------------


def dense_model(tables: int) -> Any:
    """float32 ``[B, 13]`` and ``[B, tables, 128]`` to ``[B, 1]``."""
    numbers, rows = keras.Input([NUMBERS]), keras.Input([tables, WIDTH])
    hidden = numbers
    for units in (512, 256, 128):
        hidden = keras.layers.Dense(units, "relu")(hidden)
    both = keras.layers.Concatenate(axis=1)([keras.layers.Reshape([1, WIDTH])(hidden), rows])
    pairs = keras.layers.Dot(axes=2)([both, both])
    top = keras.layers.Concatenate()([hidden, keras.layers.Flatten()(pairs)])
    for units in (1024, 1024, 512, 256):
        top = keras.layers.Dense(units, "relu")(top)
    return keras.Model([numbers, rows], keras.layers.Dense(1)(top))


def serve_tables(folder: Path, count: int, rows: int) -> tuple[Any, list[Any]]:
    """A collection of ``count`` tables, and the same rows as variables."""
    random = np.random.default_rng(0)
    variables = []
    for table in range(count):
        values = random.random((rows, WIDTH), np.float32)
        table_folder = folder / f"t{table}.model"
        table_folder.mkdir()
        np.arange(rows).tofile(table_folder / "key")
        values.tofile(table_folder / "emb_vector")
        variables.append(tf.Variable(values, trainable=False))
    model = {
        "model": "dlrm",
        "sparse_files": [str(folder / f"t{table}.model") for table in range(count)],
        "embedding_vecsize_per_table": [WIDTH] * count,
        "maxnum_catfeature_query_per_table_per_sample": [1] * count,
        "default_value_for_each_table": [0.0] * count,
        "deployed_device_list": [],
        "max_batch_size": max(DLRM_BATCHES),
    }
    tables = {f"t{table}": (table, WIDTH) for table in range(count)}
    config = {"supportlonglong": True, "models": [model]}
    return hps.LookupCollection("dlrm", tables, ps_config_file=config), variables


def measure_dlrm(collection: Any, variables: Sequence[Any], dense: Any, batch: int, *, quick: bool) -> dict[str, float]:
    tables = len(variables)
    spec = tf.TensorSpec([tables, batch], tf.int64)
    plain = tf.TensorSpec([batch, NUMBERS], tf.float32)

    def native(ids: Any) -> Any:
        return tf.stack([tf.nn.embedding_lookup(variables[table], ids[table]) for table in range(tables)], 1)

    def ours(ids: Any) -> Any:
        rows = collection({f"t{table}": ids[table] for table in range(tables)})
        return tf.stack([rows[f"t{table}"] for table in range(tables)], 1)

    graphs = {
        "embeddings, native": tf.function(native).get_concrete_function(spec),
        "embeddings, hps_numba": tf.function(ours).get_concrete_function(spec),
        "model, native": tf.function(lambda ids, x: dense([x, native(ids)])).get_concrete_function(spec, plain),
        "model, hps_numba": tf.function(lambda ids, x: dense([x, ours(ids)])).get_concrete_function(spec, plain),
    }
    random = np.random.default_rng(batch)
    ids = [tf.constant(random.integers(0, variables[0].shape[0], (tables, batch))) for _ in range(4)]
    x = tf.constant(random.random((batch, NUMBERS), np.float32))
    expected, got = (graphs[f"embeddings, {who}"](ids[0]) for who in ("native", "hps_numba"))
    if not np.array_equal(expected, got):
        raise SystemExit(f"DLRM, batch {batch}: wrong rows")

    def call_of(graph: Any, *more: Any) -> Call:
        return lambda turn: graph(ids[turn % 4], *more)

    calls = {name: call_of(graph, *([x] if name.startswith("model") else [])) for name, graph in graphs.items()}
    return microseconds(calls, *((QUICK_ROUNDS, QUICK_SECONDS) if quick else (ROUNDS, 2 * SECONDS)))


def dlrm(folder: Path, *, quick: bool) -> dict[int, dict[str, float]]:
    tables, rows = (QUICK_TABLES, QUICK_DLRM_ROWS) if quick else (TABLES, DLRM_ROWS)
    collection, variables = serve_tables(folder, tables, rows)
    dense = dense_model(tables)
    batches = QUICK_DLRM_BATCHES if quick else DLRM_BATCHES
    taken = {batch: measure_dlrm(collection, variables, dense, batch, quick=quick) for batch in batches}
    cells = []
    for batch, times in taken.items():
        ratios = [times[f"{what}, native"] / times[f"{what}, hps_numba"] for what in ("embeddings", "model")]
        cells.append([f"{batch}", *(f"{value:.0f}" for value in times.values()), *(f"{ratio:.2f}" for ratio in ratios)])
    head = ["batch", *next(iter(taken.values())), "embeddings: native / ours", "model: native / ours"]
    print_table(f"DLRM, {tables} tables of {rows} rows, D={WIDTH}: us per batch", head, cells)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description="The TensorFlow layer: overhead, and a DLRM-like model (P10).")
    options = add_options(parser).parse_args()
    print_machine(f"TensorFlow {tf.__version__} on the CPU: medians", quick=options.quick)
    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="hps_tensorflow_") as folder:
        layer = overhead(Path(folder), quick=options.quick)
        model = dlrm(Path(folder), quick=options.quick)
    SERVERS.close()
    if watch.disturbed:
        print(f"note: other programs kept {watch.cores():.1f} cores busy\n")
    finish(options.json, quick=options.quick, dim=DIM, layer_us=layer, dlrm_us=model, cores_of_others=watch.cores())


if __name__ == "__main__":
    main()
