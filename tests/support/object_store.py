"""An object store in a process of its own: the few requests of S3 that a broker makes, in memory.

``python -m support.object_store`` says its port and serves until it is killed. What a broker has written is still there when
the broker is killed. Nobody is asked for a signature.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
import threading
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_LOCK = threading.Lock()
_WRITES = itertools.count()


class Entry(NamedTuple):
    """An object; ``number`` of its write: times of objects ascend."""

    content: bytes
    tag: str
    number: int


_FOLDERS: dict[str, dict[str, Entry]] = {}  # what stands before the last '/' of a key -> key -> object


def etag(content: bytes) -> str:
    """As S3 makes it, quotes included."""
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


class Requests(BaseHTTPRequestHandler):
    """PUT (also if there is no object, or still the same one), GET, HEAD, DELETE and lists by prefix of ``/bucket/key``."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer is sent as one

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        absent, same = self.headers.get("If-None-Match"), self.headers.get("If-Match")
        with _LOCK:
            folder = _FOLDERS.setdefault(self._key.rpartition("/")[0], {})
            old = folder.get(self._key)
            refused = (absent is not None and old is not None) or (same is not None and (old is None or old.tag != same))
            if not refused:
                folder[self._key] = Entry(content, etag(content), next(_WRITES))
        self._answer(412 if refused else 200, b"", etag(content))

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            self._answer(200, listing(f"{self._key}/", query.get("prefix", [""])[0]))
            return
        found = _FOLDERS.get(self._key.rpartition("/")[0], {}).get(self._key)
        if found is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        elif self.headers.get("If-None-Match") == found.tag:
            self._answer(304, b"", found.tag)
        else:
            self._answer(200, found.content, found.tag)

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        _FOLDERS.get(self._key.rpartition("/")[0], {}).pop(self._key, None)
        self._answer(204, b"")

    @property
    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).strip("/")

    def _answer(self, status: int, content: bytes, tag: str = "") -> None:
        self.send_response(status)
        if tag:
            self.send_header("ETag", tag)
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Nothing."""


def time_of(number: int) -> str:
    """A millisecond for each write."""
    return f"{datetime(2026, 1, 1) + timedelta(milliseconds=number):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"


def listing(bucket: str, prefix: str) -> bytes:
    """All objects of a bucket whose keys begin with ``prefix``."""
    start = bucket + prefix
    with _LOCK:
        near = [folder for name, folder in _FOLDERS.items() if start.startswith(f"{name}/") or name.startswith(start)]
        found = sorted((key, entry) for folder in near for key, entry in folder.items() if key.startswith(start))
    parts = [
        f"<Contents><Key>{escape(key.removeprefix(bucket))}</Key><LastModified>{time_of(entry.number)}</LastModified>"
        f"<ETag>{escape(entry.tag)}</ETag><Size>{len(entry.content)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for key, entry in found
    ]
    head = f"<Name>{escape(bucket)}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(found)}</KeyCount>"
    tail = "<MaxKeys>1000000</MaxKeys><IsTruncated>false</IsTruncated>"
    return f"<ListBucketResult>{head}{tail}{''.join(parts)}</ListBucketResult>".encode()


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
    server.daemon_threads = True
    server.handle_error = lambda request, address: None  # type: ignore[method-assign]  # a broker that was killed
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
