"""Whole models of TensorFlow behind a server: SavedModels and Keras files, with the rows of the server that serves."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.framework_rig import export, tensorflow
from support.oracles import rows_of
from support.waiting import wait_until

from hps_numba import HPS
from hps_numba.errors import ClosedError, ConfigError, ModelFileError, TierError
from hps_numba.frontends.inference.batching import BatchedModel
from hps_numba.frontends.inference.problems import InferenceError, message_of
from hps_numba.frontends.inference.programs import open_program
from hps_numba.frontends.inference.tensors import InferenceRequest, TensorSpec
from hps_numba.updates import open_producer

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # Keras, when it saves a model
SIZE, DIM = 20, 4
ELSEWHERE = "/of/the/machine/that/trained.json"


@pytest.fixture(scope="module")
def keras() -> Any:
    return tensorflow()[1]


@pytest.fixture
def server(workshop: Workshop) -> HPS:
    return workshop.open(
        workshop.model((range(SIZE), DIM), (range(SIZE), 8), embedding_table_names=["item", "user"], max_batch_size=64)
    )


def scorer(keras: Any, scale: float = 1.0, named: bool = True) -> Any:
    """The sum of two looked-up rows, times ``scale``."""
    _, _, hps = tensorflow()
    ids = keras.Input([2], dtype="int64", **({"name": "ids"} if named else {}))
    rows = keras.layers.Flatten()(hps.LookupLayer("m", 0, DIM, ps_config_file=ELSEWHERE)(ids))
    start = keras.initializers.Constant(scale)
    return keras.Model(ids, keras.layers.Dense(1, use_bias=False, kernel_initializer=start, name="score")(rows))


def both(keras: Any, folder: Path, scale: float = 1.0, name: str = "scorer", **more: Any) -> list[Path]:
    model = scorer(keras, scale, **more)
    model.save(folder / f"{name}.keras")
    return [folder / f"{name}.keras", Path(export(model, folder / name))]


def score(ids: Any, scale: float = 1.0, stamp: int = 0) -> np.ndarray:
    ids = np.asarray(ids)
    return rows_of(ids.ravel(), DIM, stamp).reshape(len(ids), -1).sum(1, keepdims=True) * scale


def ask(model: Any, ids: Any, **more: Any) -> Any:
    return model.infer(InferenceRequest(model.name, {model.inputs[0].name: np.asarray(ids)}, **more))


def test_ids_give_scores_by_the_rows_of_the_server(keras: Any, server: HPS, tmp_path: Path) -> None:
    for path in both(keras, tmp_path):
        model = open_program("scorer", path, server)
        assert model.inputs == (TensorSpec("ids", "INT64", (-1, 2)),)
        assert [spec.shape for spec in model.outputs] == [(-1, 1)] and model.max_batch_size == 64
        (output,) = (spec.name for spec in model.outputs)
        answer = ask(model, [[1, 2], [3, 4]], id="7", version="1")
        np.testing.assert_allclose(answer.outputs[output], score([[1, 2], [3, 4]]), rtol=1e-5)
        assert (answer.model, answer.id, model.platform) == ("scorer", "7", "tensorflow_savedmodel")
        ids = np.array([[1, 2]])
        ids.flags.writeable = False
        np.testing.assert_allclose(ask(model, ids).outputs[output], score(ids), rtol=1e-5)
    before = ask(model, [[1, 1]]).outputs[output]
    server.update([1], np.full((1, DIM), 9.0), "m", 0)
    assert before != 72 and ask(model, [[1, 1]]).outputs[output] == 72


def test_an_input_that_keras_numbers_gets_a_name_that_lasts(keras: Any, server: HPS, tmp_path: Path) -> None:
    _, _, hps = tensorflow()
    layers = [keras.Input([2], dtype="int64"), hps.LookupLayer("m", 0, DIM, ps_config_file=ELSEWHERE), keras.layers.Flatten()]
    model = keras.Sequential(layers)
    model.save(tmp_path / "plain.keras")
    paths = [tmp_path / "plain.keras", Path(export(model, tmp_path / "plain"))]
    names = [open_program("plain", path, server).inputs[0].name for path in (*paths, *paths)]
    assert len(set(names[::2])) == 1 and len(set(names)) <= 2
    assert not any(name.startswith("keras_tensor") for name in names)


def test_dict_inputs_and_sparse_lookups(keras: Any, server: HPS, tmp_path: Path) -> None:
    tf, _, hps = tensorflow()

    class Both(tf.Module):
        @tf.function(
            input_signature=[
                {"item": tf.TensorSpec([None], tf.int64, "item"), "user": tf.TensorSpec([None, 3], tf.int32, "user")}
            ]
        )
        def serve(self, ids: Any) -> Any:
            table = hps.Table("m", "user", 8, ELSEWHERE)
            pooled = hps.embedding_lookup_sparse(table, tf.RaggedTensor.from_tensor(ids["user"]), combiner="sum")
            item = hps.embedding_lookup(hps.Table("m", "item", DIM, ELSEWHERE), ids["item"])
            return {"score": tf.reduce_sum(pooled, 1) + tf.reduce_sum(item, 1), "half": tf.cast(pooled, tf.bfloat16)}

    module = Both()
    tf.saved_model.save(module, str(tmp_path / "both"), signatures={"rank": module.serve})
    model = open_program("both", tmp_path / "both", server, signature="rank")
    assert {spec.name: spec.datatype for spec in model.inputs} == {"item": "INT64", "user": "INT32"}
    inputs = {"item": np.array([3, 4]), "user": np.arange(6, dtype=np.int32).reshape(2, 3)}
    answer = model.infer(InferenceRequest("both", inputs))
    pooled = server.lookup_pooled(range(6), [0, 3, 6], "m", "user")
    np.testing.assert_allclose(answer.outputs["score"], pooled.sum(1) + server.lookup([3, 4], "m", "item").sum(1), rtol=1e-5)
    assert answer.outputs["half"].dtype == np.float32
    with pytest.raises(ConfigError, match="expected a signature of rank, got 'serving_default'"):
        open_program("both", tmp_path / "both", server)


def test_requests_are_joined(keras: Any, server: HPS, tmp_path: Path) -> None:
    batched = BatchedModel(open_program("scorer", both(keras, tmp_path)[1], server), max_calls=1, max_delay=0.001)
    ids = [np.random.default_rng(n).integers(0, SIZE, (n % 4 + 1, 2)) for n in range(40)]
    ask(batched, ids[0])
    futures = [batched.submit(InferenceRequest("scorer", {"ids": some})) for some in ids]
    for some, future in zip(ids, futures):
        np.testing.assert_allclose(*future.result().outputs.values(), score(some), rtol=1e-5)
    assert batched.stats().calls < 30
    batched.close()


def test_wrong_requests_and_programs_that_fail(keras: Any, server: HPS, tmp_path: Path, caplog: Any) -> None:
    tf, _, hps = tensorflow()

    class Broken(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.int64, name="ids")])
        def serve(self, ids: Any) -> Any:
            tf.debugging.assert_less(ids, tf.constant(10, tf.int64), "secret of the model")
            return hps.embedding_lookup(hps.Table("m", 0, DIM, ELSEWHERE), ids)

    module = Broken()
    tf.saved_model.save(module, str(tmp_path / "broken"), signatures=module.serve)
    model = open_program("broken", tmp_path / "broken", server)
    assert ask(model, [3]).outputs["output_0"].shape == (1, DIM)
    with pytest.raises(InferenceError, match="its program failed with InvalidArgumentError") as told:
        ask(model, [13])
    assert told.value.status == 500 and "secret" not in message_of(told.value) and "secret" in caplog.text
    caplog.clear()
    with pytest.raises(InferenceError, match=r"ids: expected shape \[-1\], got \[1, 1\]"):
        ask(model, [[1]])


def test_errors_of_lookups_keep_their_kind(keras: Any, server: HPS, tmp_path: Path, monkeypatch: Any) -> None:
    from hps_numba.frontends import _queries

    model = open_program("scorer", both(keras, tmp_path)[0], server)

    def down(*_: Any) -> None:
        raise TierError("redis: down")

    ask(model, [[1, 2]])
    monkeypatch.setattr(_queries._Ready, "answer", down)
    with pytest.raises(TierError, match=r"^redis: down$"):
        ask(model, [[1, 2]])
    monkeypatch.undo()
    server.close()
    with pytest.raises(ClosedError):
        ask(model, [[1, 2]])


def test_rows_and_program_switch_together(keras: Any, workshop: Workshop, tmp_path: Path) -> None:
    bus = {"type": "in_process", "bus": str(tmp_path)}
    server = workshop.open(
        workshop.model((range(SIZE), DIM), embedding_table_names=["item"], max_batch_size=64), update_source=bus
    )
    both(keras, tmp_path)
    both(keras, tmp_path, 3.0, "scorer-2")
    models = [open_program("scorer", tmp_path / name, server) for name in ("scorer.keras",)]
    temporary = [model._program.folder for model in models]
    with open_producer(bus) as producer:
        rows = workshop.table("rows-2", range(SIZE), DIM, 2)
        producer.replace_model("m", 2, {"item": rows}, dense="scorer-2.keras")
        producer.flush()
        wait_until(lambda: server.model_version("m") == 2)
    for model in models:
        answer = ask(model, [[1, 2]])
        np.testing.assert_allclose(*answer.outputs.values(), score([[1, 2]], 3.0, 2), rtol=1e-5)
    wait_until(lambda: not any(path.exists() for path in temporary))  # of the program before, which another thread let go


def test_what_is_no_program_is_refused(keras: Any, server: HPS, tmp_path: Path) -> None:
    tf, _, _ = tensorflow()
    good = both(keras, tmp_path)
    (tmp_path / "text.keras").write_text("no model")
    (tmp_path / "damaged").mkdir()
    shutil.copytree(good[1], tmp_path / "damaged", dirs_exist_ok=True)
    (tmp_path / "damaged" / "saved_model.pb").write_bytes((good[1] / "saved_model.pb").read_bytes()[:-100])
    for name in ("text.keras", "damaged", "missing.keras"):
        with pytest.raises(ModelFileError, match=name):
            open_program("m", tmp_path / name, server)
    ids = keras.Input([2], dtype="int64")
    keras.Model(ids, keras.layers.Lambda(lambda x: x * 2)(ids)).save(tmp_path / "lambda.keras")
    with pytest.raises(ModelFileError, match="lambda"):  # code in a file
        open_program("m", tmp_path / "lambda.keras", server)

    class Text(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="ids")])
        def serve(self, ids: Any) -> Any:
            return tf.strings.length(ids)

    module = Text()
    tf.saved_model.save(module, str(tmp_path / "texts"), signatures=module.serve)
    with pytest.raises(ConfigError, match="input ids: expected numbers, got string"):
        open_program("m", tmp_path / "texts", server)


def test_a_program_of_other_tables_is_refused_when_it_is_opened(
    keras: Any, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = both(keras, tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    server = workshop.open(workshop.model((range(SIZE), 3)))
    for path in paths:
        with pytest.raises(ConfigError, match="expected rows of 3 elements"):
            open_program("m", path, server)
    server = workshop.open(workshop.model((range(SIZE), 3), name="other"))
    with pytest.raises(ConfigError, match="expected tables of the models other of the server, got one of 'm'"):
        open_program("m", paths[1], server)
    assert not list((tmp_path / "temporary").iterdir())  # nothing is left
