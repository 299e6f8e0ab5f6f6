"""The folder of a row_log and those of its tables."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from hps_numba.errors import TierUnavailable
from hps_numba.storage.row_log.manifest import Manifest
from hps_numba.storage.row_log.segment import segment_paths

__all__ = ["check_folder", "delete_orphans"]

_OUR_FOLDER = re.compile(r"table-\d{6,}")
_OUR_FILE = re.compile(r"\d{8,}\.(rows|keys)")


def check_folder(folder: Path, *, make: bool) -> None:
    """See that a folder is there, or ``make`` it.

    Raises:
        TierUnavailable: it is not, or cannot be made.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        is_there = folder.is_dir()
    except OSError as problem:
        raise TierUnavailable(f"{folder}: cannot be made or looked at: {problem.strerror}") from problem
    if not is_there:
        raise TierUnavailable(f"{folder}: expected the folder of a row_log, got nothing that can be read")


def delete_orphans(folder: Path, manifest: Manifest) -> None:
    """Delete files and folders of tables that the manifest does not name: a crash left them."""
    known = {entry.folder: entry for entry in manifest.tables.values()}
    for home in folder.iterdir():
        if not _OUR_FOLDER.fullmatch(home.name) or home.is_symlink() or not home.is_dir():
            continue
        entry = known.get(home.name)
        if entry is None:
            shutil.rmtree(home, ignore_errors=True)
            continue
        keep = {path.name for number in entry.segments for path in segment_paths(home, number)}
        for path in home.iterdir():
            if _OUR_FILE.fullmatch(path.name) and path.name not in keep:
                path.unlink(missing_ok=True)
