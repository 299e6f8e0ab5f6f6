"""The manifest: which tables and which segments there are, in one small file that is replaced as a whole."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hps_numba.errors import TierError
from hps_numba.runtime.replacing import file_judge, replace_file

__all__ = ["MANIFEST", "Manifest", "Signature", "TableEntry", "read_manifest", "signature_of", "sync_folder", "write_manifest"]

MANIFEST = "manifest.json"
_FORMAT = "hps_numba row_log 1"
_START = f'{{"format": "{_FORMAT}"'.encode()
Signature = tuple[int, int, int] | None
"""Tells two versions of a file apart; None: there is no file."""


@dataclass(frozen=True)
class TableEntry:
    """One table.

    Attributes:
        number: of its folder; never used again for another table.   dim: row width.
        seed: random; part of all its checksums.   segments: their numbers, ascending; the last one is written to.
    """

    number: int
    dim: int
    seed: int
    segments: tuple[int, ...]

    @property
    def folder(self) -> str:
        """Name of the folder of the table."""
        return f"table-{self.number:06}"

    def with_segments(self, *segments: int) -> TableEntry:
        """The same table with other segments."""
        return replace(self, segments=segments)


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        next_number: of the next table.   tables: by tag.
    """

    next_number: int = 1
    tables: dict[str, TableEntry] = field(default_factory=dict)

    def with_table(self, tag: str, entry: TableEntry | None) -> Manifest:
        """The same with another entry for a tag; None removes it."""
        tables = {name: other for name, other in self.tables.items() if name != tag}
        if entry is None:
            return Manifest(self.next_number, tables)
        return Manifest(max(self.next_number, entry.number + 1), {**tables, tag: entry})


def signature_of(path: Path) -> Signature:
    """What changes when a file does.

    Raises:
        OSError: it cannot be looked at.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None if it has none.

    Raises:
        TierError: it is damaged or of another version, or cannot be read.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise TierError(f"{path}: cannot be read: {problem.strerror}") from problem
    try:
        given = json.loads(content)
        if given["format"] != _FORMAT:
            raise ValueError(f"expected format {_FORMAT!r}, got {given['format']!r}")
        if given["sha256"] != _digest(given):
            raise ValueError("the checksum does not match")
        entries = {tag: TableEntry(**{**entry, "segments": tuple(entry["segments"])}) for tag, entry in given["tables"].items()}
        return Manifest(given["next_number"], entries)
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise TierError(f"{path}: expected the manifest of a row_log, got a damaged or foreign file: {problem}") from problem


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of a folder; it is on the disk when this returns.

    Raises:
        TierError: it cannot be written; the old one is as it was.
    """
    tables = {tag: asdict(entry) for tag, entry in manifest.tables.items()}
    given: dict[str, Any] = {"format": _FORMAT, "next_number": manifest.next_number, "tables": tables}
    given = json.loads(json.dumps(given))
    text = json.dumps({**given, "sha256": _digest(given)})
    judge = file_judge("the manifest of a row_log", lambda start: start.startswith(_START))
    replace_file(folder / MANIFEST, text.encode(), judge, error=TierError)
    try:
        sync_folder(folder)
    except OSError as problem:
        raise TierError(f"{folder}: cannot be synced: {problem.strerror}") from problem


def sync_folder(folder: Path) -> None:
    """See that new files of a folder are found after a loss of power.

    Raises:
        OSError: the disk fails.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(given: dict[str, Any]) -> str:
    content = {key: value for key, value in given.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
