"""Whole models of Torch behind a server: names, shapes, rows of the server that serves, versions, errors."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.oracles import rows_of
from support.waiting import HANG_SECONDS, join_all, wait_until

import hps_numba
from hps_numba import HPS
from hps_numba.errors import ClosedError, ConfigError, ModelFileError, TierError, UnknownModelError, VersionError
from hps_numba.frontends.inference.batching import BatchedModel
from hps_numba.frontends.inference.problems import InferenceError, message_of, status_of
from hps_numba.frontends.inference.programs import ProgramModel, open_program
from hps_numba.frontends.inference.repository import Repository
from hps_numba.frontends.inference.tensors import InferenceRequest, TensorSpec
from hps_numba.updates import open_producer

torch = pytest.importorskip("torch")
hps = pytest.importorskip("hps_numba.frontends.torch")

SIZE, DIM = 20, 4
ELSEWHERE = "/of/the/machine/that/trained.json"


class Scorer(torch.nn.Module):
    """The sum of what is looked up, times ``scale``."""

    def __init__(self, scale: float = 1.0, table: Any = 0, dim: int = DIM, model: str = "m") -> None:
        super().__init__()
        self.rows = hps.LookupLayer(ELSEWHERE, model, table, dim)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, ids: Any) -> Any:
        return self.rows(ids).sum(-1) * self.scale


class Rich(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = hps.HPSEmbeddingBag(ELSEWHERE, "m", 1, 8, mode="sum")
        self.rows = hps.LookupCollection(ELSEWHERE, "m", {"film": ("item", DIM)})

    def forward(self, time: Any, ids: Any, pair: Any, factor: int = 1, *, extra: Any) -> Any:
        film, user = self.rows({"film": ids["film"]})["film"], self.bag(ids["user"])
        score = film.sum(1) + user.sum(1) + time[:, 0] + pair[0] + pair[1]
        return {"score": score * factor + extra, "both": (film, user.bfloat16())}


def export(module: Any, args: Any, path: Path, shapes: Any, kwargs: Any = None) -> Path:
    torch.export.save(torch.export.export(module.eval(), args, kwargs, dynamic_shapes=shapes), path)
    return path


def scorer(folder: Path, scale: float = 1.0, name: str = "scorer.pt2", most: int = 100, **more: Any) -> Path:
    batch = torch.export.Dim("batch", max=most)
    return export(Scorer(scale, **more), (torch.zeros(5, 2, dtype=torch.int64),), folder / name, ({0: batch},))


@pytest.fixture
def server(workshop: Workshop) -> HPS:
    return workshop.open(
        workshop.model((range(SIZE), DIM), (range(SIZE), 8), embedding_table_names=["item", "user"], max_batch_size=64)
    )


@pytest.fixture
def model(server: HPS, tmp_path: Path) -> ProgramModel:
    return open_program("scorer", scorer(tmp_path), server)


def ask(model: Any, ids: Any, **more: Any) -> Any:
    return model.infer(InferenceRequest(model.name, {"ids": np.asarray(ids)}, **more))


def score(ids: Any, scale: float = 1.0, stamp: int = 0) -> np.ndarray:
    ids = np.asarray(ids)
    return torch.from_numpy(rows_of(ids.ravel(), DIM, stamp).reshape(*ids.shape, DIM)).sum(-1).mul(scale).numpy()


def test_ids_give_scores_by_the_rows_of_the_server(model: ProgramModel, server: HPS) -> None:
    answer = ask(model, [[1, 2], [3, 4], [5, 6]], id="7")
    np.testing.assert_array_equal(answer.outputs["output"], score([[1, 2], [3, 4], [5, 6]]))
    assert (answer.model, answer.version, answer.id) == ("scorer", "1", "7")
    assert (model.platform, model.versions(), model.max_batch_size) == ("pytorch_export", ("1",), 64)
    assert model.inputs == (TensorSpec("ids", "INT64", (-1, 2)),) and model.outputs == (TensorSpec("output", "FP32", (-1, 2)),)
    server.update([1], np.full((1, DIM), 9.0), "m", 0)
    np.testing.assert_array_equal(ask(model, [[1, 1]]).outputs["output"], [[36, 36]])
    with pytest.raises(ConfigError):  # nobody opened a server of the config of the program
        hps.server_of(ELSEWHERE)


def test_names_come_from_arguments_and_their_structure(server: HPS, tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", max=30)
    ids = {"film": torch.zeros(5, dtype=torch.int64), "user": torch.zeros(5, 3, dtype=torch.int32)}
    pair = torch.zeros(5), torch.zeros(5)
    shapes = {
        "time": {0: batch},
        "ids": {key: {0: batch} for key in ids},
        "pair": ({0: batch}, {0: batch}),
        "factor": None,
        "extra": {0: batch},
    }
    args = torch.zeros(5, 1), ids, pair, 2
    model = open_program("rich", export(Rich(), args, tmp_path / "rich.pt2", shapes, {"extra": torch.zeros(5)}), server)
    assert model.inputs == (
        TensorSpec("time", "FP32", (-1, 1)),
        TensorSpec("ids.film", "INT64", (-1,)),
        TensorSpec("ids.user", "INT32", (-1, 3)),
        TensorSpec("pair.0", "FP32", (-1,)),
        TensorSpec("pair.1", "FP32", (-1,)),
        TensorSpec("extra", "FP32", (-1,)),
    )
    assert [spec.name for spec in model.outputs] == ["score", "both.0", "both.1"]
    assert model.outputs[2] == TensorSpec("both.1", "FP32", (-1, 8)) and model.max_batch_size == 30
    inputs = {
        "time": np.array([[0.5], [1]], np.float32),
        "ids.film": np.array([3, 4]),
        "ids.user": np.array([[1, 2, 3], [4, 5, 6]], np.int32),
        "pair.0": np.ones(2, np.float32),
        "pair.1": np.full(2, 2, np.float32),
        "extra": np.full(2, 100, np.float32),
    }
    inputs["time"].flags.writeable = False  # as those of a message are
    answer = model.infer(InferenceRequest("rich", inputs, outputs=("score", "both.1")))
    film, user = server.lookup([3, 4], "m", "item"), server.lookup_pooled(range(1, 7), [0, 3, 6], "m", "user")
    expected = (film.sum(1) + user.sum(1) + [3.5, 4]) * 2 + 100
    np.testing.assert_allclose(answer.outputs["score"], expected, rtol=1e-6)
    np.testing.assert_allclose(answer.outputs["both.1"], user, rtol=1e-2)
    assert list(answer.outputs) == ["score", "both.1"] and answer.outputs["both.1"].dtype == np.float32
    wrong = {**inputs, "ids.user": np.zeros((3, 3), np.int32)}
    with pytest.raises(InferenceError, match=r"ids.user: expected 2, as other inputs have, got shape \[3, 3\]"):
        model.infer(InferenceRequest("rich", wrong))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "inputs: expected ids, got none of 'ids'"),
        ({"ids": np.zeros((1, 2), np.int64), "x": np.zeros(1)}, "inputs: expected ids, got 'x'"),
        ({"ids": np.zeros((1, 2), np.int32)}, "ids: expected INT64, got int32"),
        ({"ids": np.zeros((1, 3), np.int64)}, r"ids: expected shape \[-1, 2\], got \[1, 3\]"),
        ({"ids": np.zeros(2, np.int64)}, r"ids: expected shape \[-1, 2\], got \[2\]"),
        ({"ids": np.zeros((65, 2), np.int64)}, "ids: expected at most 64 samples, got 65"),
    ],
)
def test_wrong_inputs_are_refused(model: ProgramModel, inputs: Any, message: str) -> None:
    with pytest.raises(InferenceError, match=message) as told:
        model.infer(InferenceRequest("scorer", inputs))
    assert told.value.status == 400


def test_wrong_outputs_and_versions_are_refused(model: ProgramModel) -> None:
    with pytest.raises(InferenceError, match="outputs: expected some of output, got 'y'"):
        ask(model, [[1, 2]], outputs=("y",))
    assert ask(model, [[1, 2]], version="1").version == "1"
    with pytest.raises(VersionError, match="expected 1") as told:
        ask(model, [[1, 2]], version="2")
    assert status_of(told.value) == 404


def test_a_size_that_was_fixed_at_the_export_stays_fixed(server: HPS, tmp_path: Path) -> None:
    path = export(Scorer(), (torch.zeros(5, 2, dtype=torch.int64),), tmp_path / "fixed.pt2", None)
    model = open_program("fixed", path, server)
    assert model.max_batch_size == 0 and model.inputs[0].shape == (5, 2)
    assert ask(model, np.ones((5, 2), np.int64)).outputs["output"].shape == (5, 2)
    with pytest.raises(InferenceError, match=r"expected shape \[5, 2\], got \[4, 2\]"):
        ask(model, np.ones((4, 2), np.int64))


def test_an_axis_that_is_no_batch_is_not_taken_for_one(server: HPS, tmp_path: Path) -> None:
    class Biased(Scorer):
        def forward(self, ids: Any, biases: Any) -> Any:
            return super().forward(ids) + biases.sum()

    n, m = torch.export.Dim("n", max=50), torch.export.Dim("m", max=50)
    path = export(Biased(), (torch.zeros(9, dtype=torch.int64), torch.zeros(7)), tmp_path / "biased.pt2", ({0: n}, {0: m}))
    model = open_program("biased", path, server)
    assert model.max_batch_size == 0
    biases = np.ones(3, np.float32)
    answer = model.infer(InferenceRequest("biased", {"ids": np.array([1, 2]), "biases": biases}))
    np.testing.assert_array_equal(answer.outputs["output"], score([1, 2]) + 3)
    with pytest.raises(InferenceError, match="ids: expected 0 to 50 along an axis, got 51"):
        model.infer(InferenceRequest("biased", {"ids": np.zeros(51, np.int64), "biases": biases}))


def test_a_program_that_fails_says_so_plainly(server: HPS, tmp_path: Path, caplog: Any) -> None:
    class Broken(Scorer):
        def forward(self, ids: Any) -> Any:
            return super().forward(ids) / torch.arange(3)[ids]  # there are ids above 2

    path = export(Broken(), (torch.zeros(5, 2, dtype=torch.int64),), tmp_path / "broken.pt2", ({0: torch.export.Dim("b")},))
    model = open_program("broken", path, server)
    assert ask(model, [[1, 2]]).outputs["output"].shape == (1, 2)
    with pytest.raises(InferenceError) as told:
        ask(model, [[1, 7]])
    assert told.value.status == 500 and "\n" not in message_of(told.value)
    assert message_of(told.value) == "model 'broken': its program failed with IndexError; the log of the server says more"
    assert "Traceback" in caplog.text and "broken" in caplog.text
    caplog.clear()


def test_errors_of_lookups_keep_their_kind(model: ProgramModel, server: HPS, monkeypatch: Any) -> None:
    def down(*_: Any) -> None:
        raise TierError("redis: down")

    monkeypatch.setattr(server.direct, "lookup_into", down)
    with pytest.raises(TierError, match="redis: down"):
        ask(model, [[1, 2]])
    monkeypatch.undo()
    server.close()
    with pytest.raises(ClosedError):
        ask(model, [[1, 2]])
    assert model.versions() == () and not model.ready()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": "other"}, "expected tables of the models m of the server, got one of 'other'"),
        ({"table": 7}, r"expected tables of model 'm' \(item, user\), got 7"),
        ({"table": "film"}, r"expected tables of model 'm' \(item, user\), got 'film'"),
        ({"dim": 5}, "expected rows of 4 elements, as .* has, got 5"),
    ],
)
def test_a_program_of_other_tables_is_refused_when_it_is_opened(server: HPS, tmp_path: Path, more: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_program("scorer", scorer(tmp_path, **more), server)


def test_files_that_are_no_programs_are_refused(server: HPS, tmp_path: Path) -> None:
    (tmp_path / "damaged.pt2").write_bytes(scorer(tmp_path).read_bytes()[:-700])
    (tmp_path / "text.pt2").write_text("no program")
    for name in ("damaged.pt2", "text.pt2", "missing.pt2"):
        with pytest.raises(ModelFileError, match=f"{name}: expected a program of torch.export"):
            open_program("m", tmp_path / name, server)
    for name in ("model.onnx", "."):
        with pytest.raises(ConfigError, match=r"expected a .pt2 file, a .keras file or the folder of a SavedModel"):
            open_program("m", tmp_path / name, server)


def test_two_servers_of_a_process_serve_one_file_each_with_its_rows(workshop: Workshop, tmp_path: Path) -> None:
    path = scorer(tmp_path)
    servers = []
    for stamp in (1, 2):
        folder = Workshop(workshop.folder / str(stamp))
        folder.folder.mkdir()
        entry = folder.model((range(SIZE), DIM), stamp=stamp)
        servers.append(workshop.open(entry))
    models = [open_program("scorer", path, server) for server in servers]
    for stamp, model in enumerate(models, 1):
        np.testing.assert_array_equal(ask(model, [[1, 2]]).outputs["output"], score([[1, 2]], stamp=stamp))


def test_a_program_in_a_repository(model: ProgramModel, server: HPS) -> None:
    with_it = Repository(server, may_change=True)
    with_it.add(model)
    assert with_it.names() == ("scorer", "m") and with_it.ready()
    assert [(entry.name, entry.state) for entry in with_it.index()] == [("scorer", "READY"), ("m", "READY")]
    server.unload_model("m")
    assert model.versions() == ()
    with pytest.raises(UnknownModelError):
        ask(model, [[1, 2]])
    with_it.close()
    with pytest.raises(ClosedError):
        ask(model, [[1, 2]])


# -- versions ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(workshop: Workshop, tmp_path: Path) -> Any:
    """A server on a bus, its program, and a function that publishes a version."""
    bus = {"type": "in_process", "bus": str(tmp_path)}
    entry = workshop.model((range(SIZE), DIM), embedding_table_names=["item"], max_batch_size=64)
    server = workshop.open(entry, update_source=bus)
    model = open_program("scorer", scorer(tmp_path), server)
    with open_producer(bus) as producer:

        def publish(version: int, dense: str | None, stamp: int) -> None:
            rows = workshop.table(f"rows-{version}", range(SIZE), DIM, stamp)
            producer.replace_model("m", version, {"item": rows}, dense=dense)
            producer.flush()

        yield server, model, publish, producer


def in_force(server: HPS, version: int) -> None:
    wait_until(lambda: server.model_version("m") == version)


def test_rows_and_program_switch_together_and_back(published: Any, tmp_path: Path) -> None:
    server, model, publish, _ = published
    scorer(tmp_path, 3.0, "scorer-5.pt2")
    publish(5, "scorer-5.pt2", 5)
    in_force(server, 5)
    answer = ask(model, [[1, 2]], version="5")
    np.testing.assert_array_equal(answer.outputs["output"], score([[1, 2]], 3.0, 5))
    publish(6, None, 6)  # rows only
    in_force(server, 6)
    np.testing.assert_array_equal(ask(model, [[1, 2]]).outputs["output"], score([[1, 2]], 3.0, 6))
    assert server.roll_back_model("m") == 5
    np.testing.assert_array_equal(ask(model, [[1, 2]]).outputs["output"], score([[1, 2]], 3.0, 5))


def test_a_roll_back_to_the_first_version_brings_the_first_program(published: Any, tmp_path: Path) -> None:
    server, model, publish, _ = published
    scorer(tmp_path, 3.0, "scorer-2.pt2")
    publish(2, str(tmp_path / "scorer-2.pt2"), 2)
    in_force(server, 2)
    np.testing.assert_array_equal(ask(model, [[1, 2]]).outputs["output"], score([[1, 2]], 3.0, 2))
    server.roll_back_model("m")
    np.testing.assert_array_equal(ask(model, [[1, 2]]).outputs["output"], score([[1, 2]]))
    server.roll_back_model("m")
    np.testing.assert_array_equal(ask(model, [[1, 2]]).outputs["output"], score([[1, 2]], 3.0, 2))


def test_a_file_that_was_replaced_is_read_with_the_next_version(model: ProgramModel, server: HPS, tmp_path: Path) -> None:
    np.testing.assert_array_equal(ask(model, [[1, 2]]).outputs["output"], score([[1, 2]]))
    scorer(tmp_path, 5.0, "new.pt2").replace(tmp_path / "scorer.pt2")
    np.testing.assert_array_equal(ask(model, [[1, 2]]).outputs["output"], score([[1, 2]]))
    server.replace_model("m")
    np.testing.assert_array_equal(ask(model, [[1, 2]]).outputs["output"], score([[1, 2]], 5.0))


@pytest.mark.parametrize(
    "dense", ["../elsewhere/scorer.pt2", "/etc/passwd", "link/scorer.pt2", "missing.pt2", "scorer.npz", "other.pt2", ".", "\0"]
)
def test_a_message_names_programs_of_the_folder_only(published: Any, tmp_path: Path, dense: str) -> None:
    """Nor what is no program, nor one that clients of the one in force could not use; the version in force stays."""
    server, model, *_ = published
    (tmp_path.parent / f"{tmp_path.name}-elsewhere").mkdir()
    scorer(tmp_path.parent / f"{tmp_path.name}-elsewhere", 7.0)
    (tmp_path / "link").symlink_to(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    batch = torch.export.Dim("batch", max=9)
    export(Scorer(), (torch.zeros(5, 3, dtype=torch.int64),), tmp_path / "other.pt2", ({0: batch},))
    with pytest.raises((ConfigError, ModelFileError)):
        model._on_version("m", 2, {"dense": dense})
    np.testing.assert_array_equal(ask(model, [[1, 2]]).outputs["output"], score([[1, 2]]))
    assert server.model_version("m") == 1


def test_no_answer_mixes_two_versions(published: Any, tmp_path: Path) -> None:
    server, model, publish, _ = published
    batched = BatchedModel(model, max_delay=0.0002, timeout=HANG_SECONDS)
    for version in range(2, 6):
        scorer(tmp_path, float(version), f"scorer-{version}.pt2")
    ids = np.arange(16).reshape(8, 2)
    expected = {str(version): score(ids, float(version), version) for version in range(2, 6)} | {"1": score(ids)}
    seen: set[str] = set()
    done = threading.Event()

    def client() -> None:
        while not done.is_set():
            answer = ask(batched, ids)
            np.testing.assert_array_equal(answer.outputs["output"], expected[answer.version])
            seen.add(answer.version)

    clients = [threading.Thread(target=client) for _ in range(3)]
    for one in clients:
        one.start()
    try:
        for version in range(2, 6):
            publish(version, f"scorer-{version}.pt2", version)
            in_force(server, version)
            wait_until(lambda: str(server.model_version("m")) in seen)
    finally:
        done.set()
        join_all(*clients)
    assert seen >= {"2", "3", "4", "5"}
    batched.close()


def test_a_model_that_was_loaded_again_is_followed_again(workshop: Workshop, tmp_path: Path) -> None:
    entry = workshop.model((range(SIZE), DIM), max_batch_size=64)
    server = workshop.open(entry)
    model = open_program("scorer", scorer(tmp_path), server)
    server.unload_model("m")
    assert model.versions() == ()
    server.load_model(entry)
    assert model.versions() == ("1",)
    scorer(tmp_path, 5.0, "new.pt2").replace(tmp_path / "scorer.pt2")
    server.replace_model("m")
    np.testing.assert_array_equal(ask(model, [[1, 2]]).outputs["output"], score([[1, 2]], 5.0))


def test_a_program_without_lookups(server: HPS, tmp_path: Path) -> None:
    path = export(torch.nn.Linear(2, 1), (torch.zeros(5, 2),), tmp_path / "dense.pt2", ({0: torch.export.Dim("b", max=9)},))
    model = open_program("dense", path, server)
    answer = model.infer(InferenceRequest("dense", {"input": np.zeros((1, 2), np.float32)}))
    assert answer.version == "1" and answer.outputs["output"].shape == (1, 1) and model.max_batch_size == 9


def test_a_program_of_two_models_has_both_versions(workshop: Workshop, tmp_path: Path) -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (hps.LookupLayer(ELSEWHERE, name, 0, DIM) for name in ("a", "b"))

        def forward(self, ids: Any) -> Any:
            return self.a(ids) + self.b(ids)

    server = workshop.open(
        workshop.model((range(SIZE), DIM), name="a", max_batch_size=8), workshop.model((range(SIZE), DIM), name="b")
    )
    path = export(Two(), (torch.zeros(5, dtype=torch.int64),), tmp_path / "two.pt2", ({0: torch.export.Dim("b")},))
    model = open_program("two", path, server)
    server.replace_model("b")
    answer = model.infer(InferenceRequest("two", {"ids": np.array([3])}, version="1.2"))
    assert answer.version == "1.2" and model.versions() == ("1.2",) and model.max_batch_size == 4


def test_the_request_of_a_program_is_text_of_this_package(server: HPS, tmp_path: Path) -> None:
    from hps_numba.frontends._program import ServedQueries

    queries = ServedQueries(server, "p")
    for text in ("", "{", "[]", '{"config": "x"}'):
        with pytest.raises(ConfigError):
            queries.point(text)
        with pytest.raises(ConfigError):
            queries.point_start("[1]")
    started = json.loads(queries.point_start('{"config": "a.json", "replicas": 1}'))
    assert started["replicas"] == 1 and started["config"].startswith("<server ")
    assert hps_numba.frontends.torch.server_of(started["config"]) is server
