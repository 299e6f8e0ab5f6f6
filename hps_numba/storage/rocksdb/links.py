"""A folder of links to the files of a database, in which it is opened for reading: nothing is written to the database.

Problem: rocksdict writes a file of its own into the folder of any database that it opens, so that one on a read-only disk would
not open. Choice: it opens a temporary folder of links. That is deleted as soon as the database is open, as RocksDB has opened
all files by then, and copied its log of writes to memory. Turned down: RocksDB's secondary instances, which catch up with the
writer: for them, rocksdict writes into the folder of the database too.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hps_numba.errors import TierUnavailable

__all__ = ["folder_of_links", "names_of_files"]


def names_of_files(path: Path) -> list[str]:
    """Names of the files of a database that hold what is in it.

    Raises:
        TierUnavailable: the folder cannot be read.
    """
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError as problem:
        raise TierUnavailable(f"{path}: cannot be read: {problem.strerror}") from problem
    kept = ("CURRENT", "IDENTITY", "MANIFEST-", "OPTIONS-")
    return sorted(name for name in names if name.startswith(kept) or name.endswith((".sst", ".log", ".blob")))


@contextmanager
def folder_of_links(path: Path) -> Iterator[Path]:
    """A folder with a link to each file of the database at ``path``, for as long as the block runs.

    Raises:
        TierUnavailable: the folder cannot be read, or the links cannot be made.
    """
    names, source, process = names_of_files(path), path.absolute(), os.getpid()
    try:
        folder = Path(tempfile.mkdtemp(prefix="hps_rocksdb_"))
    except OSError as problem:
        raise TierUnavailable(f"{path}: expected a folder for temporary files, got: {problem.strerror or problem}") from problem
    try:
        try:
            for name in names:
                (folder / name).symlink_to(source / name)
        except OSError as problem:
            raise TierUnavailable(f"{path}: cannot be opened for reading: {problem}") from problem
        yield folder
    finally:
        if os.getpid() == process:  # what a forked child finds is its parent's
            shutil.rmtree(folder, ignore_errors=True)
