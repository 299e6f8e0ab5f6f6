"""Models, dumps and checkpoints at URLs (row F10)."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from support.factories import Workshop
from support.processes import environment
from support.producers import PRODUCERS, ROW_NUMBERS
from support.sample_models import FORMATS, path_for, sample, save_model
from support.url_stores import Store, memory_store
from support.waiting import HANG_SECONDS, join_all

import hps_numba
from hps_numba.errors import ConfigError, ModelFileError
from hps_numba.runtime.paths import is_url, safe_to_show
from hps_numba.storage.bin_dump import read_bin, write_bin
from hps_numba.storage.model_files import convert_model, open_model, write_model
from hps_numba.storage.url_files import UrlFile, open_url
from hps_numba.storage.urls import UrlPath, place_of
from hps_numba.testing.formats import read_all

DIM = 4


@pytest.fixture
def empty() -> Iterator[type[Store]]:
    """Nothing at ``store://`` and ``memory://``."""
    with memory_store() as found:
        yield found


def put(file: Path, url: str) -> None:
    """Copy a local file or folder to a URL of the store or of memory."""
    import fsspec

    fs = fsspec.filesystem(url.partition("://")[0])
    for one in [file] if file.is_file() else sorted(file.iterdir()):
        fs.pipe_file(url if file.is_file() else f"{url}/{one.name}", one.read_bytes())


def failure(url: str, dim: int | None = None) -> str:
    with pytest.raises(ModelFileError) as caught, open_model(url, dim) as model:
        read_all(model)
    assert caught.value.__cause__ is None, "a cause might show credentials"
    return str(caught.value)


# -- what a URL is --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("s3://bucket/key", True),
        ("hdfs://host:9000/a", True),
        ("C:/models/a", False),
        ("C:\\models\\a", False),
        ("C://models", False),
        ("a:b", False),
        ("folder/a:b.model", False),
        ("/tmp/s3://x", False),
        ("", False),
        (Path("s3://bucket"), False),
    ],
)
def test_what_a_url_is(path: Any, expected: bool) -> None:
    assert is_url(path) is expected
    if path:
        assert isinstance(place_of(path), UrlPath) is expected


def test_a_local_name_with_a_colon_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, rows, _ = sample(5, DIM)
    monkeypatch.chdir(tmp_path)
    write_model("s3:a.model", DIM, [(keys, rows)])
    with open_model("s3:a.model") as model:
        assert model.rows == 5


