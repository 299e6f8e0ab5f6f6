"""The metrics text of a server that is reached by HTTP."""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import typer

from hps_numba.errors import HpsError

__all__ = ["Scraper", "is_url"]

_TOKEN = "HPS_NUMBA_TOKEN"  # as ``hps-numba serve`` has it
_SECONDS = 10.0  # that one look may take
_MAX_BYTES = 64 << 20
_PIECE = 1 << 16


def is_url(target: str) -> bool:
    """Whether an argument is a URL and not the path of a config."""
    return "://" in target


class Scraper:
    """Reads the metrics of one server.

    The token in the environment variable ``HPS_NUMBA_TOKEN``, if there is one, is sent to it and to no other: redirections are
    not followed, and no proxy is asked.

    Args:
        url: ``http://HOST:PORT``, or with a path if the metrics are not at ``/metrics``.

    Attributes:
        url: of the metrics.

    Raises:
        BadParameter: not such a URL.
    """

    def __init__(self, url: str) -> None:
        self.url = _metrics_url(url)
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirection)

    def read(self) -> str:
        """The text now.

        Raises:
            HpsError: the server cannot be reached, or does not answer with metrics.
        """
        request = urllib.request.Request(self.url, headers={"Accept": "text/plain; version=0.0.4"})
        if os.environ.get(_TOKEN):
            request.add_header("Authorization", f"Bearer {os.environ[_TOKEN]}")
        try:
            with self._opener.open(request, timeout=_SECONDS) as answer:
                return self._body(answer).decode("utf-8", "replace")
        except urllib.error.HTTPError as problem:
            with problem:
                hint = f" ({_TOKEN} in the environment is the token that is sent)" if problem.code in (401, 403) else ""
                raise HpsError(f"{self.url}: expected metrics, got HTTP status {problem.code}{hint}") from problem
        except urllib.error.URLError as problem:
            reason = getattr(problem.reason, "strerror", None) or problem.reason
            raise HpsError(f"{self.url}: cannot be read: {reason}") from problem
        except (OSError, http.client.HTTPException, ValueError) as problem:
            raise HpsError(f"{self.url}: cannot be read: {problem or type(problem).__name__}") from problem

    def _body(self, answer: Any) -> bytes:
        body, began = bytearray(), time.monotonic()
        while piece := answer.read1(_PIECE):
            body += piece
            if len(body) > _MAX_BYTES:
                raise HpsError(f"{self.url}: expected at most {_MAX_BYTES >> 20} MiB of metrics, got more")
            if time.monotonic() - began > _SECONDS:
                raise HpsError(f"{self.url}: expected metrics within {_SECONDS:g} s, got a part of them")
        return bytes(body)


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        """Answer with the status of the redirection."""


def _metrics_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and parts.port != 0
    except ValueError:  # a port that is no number, a bracket that is not closed
        valid = False
    if not valid or not url.isascii() or not url.isprintable() or " " in url:
        shown = url if "@" not in url else "one with a user name"
        raise typer.BadParameter(f"expected a config, or http://HOST:PORT, got {shown[:100]!r}", param_hint="TARGET")
    return urlunsplit(parts._replace(path=parts.path if parts.path.strip("/") else "/metrics", fragment=""))
