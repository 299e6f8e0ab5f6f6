"""``hps-numba serve --program``: clients of a process send ids and get scores, of Torch and of Keras, joined or not."""

from __future__ import annotations

import importlib.util
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.framework_rig import export, tensorflow
from support.inference_servers import Serving, serving
from support.oracles import rows_of
from support.waiting import HANG_SECONDS

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")

SIZE, DIM = 20, 4
ELSEWHERE = "/of/the/machine/that/trained.json"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workshop = Workshop(tmp_path_factory.mktemp("programs"))
    model = workshop.model((range(SIZE), DIM), embedding_table_names=["item"], max_batch_size=64)
    path = workshop.folder / "ps.json"
    path.write_text(json.dumps({"supportlonglong": True, "models": [model]}))
    return path


def torch_program(folder: Path) -> Path:
    torch = pytest.importorskip("torch")
    from hps_numba.frontends import torch as hps

    class Scorer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = hps.LookupLayer(ELSEWHERE, "m", "item", DIM)

        def forward(self, ids: Any) -> Any:
            return {"score": self.rows(ids).sum((1, 2))}

    batch = torch.export.Dim("batch", max=32)
    ids = torch.zeros(5, 2, dtype=torch.int64)
    torch.export.save(torch.export.export(Scorer(), (ids,), dynamic_shapes=({0: batch},)), folder / "scorer.pt2")
    return folder / "scorer.pt2"


def keras_programs(folder: Path) -> list[Path]:
    _, keras, hps = tensorflow()
    ids = keras.Input([2], dtype="int64", name="ids")
    rows = keras.layers.Flatten()(hps.LookupLayer("m", "item", DIM, ps_config_file=ELSEWHERE)(ids))
    score = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", name="score")(rows)
    model = keras.Model(ids, {"score": score})
    model.save(folder / "scorer.keras")
    return [folder / "scorer.keras", Path(export(model, folder / "saved"))]


def expected(ids: Any) -> np.ndarray:
    return rows_of(np.ravel(ids), DIM).reshape(len(ids), -1).sum(1)


def ask(server: Serving, model: str, ids: Any, datatype: str = "INT64") -> tuple[int, dict[str, Any]]:
    tensor = {"name": "ids", "datatype": datatype, "shape": list(np.shape(ids)), "data": np.ravel(ids).tolist()}
    connection = server.connect()
    try:
        connection.request("POST", f"/v2/models/{model}/infer", json.dumps({"id": "7", "inputs": [tensor]}))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def check_scores(server: Serving, model: str, ids: Any) -> None:
    status, answer = ask(server, model, ids)
    assert status == 200, answer
    (output,) = answer["outputs"]
    assert (answer["model_name"], answer["model_version"], answer["id"], output["name"]) == (model, "1", "7", "score")
    np.testing.assert_allclose(np.ravel(output["data"]), expected(ids), rtol=1e-4)


def check_errors(server: Serving, model: str, most: int) -> None:
    for ids, datatype in (([[1, 2, 3]], "INT64"), ([[1, 2]], "INT32"), ([[1, 2]] * (most + 1), "INT64")):
        status, answer = ask(server, model, ids, datatype)
        assert status == 400 and "ids: expected" in answer["error"]


def test_a_torch_program_from_end_to_end(config: Path, tmp_path: Path) -> None:
    program = f"scorer={torch_program(tmp_path)}"
    with serving(config, "--program", program, "--batch-delay-us", "500", "--max-batch", "8", "--drain-seconds", "0") as server:
        status, body = server.get("/v2/models/scorer")
        about = json.loads(body)
        assert status == 200 and about["platform"] == "pytorch_export" and about["versions"] == ["1"]
        assert about["inputs"] == [{"name": "ids", "datatype": "INT64", "shape": [-1, 2]}]
        assert about["outputs"] == [{"name": "score", "datatype": "FP32", "shape": [-1]}]
        assert server.get("/v2/health/ready")[0] == 200
        check_scores(server, "scorer", [[1, 2], [3, 4]])
        check_errors(server, "scorer", 32)
        random = np.random.default_rng(0)
        batches = [random.integers(0, SIZE, (random.integers(1, 5), 2)) for _ in range(120)]
        with ThreadPoolExecutor(8) as clients:
            list(clients.map(lambda ids: check_scores(server, "scorer", ids), batches))
        assert ask(server, "other", [[1, 2]])[0] == 404
        assert (
            'hps_batch_requests_count{frontend="open_inference",protocol="in_process",model="scorer"}'
            in server.get("/metrics")[1].decode()
        )


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # Keras, when it saves a model
def test_keras_models_from_end_to_end(config: Path, tmp_path: Path) -> None:
    keras_file, saved = keras_programs(tmp_path)
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    options = ("--program", f"file={keras_file}", "--program", f"saved={saved}", "--drain-seconds", "0")
    with serving(config, *options, **quiet) as server:
        for model in ("file", "saved"):
            check_scores(server, model, [[1, 2], [3, 4]])
            check_errors(server, model, 64)
        names = {entry["name"] for entry in json.loads(_index(server))}
        assert names == {"file", "saved", "m"}


def _index(server: Serving) -> bytes:
    connection = server.connect()
    connection.request("POST", "/v2/repository/index", "{}")
    body = connection.getresponse().read()
    connection.close()
    return body


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("scorer", "expected NAME=PATH, each name once, got 'scorer'"),
        ("=x.pt2", "expected NAME=PATH"),
        ("scorer=missing.onnx", "missing.onnx: expected a .pt2 file"),
        ("scorer=missing.pt2", "missing.pt2: expected a program of torch.export"),
    ],
)
def test_what_cannot_be_served_ends_with_a_message(config: Path, program: str, message: str) -> None:
    if program.endswith(".pt2") and importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch")
    server = Serving(config, "--program", program)
    assert server.process.wait(HANG_SECONDS) != 0 and not server.line
    assert server.end(signal.SIGKILL) in (1, 2)
    assert message in " ".join(server.errors.replace("│", " ").split()) and "Traceback" not in server.errors


def test_names_are_given_once(config: Path, tmp_path: Path) -> None:
    server = Serving(config, "--program", "a=x.pt2", "--program", "a=y.pt2")
    assert server.end(signal.SIGKILL) != 0 or not server.line
    assert "each name once" in " ".join(server.errors.replace("│", " ").split())