@pytest.mark.parametrize(
    ("url", "expected", "region"),
    [
        ("https://s3.eu-west-1.amazonaws.com/bucket/a/key", "s3://bucket/a/key", "eu-west-1"),
        ("https://my.bucket.s3.us-east-2.amazonaws.com/a/key", "s3://my.bucket/a/key", "us-east-2"),
        ("https://storage.googleapis.com/bucket/a", "gs://bucket/a", None),
        ("https://storage.cloud.google.com/bucket/a", "gs://bucket/a", None),
        ("S3://bucket/a", "s3://bucket/a", "from-environment"),
        ("s3a://bucket/a", "s3://bucket/a", "from-environment"),
        ("GS://bucket/a", "gs://bucket/a", None),
        ("https://example.com/a", "https://example.com/a", None),
        ("https://s3.eu-west-1.amazonaws.com/b/k?X-Amz-Signature=1", "https://s3.eu-west-1.amazonaws.com/b/k?...", None),
    ],
)
def test_forms_of_hugectr(url: str, expected: str, region: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    monkeypatch.setenv("AWS_REGION", "from-environment")
    assert str(UrlPath.of(url)) == expected
    assert UrlPath.of(url).region == region


def test_credentials_are_never_shown(empty: type[Store], monkeypatch: pytest.MonkeyPatch) -> None:
    url = "store://me:secret@host/a.model?signature=secret"
    assert safe_to_show(f"at {url} and 'x'") == "at store://host/a.model?... and 'x'"
    assert safe_to_show("s3://me:p@ss@host/a@b") == "s3://host/a@b"
    assert "secret" not in f"{UrlPath.of(url)} {UrlPath.of(url)!r}"

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(f"no access to {url}")

    monkeypatch.setattr(Store, "info", refuse)
    message = failure(url)
    assert "permission denied: no access to store://host/a.model?..." in message and "secret" not in message
    with pytest.raises(ModelFileError) as caught:
        write_model(url, DIM, [])
    assert "secret" not in str(caught.value) and caught.value.__cause__ is None


# -- reading --------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["store", "file"])
@pytest.mark.parametrize("name", [*FORMATS, *PRODUCERS])
def test_every_format_is_read_at_a_url(name: str, scheme: str, tmp_path: Path, empty: type[Store]) -> None:
    keys, rows, _ = sample(50, DIM)
    local = path_for(tmp_path, name)
    if name in PRODUCERS:
        PRODUCERS[name](local, keys, rows, None)
    else:
        save_model(name, local, keys, rows)
    url = f"file://{local}"
    if scheme == "store":
        url = f"store://bucket/{local.name}"
        put(local, url)
    with open_model(url, DIM) as model:
        assert str(model.path) == url
        got = read_all(model, [17, 33])
    assert got[0].tolist() == (list(range(50)) if name in ROW_NUMBERS else keys.tolist())
    assert got[1].tobytes() == rows.tobytes()
    with pytest.raises(ModelFileError, match=r"width") as caught:
        open_model(url, DIM + 1)
    assert url in str(caught.value)


@pytest.mark.parametrize("name", ["directory", "safetensors", "npy", "npz", "hdf5"])
def test_rows_are_read_by_ranges(name: str, tmp_path: Path, empty: type[Store]) -> None:
    n, dim = 60_000, 64
    keys, rows = np.arange(n), np.ones((n, dim), np.float32)
    put(save_model(name, path_for(tmp_path, name), keys, rows), "store://bucket/a")
    size = rows.nbytes
    with open_model("store://bucket/a", dim, format=name) as model:
        for _ in model.chunks(10_000):
            pass
    assert max(end - start for _, start, end in empty.reads) <= max(10_000 * dim * 4, 1 << 20), "no read of everything"
    assert sum(end - start for _, start, end in empty.reads) < 1.5 * (size + keys.nbytes), "nothing is read again and again"


def test_what_is_not_there(empty: type[Store]) -> None:
    assert failure("store://bucket/a.h5") == "store://bucket/a.h5: no such file or directory"
    with pytest.raises(ModelFileError, match=r"^store://bucket/a\.bin: no such file$"):
        read_bin("store://bucket/a.bin")


def test_what_a_store_sends_short_or_not_at_all(tmp_path: Path, empty: type[Store]) -> None:
    put(save_model("directory", tmp_path / "a", *sample(50, DIM)[:2]), "store://bucket/a")
    empty.fail = staticmethod(lambda path: 100 if path.endswith("emb_vector") else None)
    assert "store://bucket/a/emb_vector: expected 800 bytes from byte 0 on, got 100" in failure("store://bucket/a", DIM)

    def gone(path: str) -> None:
        raise FileNotFoundError(path)

    empty.fail = staticmethod(gone)
    assert "is gone; it was there when it was opened" in failure("store://bucket/a", DIM)

    def lost(path: str) -> None:
        raise ConnectionResetError("connection reset")

    empty.fail = staticmethod(lost)
    assert "cannot be read: ConnectionResetError: connection reset" in failure("store://bucket/a", DIM)


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path, empty: type[Store]) -> None:
    keys, rows, _ = sample(50, DIM)
    put(save_model("directory", tmp_path / "a", keys, rows), "store://bucket/a")
    with open_model("store://bucket/a", DIM) as model:
        out = np.empty((50, DIM), np.float32)
        model.read(0, 25, None, out[:25])
        put(save_model("directory", tmp_path / "b", keys, -rows), "store://bucket/a")
        with pytest.raises(ModelFileError, match="was replaced or removed while it was read; read it again"):
            model.read(25, 50, None, out[25:])


def test_the_file_object(empty: type[Store]) -> None:
    data = np.random.default_rng(0).integers(0, 256, 3 << 20, np.uint8).tobytes()
    empty().pipe_file("store://b/x", data)
    with open_url(UrlPath.of("store://b/x")) as file:
        assert isinstance(file, UrlFile) and file.size == len(data)
        for offset, count in (
            (0, 10),
            ((1 << 20) - 3, 7),
            (5, 2 << 20),
            (len(data) - 4, 100),
            (len(data), 1),
            (len(data) + 5, 1),
        ):
            file.seek(offset)
            assert file.read(count) == data[offset : offset + count]
        assert file.seek(-2, os.SEEK_END) == len(data) - 2 and file.read() == data[-2:]
        with pytest.raises(OSError, match="at least 0"):
            file.seek(-1)


