"""What a trainer says of a version of a model: which files its rows are in, and which rows are newer than the files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hps_numba.errors import ConfigError

__all__ = ["Manifest"]

_MOST = 2**63 - 1
_MAX_BYTES = 1 << 20  # of its JSON text


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A version of a model: announced (without files), ready to be served (with files), or to be taken back.

    Attributes:
        model: its name.
        version: its number, at least 0.
        tables: path or URL of the sparse model of each table, by table name; empty: a snapshot is being taken, its files come.
        dense: path or URL of the dense part, for those who asked to be told (``HPS.on_version``).
        since_ms: rows that changed from then on, in ms since 1970, are newer than the files; None: none is.
        issued_ms: when it was published, in ms since 1970; later ones have a larger number.
        roll_back: the version is the one before that in force, to which the server is to go back.

    Raises:
        ConfigError: a value is not as above.
    """

    model: str
    version: int
    tables: Mapping[str, str] = field(default_factory=dict)
    dense: str | None = None
    since_ms: int | None = None
    issued_ms: int = 0
    roll_back: bool = False

    def __post_init__(self) -> None:
        _expect(isinstance(self.model, str) and bool(self.model), "model", "a name", self.model)
        for name in ("version", "issued_ms", "since_ms"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST
            _expect(whole or (name == "since_ms" and value is None), name, f"an integer from 0 to {_MOST}", value)
        _expect(self.dense is None or isinstance(self.dense, str), "dense", "a path or URL", self.dense)
        _expect(isinstance(self.roll_back, bool), "roll_back", "true or false", self.roll_back)
        texts = isinstance(self.tables, Mapping) and all(
            isinstance(text, str) and text for pair in self.tables.items() for text in pair
        )
        _expect(texts, "tables", "a path or URL for each table name", self.tables)

    def to_json(self) -> bytes:
        """As text, which ``from_json`` reads."""
        return json.dumps(self.to_dict(), ensure_ascii=True, separators=(",", ":")).encode()

    def to_dict(self) -> dict[str, Any]:
        """All values by name."""
        return {**vars(self), "tables": dict(self.tables)}

    @classmethod
    def from_json(cls, text: bytes) -> Manifest:
        """
        Raises:
            ConfigError: it is not the text of a manifest.
        """
        if len(text) > _MAX_BYTES:
            raise ConfigError(f"manifest: expected at most {_MAX_BYTES} bytes, got {len(text)}")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            raise ConfigError(f"manifest: expected JSON, got {bytes(text[:40])!r}") from None
        known = cls.__dataclass_fields__
        if not isinstance(values, dict) or not {"model", "version"} <= set(values) <= set(known):
            names = sorted(values)[:20] if isinstance(values, dict) else values
            raise ConfigError(f"manifest: expected model, version and some of {', '.join(known)}, got {str(names)[:200]}")
        return cls(**values)


def _expect(fits: bool, name: str, expected: str, got: object) -> None:
    if not fits:
        raise ConfigError(f"manifest: {name}: expected {expected}, got {str(got)[:200]!r}")
