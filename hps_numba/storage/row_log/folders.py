"""The folder of a row_log and those of its tables."""

from __future__ import annotations

import itertools
import logging
import re
import shutil
from pathlib import Path

from hps_numba.errors import TierError, TierNotMade, TierUnavailable
from hps_numba.runtime.paths import is_free
from hps_numba.storage.row_log.manifest import MANIFEST, Manifest, TableEntry, read_manifest
from hps_numba.storage.row_log.segment import segment_paths

__all__ = ["check_folder", "clear_orphans", "manifest_of"]

log = logging.getLogger(__name__)

_OUR_FOLDER = re.compile(r"table-\d{6,}")
_OUR_FILE = re.compile(r"\d{8,}\.(rows|keys)")


def check_folder(folder: Path, *, make: bool) -> None:
    """See that a folder is there, or ``make`` it.

    Raises:
        TierUnavailable: it is not, or cannot be made.   TierNotMade: it is not, and nothing else has its name.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        is_there = folder.is_dir()
    except OSError as problem:
        raise TierUnavailable(f"{folder}: cannot be made or looked at: {problem.strerror}") from problem
    if not is_there and is_free(folder):
        raise TierNotMade(f"{folder}: expected the folder of a row_log, got nothing: no process has made it yet")
    if not is_there:
        raise TierUnavailable(f"{folder}: expected the folder of a row_log, got nothing that can be read")


def manifest_of(folder: Path) -> Manifest:
    """The manifest of a folder; an empty one if there is none, and no table either.

    Raises:
        TierError: it is damaged, or missing beside a table that holds something.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        found = next((home for home in _table_folders(folder) if _holds_something(home)), None)
        manifest = read_manifest(folder)  # a writer may have begun in between
        if manifest is None and found is not None:
            raise TierError(
                f"{folder / MANIFEST}: expected the manifest of {found.name} and the other tables here, got no file: "
                f"restore it from a copy, or remove the folders of the tables"
            )
    return manifest or Manifest()


def clear_orphans(folder: Path, manifest: Manifest) -> None:
    """Delete files and folders of tables that the manifest once named: a crash left them.

    Newer ones are there if a crash came before the manifest named them; then they are empty, and are left to be used. Or the
    manifest was replaced by an older one: they are renamed, so that nothing is written over them.

    Raises:
        TierError: one cannot be renamed.
    """
    known = {entry.folder: entry for entry in manifest.tables.values()}
    for home in _table_folders(folder):
        entry = known.get(home.name)
        if entry is not None:
            _clear_segments(home, entry)
        elif _number_of(home) < manifest.next_number:
            shutil.rmtree(home, ignore_errors=True)
        elif _holds_something(home):
            _set_aside(home, f"the manifest knows tables up to {manifest.next_number - 1}")


def _clear_segments(home: Path, entry: TableEntry) -> None:
    keep = {path.name for number in entry.segments for path in segment_paths(home, number)}
    last = entry.segments[-1]
    others = sorted(path for path in home.iterdir() if _OUR_FILE.fullmatch(path.name) and path.name not in keep)
    newer = [path for path in others if _number_of(path) > last]
    for path in others:
        if path not in newer:
            path.unlink(missing_ok=True)
    if any(path.stat().st_size for path in newer):
        for path in newer:  # also empty ones: they belong together
            _set_aside(path, f"the manifest knows segments up to {last}")


def _set_aside(path: Path, why: str) -> None:
    names = (path.with_name(f"{path.name}.unknown-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    try:
        path.rename(aside)
    except OSError as problem:
        raise TierError(f"{path}: {why}, and it cannot be renamed: {problem.strerror}") from problem
    log.warning("%s: %s: an older one than the files? It is %s from now on", path, why, aside.name)


def _table_folders(folder: Path) -> list[Path]:
    try:
        return sorted(
            home for home in folder.iterdir() if _OUR_FOLDER.fullmatch(home.name) and home.is_dir() and not home.is_symlink()
        )
    except OSError as problem:
        raise TierError(f"{folder}: cannot be listed: {problem.strerror}") from problem


def _holds_something(home: Path) -> bool:
    """Whether there is anything but empty files, which is all that a table has before the manifest names it."""
    try:
        return any(not path.is_file() or path.stat().st_size for path in home.iterdir())
    except FileNotFoundError:  # dropped meanwhile
        return False
    except OSError as problem:
        raise TierError(f"{home}: cannot be looked at: {problem.strerror}") from problem


def _number_of(path: Path) -> int:
    return int(path.name.removeprefix("table-").partition(".")[0])