# -- writing --------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["store", "memory", "file"])
@pytest.mark.parametrize("suffix", [".model", ".h5"])
def test_models_are_written(suffix: str, scheme: str, tmp_path: Path, empty: type[Store]) -> None:
    url = f"{scheme}://{tmp_path if scheme == 'file' else 'bucket'}/sub/a{suffix}"
    keys, rows, meta = sample(50, DIM)
    assert write_model(url, DIM, [(keys, rows, meta)]) == 50
    with pytest.raises(ModelFileError, match="exists already; pass overwrite=True"):
        write_model(url, DIM, [(keys, rows)])
    assert write_model(url, DIM, [(keys, -rows)], overwrite=True, dtype="float16") == 50
    with open_model(url) as model:
        assert (model.row_dtype, model.has_meta) == ("float16", False), "nothing of the old model is left"
        assert read_all(model)[1].tobytes() == (-rows).astype(np.float16).astype(np.float32).tobytes()
    assert convert_model(url, tmp_path / "local.h5") == 50
    with pytest.raises(ModelFileError, match="expected a place outside the model to copy"):
        convert_model(url, f"{url}/copy")


@pytest.mark.parametrize("scheme", ["store", "memory", "file"])
def test_a_folder_and_a_file_replace_each_other(scheme: str, tmp_path: Path, empty: type[Store]) -> None:
    url = f"{scheme}://{tmp_path if scheme == 'file' else 'bucket'}/key"  # the name of the folder is that of a file in it
    keys, rows, meta = sample(5, DIM)
    for number, format in enumerate(("directory", "directory", "hdf5", "hdf5", "directory")):
        write_model(url, DIM, [(keys, number * rows, meta)], format=format, overwrite=True)
        with open_model(url) as model:
            assert read_all(model)[1].tolist() == (number * rows).tolist()
    assert place_of(url).names() == {"key", "emb_vector", "meta"}  # type: ignore[union-attr]


def test_only_models_are_replaced(empty: type[Store]) -> None:
    store = empty()
    store.pipe_file("store://b/a.h5", b"precious")
    store.pipe_file("store://b/folder/precious", b"precious")
    for url, expected in (("store://b/a.h5", "is not a whole sparse model"), ("store://b/folder", "holds 'precious'")):
        with pytest.raises(ModelFileError, match=expected):
            write_model(url, DIM, [sample(5, DIM)[:2]], overwrite=True)
    assert store.cat("store://b/a.h5") == store.cat("store://b/folder/precious") == b"precious"


def test_a_failed_write_leaves_the_old_file_or_no_model(empty: type[Store]) -> None:
    keys, rows, _ = sample(5, DIM)

    def broken() -> Iterator[Any]:
        yield keys, rows
        raise KeyError("mine")

    for url in ("store://b/a.h5", "store://b/a.model"):
        with pytest.raises(KeyError, match="mine"):
            write_model(url, DIM, broken())
        assert failure(url).endswith("no such file or directory")
        write_model(url, DIM, [(keys, rows)])

    def full(path: str) -> None:
        if "/key" in path or ".h5" in path:
            raise OSError("quota exceeded")

    empty.fail_write = staticmethod(full)
    for url in ("store://b/a.h5", "store://b/a.model"):
        with pytest.raises(ModelFileError, match=r"cannot be written: OSError: quota exceeded"):
            write_model(url, DIM, [(keys, -rows)], overwrite=True)
    assert not [name for name in empty().find("store://b") if "partial" in name]
    with open_model("store://b/a.h5") as model:
        assert read_all(model)[1].tobytes() == rows.tobytes()
    assert "no such file" in failure("store://b/a.model", DIM), "no half of two models"


def test_dumps(empty: type[Store]) -> None:
    keys, rows, _ = sample(50, DIM)
    assert write_bin("store://b/a.bin", 8, DIM, [(keys, rows)]) == 50
    (found,) = read_bin("store://b/a.bin").chunks()
    assert found[0].tolist() == keys.tolist() and found[1].tobytes() == rows.tobytes()
    empty().pipe_file("store://b/b.bin", b"precious")
    with pytest.raises(ModelFileError, match=r"is a file, but not a \.bin dump; it is not replaced"):
        write_bin("store://b/b.bin", 8, DIM, [(keys, rows)], overwrite=True)


# -- formats that read local files only -----------------------------------------------------


class _LocalReader(hps_numba.storage.SparseModelReader):
    def __init__(self, path: Path) -> None:
        self.copy, self.array = path, np.loadtxt(path, delimiter=",", ndmin=2, dtype=np.float32)
        super().__init__(path, len(self.array), self.array.shape[1] - 1, has_meta=False)

    def _fill(self, name: str, start: int, out: np.ndarray) -> None:
        part = self.array[start : start + len(out)]
        out[...] = part[:, 0] if name == "key" else part[:, 1:]

    def _close(self) -> None:
        assert self.copy.exists()


