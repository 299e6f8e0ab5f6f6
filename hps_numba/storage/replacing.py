"""Replace what is at a place, local or at a URL, by something new that is complete.

Locally, ``runtime/replacing.py`` does it in one step. At a URL, everything is written to a temporary directory of this machine
first (HDF5 seeks, a checkpoint is a zip archive), and then sent; a store shows an object when its last byte was sent. A folder
of several objects has a last one, ``key``: it is removed before the others change and sent after them, so that there is a
complete model or none. Turned down: sending while the rows are made, which needs a store that takes bytes back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hps_numba.errors import HpsError, ModelFileError
from hps_numba.runtime.replacing import Judge
from hps_numba.runtime.replacing import replacing as replacing_locally
from hps_numba.storage.url_files import open_url
from hps_numba.storage.urls import Place, UrlPath

__all__ = ["UrlJudge", "head_judge", "replacing"]

UrlJudge = Callable[[UrlPath], "str | None"]
"""Like a ``Judge``: says in words why what is at a URL must not be replaced, or None."""

_LAST = "key"  # of the files of a folder


def head_judge(what: str, is_one: Callable[[bytes], bool]) -> UrlJudge:
    """A judge for writers of files: only a file whose first 64 bytes are those of ``what`` may be replaced."""

    def judge(place: UrlPath) -> str | None:
        if place.is_dir():
            return f"is a directory, where {what} was to be written"
        with open_url(place) as file:
            return None if is_one(file.read(64) or b"") else f"is a file, but not {what}"

    return judge


@contextmanager
def replacing(place: Place, *, overwrite: bool, judge: Judge, url_judge: UrlJudge) -> Iterator[Path]:
    """A new local path to write to; when the block ends well, what is there takes the place of ``place``.

    Args:
        overwrite: something may be there; it is replaced if ``judge`` or, at a URL, ``url_judge`` agrees.

    Raises:
        ModelFileError: something is there and may not be replaced, or it cannot be written or sent.
    """
    if isinstance(place, Path):
        with replacing_locally(place, overwrite=overwrite, judge=judge) as new:
            yield new
        return
    _check_target(place, overwrite, url_judge)
    try:
        staging = tempfile.TemporaryDirectory(prefix="hps_numba_upload_")
    except OSError as problem:
        raise ModelFileError(f"{place}: cannot be staged in a temporary directory: {problem}") from None
    with staging as folder:
        new = Path(folder) / "new"
        yield new
        _check_target(place, overwrite, url_judge)
        if new.is_dir():
            _send_folder(new, place)
        else:
            _clear_folder(place)
            place.upload(new)


def _check_target(place: UrlPath, overwrite: bool, judge: UrlJudge) -> None:
    if not place.name:
        raise ModelFileError(f"{place}: expected the name of a file or directory to write, got the root")
    info = place.info()
    if info is None:
        return
    if not overwrite:
        raise ModelFileError(f"{place}: exists already; pass overwrite=True to replace it")
    if info["type"] == "file" and not info.get("size"):
        return
    try:
        reason = judge(place)
    except HpsError as problem:
        reason = f"cannot be judged: {str(problem).removeprefix(f'{place}: ')}"
    if reason is not None:
        raise ModelFileError(f"{place}: {reason}; it is not replaced")


def _clear_folder(place: UrlPath) -> None:
    """Remove the model in a folder, if there is one, whose place a file takes: ``key`` first."""
    if place.is_dir():
        for name in sorted(place.names(), key=lambda name: name != _LAST):
            (place / name).remove()
        place.remove_folder()


def _send_folder(new: Path, place: UrlPath) -> None:
    if place.is_file():
        place.remove()
    old = place.names() if place.is_dir() else set()
    names = sorted(entry.name for entry in new.iterdir())
    for name in sorted(old, key=lambda name: name != _LAST):
        if name == _LAST or name not in names:
            (place / name).remove()
    sent = []
    try:
        for name in sorted(names, key=lambda name: name == _LAST):
            (place / name).upload(new / name)
            sent.append(name)
    except BaseException:
        for name in sent:
            (place / name).remove()
        raise
