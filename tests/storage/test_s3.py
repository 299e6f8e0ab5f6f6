"""``s3://``: models and dumps in a local service that speaks S3's protocol (moto), through s3fs (row F10)."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.oracles import assert_same_bits, rows_of
from support.servers import free_port
from support.waiting import HANG_SECONDS, wait_until

import hps_numba
from hps_numba.errors import ModelFileError
from hps_numba.storage.model_files import convert_model, open_model, write_model
from hps_numba.testing.formats import read_all

DIM, ROWS = 4, 3000

if any(importlib.util.find_spec(name) is None for name in ("s3fs", "moto", "flask", "flask_cors")):
    pytest.skip('needs s3fs and moto: pip install s3fs "moto[s3]" flask flask-cors', allow_module_level=True)

_ACCOUNT = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "geheim", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the service, a process of its own."""
    port = free_port()
    log = tmp_path_factory.mktemp("moto") / "log"
    command = [sys.executable, "-c", "import moto.server; moto.server.main()", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **_ACCOUNT})
    try:
        wait_until(lambda: server.poll() is not None or _listens(port))
        assert server.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(HANG_SECONDS)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def bucket(service: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket; where it is and who asks is in the environment, as for any program that uses S3."""
    import s3fs

    for key, value in {**_ACCOUNT, "AWS_ENDPOINT_URL": service, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    store.mkdir("models")
    yield "s3://models"
    store.rm("models", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def saved(place: Any, stamp: int = 0, **how: Any) -> Any:
    keys = np.arange(ROWS)
    parts = [(some, rows_of(some, DIM, stamp)) for some in (keys[:1000], keys[1000:])]
    write_model(place, DIM, parts, **how)
    return place


def rows_at(url: str) -> dict[int, bytes]:
    with open_model(url, DIM) as model:
        keys, rows = read_all(model)[:2]
    return {int(key): row.tobytes() for key, row in zip(keys, rows, strict=True)}


def expected(stamp: int = 0) -> dict[int, bytes]:
    return {key: row.tobytes() for key, row in enumerate(rows_of(range(ROWS), DIM, stamp))}


@pytest.mark.parametrize("suffix", [".model", ".h5"])
def test_models_are_written_read_and_replaced(suffix: str, bucket: str, tmp_path: Path) -> None:
    url = saved(f"{bucket}/some/table{suffix}")
    assert rows_at(url) == expected()
    saved(url, 1, overwrite=True)
    assert rows_at(url) == expected(1)
    convert_model(url, tmp_path / "local.model", dim=DIM)
    assert rows_at(str(tmp_path / "local.model")) == expected(1)


def test_what_is_not_there_is_a_typed_error(bucket: str) -> None:
    for url in (f"{bucket}/nothing.h5", "s3://no-such-bucket/table.h5"):
        with pytest.raises(ModelFileError, match=url) as caught:
            rows_at(url)
        assert "geheim" not in str(caught.value)


def test_a_server_loads_its_tables_and_switches_to_newer_ones(bucket: str, workshop: Workshop) -> None:
    old, new = saved(f"{bucket}/1/table.model"), saved(f"{bucket}/2/table.model", 1)
    entry = {**workshop.model((range(1), DIM)), "sparse_files": [old]}
    with hps_numba.HPS({"supportlonglong": True, "models": [entry]}) as server:
        keys = np.arange(ROWS)
        assert_same_bits(server.lookup(keys, "m", 0), rows_of(keys, DIM))
        server.replace_model("m", [new])
        assert_same_bits(server.lookup(keys, "m", 0), rows_of(keys, DIM, 1))
