"""What identifies the files of a sparse model, so that processes load the same rows once."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["source_digest"]


def source_digest(path: str, *options: object) -> bytes:
    """32 bytes: of the names, sizes and times of change of the files at ``path``, and of how they are loaded.

    Of what is no local file only the name counts.
    """
    digest = hashlib.sha256(repr(options).encode())
    place = Path(path)
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    digest.update(str(place.resolve()).encode() if place.exists() else path.encode())
    for file in files:
        if file.is_file():
            known = file.stat()
            digest.update(f"{file.name}\0{known.st_size}\0{known.st_mtime_ns}\0{known.st_ino}\n".encode())
    return digest.digest()