class _LocalFormat(hps_numba.storage.SparseModelFormat):
    name, suffixes = "csv", (".csv",)
    opened: ClassVar[list[Path]] = []

    def detect(self, path: Path) -> bool:
        raise AssertionError("it was promised a local file")

    def _open(self, path: Path, dim: int | None) -> _LocalReader:
        self.opened.append(path)
        return _LocalReader(path)


def test_a_local_copy_is_made_and_removed(empty: type[Store]) -> None:
    empty().pipe_file("store://b/a.csv", b"7,1.5,2\n-9,0,4\n")
    empty().pipe_file("store://b/bad.csv", b"x")
    with _LocalFormat().open("store://b/a.csv", 2) as model:
        assert str(model.path) == "store://b/a.csv" and read_all(model)[0].tolist() == [7, -9]
    with pytest.raises(ModelFileError, match=r"^store://b/bad\.csv: cannot be read"):
        _LocalFormat().open("store://b/bad.csv")
    assert len(_LocalFormat.opened) == 2 and not any(path.parent.exists() for path in _LocalFormat.opened)


# -- servers --------------------------------------------------------------------------------


def test_a_server_loads_replaces_and_dumps(empty: type[Store], workshop: Workshop) -> None:
    keys, rows, _ = sample(50, DIM)
    write_model("memory://bucket/a.model", DIM, [(keys, rows)])
    write_model("memory://bucket/b.h5", DIM, [(keys, -rows)])
    entry = {**workshop.model((range(3), DIM)), "sparse_files": ["memory://bucket/a.model"]}
    with hps_numba.HPS({"supportlonglong": True, "models": [entry]}) as server:
        model, table = entry["model"], 0
        assert server.lookup(keys, model, table).tobytes() == rows.tobytes()
        server.replace_model(model, "memory://bucket/b.h5")
        assert server.lookup(keys, model, table).tobytes() == (-rows).tobytes()
        assert server.dump("memory://bucket/d.bin", model, table) == 50
        assert server.erase(keys, model, table) == 50
        assert server.load_dump("memory://bucket/d.bin", model, table) == 50
        assert server.lookup(keys, model, table).tobytes() == (-rows).tobytes()
        with pytest.raises(ModelFileError, match="memory://bucket/none: no such file"):
            server.replace_model(model, ["memory://bucket/none"])


# -- what is not installed ------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs"), ("sftp", "paramiko")])
def test_a_missing_library_is_named(scheme: str, package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    assert failure(f"{scheme}://u:secret@b/k") == f"{scheme}://b/k: {scheme}:// needs {package}: pip install {package}"


def test_an_unknown_scheme_is_named() -> None:
    assert "nosuch://b/k: expected a scheme that fsspec knows, such as s3, gs or hdfs" in failure("nosuch://b/k")
    with pytest.raises(ConfigError, match="sparse_files"):
        hps_numba.config.arguments.as_paths("memory://a\0b", "sparse_files")


def test_without_fsspec() -> None:
    script = """
import sys
sys.modules["fsspec"] = None
import hps_numba
try:
    hps_numba.open_model("memory://a/b")
except hps_numba.ModelFileError as problem:
    print(problem)
"""
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment(), timeout=HANG_SECONDS
    ).stdout
    assert shown == 'memory://a/b: a URL needs fsspec: pip install "hps-numba[fsspec]"\n'


# -- the web --------------------------------------------------------------------------------


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; by ranges, if ``ranges``."""

    ranges: ClassVar[bool] = True

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, asked = path.read_bytes(), self.headers.get("Range")
        partial = self.ranges and asked is not None
        if partial:
            first, last = str(asked).removeprefix("bytes=").split("-")
            part = data[int(first) : int(last) + 1 if last else None]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        else:
            part = data
            self.send_response(200)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            self.wfile.write(part)


@pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="fsspec needs aiohttp for http://")
@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_server(ranges: bool, tmp_path: Path) -> None:
    keys, rows, _ = sample(50, DIM)
    for name in ("npz", "safetensors", "hdf5", "parquet"):
        save_model(name, path_for(tmp_path, name), keys, rows)
    handler = functools.partial(type("Handler", (_Handler,), {"ranges": ranges}), directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        base = f"http://127.0.0.1:{server.server_address[1]}"
        for name in ("npz", "safetensors", "hdf5", "parquet"):
            with open_model(f"{base}/{path_for(tmp_path, name).name}", DIM) as model:
                assert read_all(model)[1].tobytes() == rows.tobytes()
        assert failure(f"{base}/none.npz") == f"{base}/none.npz: no such file or directory"
    finally:
        server.shutdown()
        join_all(thread)
        server.server_close()
