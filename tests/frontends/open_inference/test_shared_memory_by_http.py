"""Tensors in system shared memory by HTTP: tritonclient unchanged, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.asgi import ask_all
from support.factories import Workshop
from support.inference_servers import serving
from support.inference_suite import write_suite
from support.shared_memory import new_name

from hps_numba import HPS
from hps_numba.frontends.inference.repository import Repository
from hps_numba.frontends.inference.shared_memory import SharedRegions
from hps_numba.frontends.open_inference.app import InferenceApp
from hps_numba.frontends.open_inference.limits import Limits

KEYS = np.array([3, 1, 4])
ROUTES = "/v2/systemsharedmemory"

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs /dev/shm")


@pytest.fixture
def segment() -> Iterator[Any]:
    """A segment of 4 KiB, its key, and the module that reads and writes it."""
    shared_memory = pytest.importorskip("tritonclient.utils.shared_memory")
    key = f"hps_test_{new_name()}".replace("/", "")
    made = shared_memory.create_shared_memory_region(key, key, 4096)
    yield made, key, shared_memory
    shared_memory.destroy_shared_memory_region(made)


def test_tritonclient_has_tensors_in_shared_memory(tmp_path: Path, segment: Any) -> None:
    triton = pytest.importorskip("tritonclient.http")
    pytest.importorskip("uvicorn")
    made, key, shared_memory = segment
    config = write_suite(tmp_path)
    shared_memory.set_shared_memory_region(made, [KEYS])
    with (
        HPS(config) as reference,
        serving(config, "--shared-memory", "hps_test_") as served,
        triton.InferenceServerClient(f"127.0.0.1:{served.port}") as client,
    ):
        assert "system_shared_memory" in client.get_server_metadata()["extensions"]
        client.register_system_shared_memory("both", key, 4096)
        (status,) = client.get_system_shared_memory_status()
        assert status == {"name": "both", "key": key, "offset": 0, "byte_size": 4096}
        keys, also = triton.InferInput("user", [3], "INT64"), triton.InferInput("item", [3], "INT64")
        keys.set_shared_memory("both", KEYS.nbytes)
        also.set_data_from_numpy(KEYS + 1000)
        rows = triton.InferRequestedOutput("user")
        rows.set_shared_memory("both", 1024, offset=64)
        told = client.infer("rows", [keys, also], outputs=[triton.InferRequestedOutput("item"), rows])
        got = shared_memory.get_contents_as_numpy(made, np.float32, [3, 4], offset=64)
        np.testing.assert_array_equal(got, reference.lookup(KEYS, "rows", "user"), strict=True)
        np.testing.assert_array_equal(told.as_numpy("item"), reference.lookup(KEYS + 1000, "rows", "item"), strict=True)
        place = told.get_output("user")["parameters"]
        assert place == {"shared_memory_region": "both", "shared_memory_byte_size": 48, "shared_memory_offset": 64}
        rows.set_shared_memory("both", 8)
        with pytest.raises(Exception, match="expected at least 48"):
            client.infer("rows", [keys], outputs=[rows])
        client.unregister_system_shared_memory("both")
        assert client.get_system_shared_memory_status() == []
        with pytest.raises(Exception, match="registered region"):
            client.infer("rows", [keys])


@pytest.fixture
def app(workshop: Workshop) -> Iterator[InferenceApp]:
    server = workshop.open(workshop.model((range(20), 4), embedding_table_names=["user"]))
    app = InferenceApp(Repository(server), Limits(max_body_bytes=1024), regions=SharedRegions(["hps_test_"]))
    yield app
    app.close()


def asked(app: InferenceApp, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, str]:
    (reply,) = ask_all(app, {"method": method, "path": path, "body": body, "headers": headers})
    assert reply is not None and app.admission.held_bytes == 0
    return reply.status, reply.body.decode()


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/region/r/register", b'{"key": "/etc/passwd", "byte_size": 8}', 403),
        ("POST", "/region/r/register", b'{"key": "hps_test_none", "byte_size": 8}', 400),
        ("POST", "/region/r/register", b'{"key": 3, "byte_size": 8}', 400),
        ("POST", "/region/r/register", b'{"key": "hps_test_none", "byte_size": "8"}', 400),
        ("POST", "/region/r/register", b'{"key": "hps_test_none", "byte_size": true}', 400),
        ("POST", "/region/r/register", b"[]", 400),
        ("GET", "/region/r/register", b"", 405),
        ("POST", "/status", b"", 405),
        ("GET", "/region/r/status", b"", 404),
        ("GET", "/region", b"", 404),
        ("POST", "/region/r/other", b"", 404),
        ("POST", "/region/r/unregister", b"", 200),
        ("POST", "/unregister", b"", 200),
        ("GET", "/status", b"", 200),
    ],
)
def test_routes(app: InferenceApp, method: str, path: str, body: bytes, status: int) -> None:
    assert asked(app, method, ROUTES + path, body)[0] == status


def test_a_page_in_a_browser_registers_nothing(app: InferenceApp) -> None:
    assert asked(app, "POST", f"{ROUTES}/unregister", Origin="http://elsewhere")[0] == 403


def test_what_is_in_shared_memory_counts_as_part_of_the_request(app: InferenceApp, segment: Any) -> None:
    app.regions.register("r", segment[1], 0, 4096)

    def infer(size: int) -> tuple[int, str]:
        place = f'{{"shared_memory_region": "r", "shared_memory_byte_size": {size}}}'
        keys = f'{{"name": "user", "datatype": "INT64", "shape": [{size // 8}], "parameters": {place}}}'
        return asked(app, "POST", "/v2/models/m/infer", f'{{"inputs": [{keys}]}}'.encode())

    assert infer(64)[0] == 200
    status, body = infer(2048)
    assert status == 413 and "1024 bytes" in body


def test_nothing_is_allowed_by_default(workshop: Workshop) -> None:
    app = InferenceApp(Repository(workshop.open(workshop.model((range(20), 4)))))
    assert asked(app, "POST", f"{ROUTES}/region/r/register", b'{"key": "hps_test_x", "byte_size": 8}')[0] == 403
    assert "system_shared_memory" not in asked(app, "GET", "/v2")[1]
    app.close()
