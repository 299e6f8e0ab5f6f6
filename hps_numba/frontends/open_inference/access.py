"""Who may ask: bearers of a token."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from hps_numba.errors import ConfigError

__all__ = ["TOKEN_VARIABLE", "Access", "read_tokens"]

TOKEN_VARIABLE = "HPS_NUMBA_TOKEN"
"""Environment variable with a token, for where there is no file."""

_MIN_TOKEN = 16  # characters


class Access:
    """Whether a request may be answered.

    Args:
        tokens: any one of them will do; none: everybody may ask.

    Thread safety: every method.
    """

    def __init__(self, tokens: Iterable[str] = ()) -> None:
        self._digests = [_digest(token.encode()) for token in tokens]

    @property
    def restricted(self) -> bool:
        """Whether a token is needed."""
        return bool(self._digests)

    def allows(self, authorization: bytes | None) -> bool:
        """Whether an ``Authorization`` header bears a token; a wrong one takes as long as a right one."""
        if not self._digests:
            return True
        scheme, _, token = (authorization or b"").partition(b" ")
        given = _digest(token.strip())
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(found) and scheme.lower() == b"bearer"


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def read_tokens(path: Path | None) -> tuple[str, ...]:
    """The tokens in a file, one a line; without a file, that of the environment, if it is there.

    Raises:
        ConfigError: a token is short, or not of plain characters.   OSError: the file cannot be read.
    """
    if path is None:
        place, lines = TOKEN_VARIABLE, [os.environ[TOKEN_VARIABLE]] if os.environ.get(TOKEN_VARIABLE) else []
    else:
        if not path.is_file():
            raise ConfigError(f"{path}: expected a file with tokens")
        place, lines = str(path), path.read_text(encoding="utf-8", errors="replace").split("\n")
    tokens = tuple(line.strip() for line in lines if line.strip())
    if path is not None and not tokens:
        raise ConfigError(f"{place}: expected a token, got an empty file")
    for token in tokens:
        if len(token) < _MIN_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
            raise ConfigError(f"{place}: expected tokens of at least {_MIN_TOKEN} plain characters, got one of {len(token)}")
    return tokens
