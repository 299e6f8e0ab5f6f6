"""Models, dumps and checkpoints at URLs: ``s3://``, ``gs://``, ``hdfs://``, ``memory://`` and whatever else fsspec knows.

Credentials are never shown: what stands before an ``@`` and after a ``?`` is cut from every message.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeAlias

from hps_numba.errors import HpsError, ModelFileError
from hps_numba.runtime.paths import checked_path, is_url, safe_to_show

__all__ = ["Place", "UrlPath", "place_of"]

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)
_S3_HOST = re.compile(r"(?:(?P<bucket>[^/]+)\.)?s3[.-](?P<region>[a-z0-9-]+)\.amazonaws\.com/(?P<path>.*)", re.DOTALL)
_GCS_HOST = re.compile(r"storage\.(?:googleapis|cloud\.google)\.com/(?P<path>.*)", re.DOTALL)
_BACKENDS: Final = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "hdfs": "pyarrow",
    "http": "aiohttp",
    "https": "aiohttp",
    "abfs": "adlfs",
    "az": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
"""Scheme -> what to install for it."""
_ALIASES: Final = {"s3a": "s3", "gcs": "gs"}
_COPY_BYTES = 8 << 20


def place_of(path: object, what: str = "path", *, error: type[HpsError] = ModelFileError) -> Place:
    """A local path, or the place that a URL names.

    Raises:
        HpsError, of the type ``error``: neither.
    """
    if isinstance(path, UrlPath):
        return path
    if isinstance(path, str) and is_url(path):
        if "\0" in path:
            raise error(f"{what}: expected a URL without NUL characters, got {safe_to_show(path)!r}")
        return UrlPath.of(path)
    return checked_path(path, what, error=error)


class UrlPath:
    """A file or folder at a URL: what the formats use of ``pathlib.Path``, and ranges of bytes.

    ``str()`` is the URL without credentials.

    **Thread safety:** every method.
    """

    __slots__ = ("_region", "_url")

    def __init__(self, url: str, region: str | None = None) -> None:
        self._url = url
        self._region = region

    @classmethod
    def of(cls, url: str) -> UrlPath:
        """HugeCTR's https forms of S3 and Google Cloud Storage become ``s3://`` (with the region of the host) and ``gs://``."""
        match = _URL.match(url)
        assert match is not None
        scheme, rest = match["scheme"].lower(), match["rest"]
        scheme = _ALIASES.get(scheme, scheme)
        region = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION")
        if scheme == "https" and (host := _S3_HOST.fullmatch(rest)) and "?" not in rest:
            scheme, region = "s3", host["region"]
            rest = f"{host['bucket']}/{host['path']}" if host["bucket"] else host["path"]
        elif scheme == "https" and (host := _GCS_HOST.fullmatch(rest)) and "?" not in rest:
            scheme, rest = "gs", host["path"]
        return cls(f"{scheme}://{rest}", region if scheme == "s3" else None)

    @property
    def region(self) -> str | None:
        """Of an S3 bucket, if it is known."""
        return self._region

    @property
    def scheme(self) -> str:
        """In lower case."""
        return self._url.partition("://")[0]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self._url.partition("://")[2].partition("?")[0]).name

    @property
    def suffix(self) -> str:
        """``.h5`` of ``model.h5``."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> UrlPath:
        """The folder."""
        return UrlPath(self._url.rstrip("/").rpartition("/")[0], self._region)

    def __truediv__(self, name: str) -> UrlPath:
        return UrlPath(f"{self._url.rstrip('/')}/{name}", self._region)

    def is_within(self, folder: UrlPath) -> bool:
        """Whether it lies in a folder."""
        return self._url.startswith(f"{folder._url.rstrip('/')}/")

    def split_fragment(self) -> tuple[UrlPath, str | None]:
        """``scheme://path`` and the ``table`` of ``scheme://path#table``."""
        url, mark, fragment = self._url.partition("#")
        return (UrlPath(url, self._region), fragment) if mark else (self, None)

    def __str__(self) -> str:
        return safe_to_show(self._url)

    def __repr__(self) -> str:
        return f"UrlPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UrlPath) and (self._url, self._region) == (other._url, other._region)

    def __hash__(self) -> int:
        return hash(self._url)

    # -- what is there --------------------------------------------------------------------

    def info(self) -> dict[str, Any] | None:
        """What fsspec says of the file or folder, asked again each time; None if there is none.

        Raises:
            ModelFileError: the store cannot be reached, refuses, or its library is not installed.
        """
        fs, path = self._file_system()
        with self._errors("cannot be opened"):
            fs.invalidate_cache(path.rstrip("/").rpartition("/")[0])
            try:
                found: dict[str, Any] = fs.info(path)
            except FileNotFoundError:
                return None
        return found

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        return self.info() is not None

    def is_file(self) -> bool:
        """Whether there is a file."""
        found = self.info()
        return found is not None and found["type"] == "file"

    def is_dir(self) -> bool:
        """Whether there is a folder."""
        found = self.info()
        return found is not None and found["type"] == "directory"

    def names(self) -> set[str]:
        """Names of the entries of a folder."""
        fs, path = self._file_system()
        with self._errors("cannot be listed"):
            entries = [str(entry).rstrip("/") for entry in fs.ls(path, detail=False)]
        return {PurePosixPath(entry).name for entry in entries if entry != path.rstrip("/")}  # some stores list the folder, too

    def size(self) -> int:
        """Bytes of a file, or of all files below a folder; 0 if there is nothing."""
        fs, path = self._file_system()
        with self._errors("cannot be listed"):
            return int(sum(entry["size"] or 0 for entry in fs.find(path, detail=True).values()))

    # -- bytes ----------------------------------------------------------------------------

    def fetch(self, start: int, stop: int) -> bytes:
        """The bytes ``start .. stop``.

        Raises:
            ModelFileError: there are fewer, or the store refuses.
        """
        fs, path = self._file_system()
        with self._errors("cannot be read"):
            try:
                data: bytes = fs.cat_file(path, start=start, end=stop)
            except FileNotFoundError:
                raise ModelFileError(f"{self}: is gone; it was there when it was opened") from None
        if len(data) != stop - start:
            raise ModelFileError(
                f"{self}: expected {stop - start} bytes from byte {start} on, got {len(data)}; was it cut short?"
            )
        return data

    def download(self, target: io.FileIO) -> None:
        """Write the whole file to ``target``, by 8 MiB."""
        fs, path = self._file_system()
        with self._errors("cannot be downloaded"), fs.open(path, "rb", block_size=_COPY_BYTES) as source:
            while piece := source.read(_COPY_BYTES):
                view = memoryview(piece)
                while len(view):
                    view = view[target.write(view) :]

    def upload(self, source: Path) -> None:
        """Write the content of a local file, by 8 MiB; the object is there when all of it is, or as it was before."""
        fs, path = self._file_system()
        partial = f"{path}.{os.urandom(4).hex()}.hps-partial"
        with self._errors("cannot be written"):
            if self.scheme in _ATOMIC:
                _copy_committed(fs, source, path)
                return
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            try:
                fs.put_file(str(source), partial)
                fs.mv(partial, path)
            except BaseException:
                if fs.exists(partial):
                    fs.rm_file(partial)
                raise

    def remove(self) -> None:
        """Delete a file, if it is there."""
        fs, path = self._file_system()
        with self._errors("cannot be removed"):
            try:
                fs.rm_file(path)
            except FileNotFoundError:
                return

    def remove_folder(self) -> None:
        """Delete an empty folder, where it is more than a common beginning of names."""
        fs, path = self._file_system()
        if self.is_dir():
            with self._errors("cannot be removed"):
                fs.rmdir(path)

    def has_ranges(self, info: dict[str, Any]) -> bool:
        """Whether parts of the file can be asked for; some web servers send it whole only."""
        return self.scheme not in ("http", "https") or bool(info.get("partial"))

    def _file_system(self) -> tuple[Any, str]:
        try:
            import fsspec
        except ImportError:
            raise ModelFileError(f'{self}: a URL needs fsspec: pip install "hps-numba[fsspec]"') from None
        options = {"client_kwargs": {"region_name": self._region}} if self._region else {}
        problem: str
        try:
            fs, path = fsspec.core.url_to_fs(self._url, **options)
        except ImportError as missing:
            package = _BACKENDS.get(self.scheme)
            problem = f"{self.scheme}:// needs {package}: pip install {package}" if package else f"{missing}"
        except ValueError as unknown:
            problem = f"expected a scheme that fsspec knows, such as s3, gs or hdfs: {unknown}"
        except Exception as other:  # whatever the library of a store raises while it is set up
            problem = f"cannot be opened: {type(other).__name__}: {other}"
        else:
            return fs, str(path)
        raise ModelFileError(f"{self}: {safe_to_show(' '.join(problem.split()))}") from None

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """One typed error for what the libraries of the stores raise; without a cause, which might show credentials."""
        try:
            yield
            return
        except HpsError:
            raise
        except PermissionError as problem:
            text = f"permission denied: {problem}"
        except Exception as problem:
            text = f"{type(problem).__name__}: {problem}"
        raise ModelFileError(f"{self}: {what}: {safe_to_show(' '.join(text.split())[:300])}") from None


_ATOMIC = ("s3", "gs", "memory", "abfs", "az")
"""Stores in which an object appears when its last byte was sent."""


def _copy_committed(fs: Any, source: Path, path: str) -> None:
    """Copy through a file that appears when it is committed."""
    target = fs.open(path, "wb", autocommit=False) if fs.protocol != "memory" else _Held(fs, path)
    try:
        with source.open("rb") as file:
            while piece := file.read(_COPY_BYTES):
                target.write(piece)
        target.close()
    except BaseException:
        target.discard()
        raise
    target.commit()


class _Held:
    """fsspec's memory file system shows a file while it is written; here it is complete first."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path, self._pieces = fs, path, bytearray()

    def write(self, piece: bytes) -> None:
        self._pieces += piece

    def close(self) -> None:
        """Nothing to flush."""

    def discard(self) -> None:
        self._pieces.clear()

    def commit(self) -> None:
        self._fs.pipe_file(self._path, bytes(self._pieces))


Place: TypeAlias = Path | UrlPath
"""Where a model, dump or checkpoint lies."""
