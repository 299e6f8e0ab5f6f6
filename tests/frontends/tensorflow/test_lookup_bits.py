"""``SparseLookupLayer`` gives the bits of ``tf.nn.embedding_lookup_sparse`` on the CPU.

The long form, in which every width is tried in every way: ``HPS_NUMBA_EVERY_WIDTH=1``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.framework_rig import tensorflow
from support.tensorflow_sums import LENGTHS, odd_rows, same_bits

from hps_numba.server.registry import SERVERS

tf, keras, hps = tensorflow()

KEYS = 300
DIMS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 64, 65, 100, 129, 300)
EVERY = bool(os.environ.get("HPS_NUMBA_EVERY_WIDTH"))
BATCHES = ((1,), (1, 1), (0, 3, 0, 17, 1), (200, 9, 10, 16, 65, 2), LENGTHS)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bits")
    for dim in DIMS:
        (folder / str(dim)).mkdir()
        np.arange(KEYS, dtype=np.int64).tofile(folder / str(dim) / "key")
        odd_rows(KEYS, dim).tofile(folder / str(dim) / "emb_vector")
    model = {
        "model": "bits",
        "sparse_files": [str(folder / str(dim)) for dim in DIMS],
        "embedding_table_names": [f"d{dim}" for dim in DIMS],
        "embedding_vecsize_per_table": list(DIMS),
        "maxnum_catfeature_query_per_table_per_sample": [64] * len(DIMS),
        "default_value_for_each_table": [0.0] * len(DIMS),
        "deployed_device_list": [],
        "max_batch_size": 64,
    }
    yield {"supportlonglong": True, "models": [model]}
    SERVERS.close()


def matrix(random: np.random.Generator, lengths: Any, weighted: bool) -> tuple[Any, Any]:
    """``(ids, weights)`` with so many ids a row; ids come again, and every third batch has those of odd rows."""
    indices = np.array([(row, column) for row, n in enumerate(lengths) for column in range(n)], np.int64)
    ids = random.integers(0 if random.random() < 0.3 else 8, KEYS, len(indices))
    sparse = tf.SparseTensor(indices, tf.constant(ids), [len(lengths), max(lengths)])
    weights = random.normal(size=len(ids)).astype(np.float32)
    weights[random.random(len(ids)) < 0.1] = 0.0
    return sparse, tf.SparseTensor(indices, weights, sparse.dense_shape) if weighted else None


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_pooled_rows_have_the_bits_of_tensorflow(config: Any, combiner: str, weighted: bool, mode: str) -> None:
    """Each width with each combiner: with weights in a graph and without them eagerly, or the other way round."""
    random = np.random.default_rng(5)
    turn = ("sum", "mean", "sqrtn").index(combiner) + weighted + (mode == "eager")
    for number, dim in enumerate(DIMS):
        if number % 2 != turn % 2 and not EVERY:
            continue
        rows = tf.constant(odd_rows(KEYS, dim))
        layer = hps.SparseLookupLayer("bits", f"d{dim}", dim, tf.float32, ps_config_file=config, global_batch_size=64)
        for max_norm in (None, 0.0, 0.5, 3.0):

            def ours(ids: Any, weights: Any, layer: Any = layer, max_norm: Any = max_norm) -> Any:
                return layer(ids, weights, combiner=combiner, max_norm=max_norm)

            def theirs(ids: Any, weights: Any, rows: Any = rows, max_norm: Any = max_norm) -> Any:
                return tf.nn.embedding_lookup_sparse(rows, ids, weights, combiner=combiner, max_norm=max_norm)

            if mode == "function":
                if (number + (max_norm is None)) % 3:
                    continue  # tracing takes time
                ours, theirs = tf.function(ours, reduce_retracing=True), tf.function(theirs, reduce_retracing=True)
            for lengths in BATCHES:
                ids, weights = matrix(random, lengths, weighted)
                answer, wanted = ours(ids, weights).numpy(), theirs(ids, weights).numpy()
                assert same_bits(answer[: len(wanted)], wanted), (dim, max_norm, lengths)
                assert not answer[len(wanted) :].any()


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_one_to_200_ids_a_row(config: Any, combiner: str) -> None:
    random = np.random.default_rng(6)
    layer = hps.SparseLookupLayer("bits", "d33", 33, tf.float32, ps_config_file=config, global_batch_size=64)
    for weighted in (False, True):
        ids, weights = matrix(random, range(1, 201), weighted)
        wanted = tf.nn.embedding_lookup_sparse(tf.constant(odd_rows(KEYS, 33)), ids, weights, combiner=combiner)
        assert same_bits(layer(ids, weights, combiner=combiner).numpy(), wanted.numpy())


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_without_ids_have_the_bits_of_the_safe_lookup(config: Any, combiner: str, weighted: bool) -> None:
    random = np.random.default_rng(7)
    layer = hps.SparseLookupLayer("bits", "d17", 17, tf.float32, ps_config_file=config, global_batch_size=64)
    ids, weights = matrix(random, (0, 3, 0, 20, 1, 0, 2), weighted)
    if weights is not None:  # TensorFlow drops ids whose weight is not positive
        weights = tf.SparseTensor(weights.indices, tf.abs(weights.values) + 0.1, weights.dense_shape)
    for default_id in (None, 30):
        for max_norm in (None, 0.5):
            how = {"combiner": combiner, "max_norm": max_norm, "default_id": default_id}
            wanted = tf.nn.safe_embedding_lookup_sparse(tf.constant(odd_rows(KEYS, 17)), ids, weights, **how)
            assert same_bits(layer(ids, weights, **how).numpy(), wanted.numpy()), how
