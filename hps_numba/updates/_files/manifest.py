"""The manifest of a folder: the range of its files and messages, in one small file that is replaced as a whole.

A file belongs to the folder once the manifest has it, and as long as it does. Files are numbered without gaps, so two numbers
name them all, in order, however many there are.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hps_numba.errors import TierError
from hps_numba.updates._files.reading import content_of
from hps_numba.updates._files.writing import put_file, sync_folder

__all__ = ["MANIFEST", "Manifest", "manifest_content", "parse_manifest", "read_manifest", "write_manifest"]

MANIFEST = "manifest.json"
_FORMAT = "hps_numba updates 1"


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        stream: 32 random hexadecimal digits, of a folder from its making on.
        first, next: numbers of the first file, and of the one that comes next.
        first_offset, next_offset: of the first message in them, and of the one that comes next.
    """

    stream: str
    first: int = 1
    next: int = 1
    first_offset: int = 0
    next_offset: int = 0


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None if it has none.

    Raises:
        TierError: it cannot be read, is damaged or of another version.
    """
    content = manifest_content(folder)
    return None if content is None else parse_manifest(folder, content)


def manifest_content(folder: Path) -> bytes | None:
    """The manifest as it is in its file. Neither its time nor its inode tells whether it has changed: both may come again.

    Raises:
        TierError: it cannot be read.
    """
    path = folder / MANIFEST
    try:
        return content_of(path)
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise TierError(f"{path}: cannot be read: {problem.strerror}") from problem


def parse_manifest(folder: Path, content: bytes) -> Manifest:
    """What ``manifest_content`` says.

    Raises:
        TierError: it is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        given = json.loads(content)
        if given.pop("format") != _FORMAT:
            raise ValueError(f"expected format {_FORMAT!r}")
        if given.pop("sha256") != _digest(given):
            raise ValueError("the checksum does not match")
        return Manifest(**given)
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise TierError(
            f"{path}: expected the manifest of a folder of updates, got a damaged or foreign file: {problem}"
        ) from None


def write_manifest(folder: Path, manifest: Manifest, *, sync: bool) -> None:
    """Replace the manifest of a folder.

    Args:
        sync: it, and the names of files made before, are on the disk when this returns.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    given = asdict(manifest)
    text = json.dumps({"format": _FORMAT, **given, "sha256": _digest(given)})
    if sync:
        sync_folder(folder)
    put_file(folder / MANIFEST, text.encode(), sync=sync)
    if sync:
        sync_folder(folder)


def _digest(given: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
