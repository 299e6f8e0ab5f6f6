"""HugeCTR's packages for every process of an environment: a ``.pth`` file in its ``site-packages`` names their folder.

The file holds a path and no code. It costs the start of an interpreter one line to read, and when hps_numba is uninstalled, it
names a folder that is not there, which Python ignores. The folder comes last on the path: HugeCTR itself, if it is installed,
keeps its names.
"""

from __future__ import annotations

import json
import os
import site
import stat
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from hps_numba.compat.folder import NAMES, PACKAGES, without_packages
from hps_numba.errors import HpsError

__all__ = ["FILE", "disable", "enable", "is_enabled", "origins", "site_folder"]

FILE = "hps_numba_compat.pth"
_FIRST_LINE = "# Written by `hps-numba compat enable`, removed by `hps-numba compat disable`"
_PROBE = """
import json, sys
from importlib.machinery import PathFinder
specs = {name: PathFinder.find_spec(name) for name in sys.argv[1:]}
print(json.dumps({name: spec and (spec.origin or list(spec.submodule_search_locations)[0]) for name, spec in specs.items()}))
"""


def site_folder(*, user: bool = False) -> Path:
    """Where the file belongs: ``site-packages`` of the environment, or with ``user`` that of the user.

    Raises:
        HpsError: this environment does not look there.
    """
    if user:
        if not site.ENABLE_USER_SITE:
            raise HpsError(f"--user: {sys.prefix} does not use the packages of its user, leave it out")
        return Path(site.getusersitepackages())
    known, installed = [Path(folder) for folder in site.getsitepackages()], Path(sysconfig.get_path("purelib"))
    return installed if installed in known or not known else known[0]


def enable(folder: Path) -> Path:
    """Write the file to a folder, whole or not at all, and return its path; a file of ours is replaced.

    Raises:
        HpsError: the folder cannot be written, another file has the name, or hps_numba is where a ``.pth`` cannot point.
    """
    text, path = f"{_FIRST_LINE}\n{_line(folder)}\n", folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(".new", f".{FILE}.", folder)
        try:
            with os.fdopen(number, "wb") as file:
                file.write(os.fsencode(text))
                os.fchmod(number, 0o644)
            is_enabled(folder)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink()
            raise
    except OSError as problem:
        raise _not_writable(folder, problem) from problem
    return path


def disable(folder: Path) -> bool:
    """Remove the file from a folder; False if it is not there.

    Raises:
        HpsError: another file has the name, or the folder cannot be written.
    """
    if not is_enabled(folder):
        return False
    try:
        (folder / FILE).unlink(missing_ok=True)
    except OSError as problem:
        raise _not_writable(folder, problem) from problem
    return True


def is_enabled(folder: Path) -> bool:
    """Whether the file is in a folder.

    Raises:
        HpsError: another file has its name, or it cannot be read.
    """
    path = folder / FILE
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise HpsError(f"{path}: expected a file of hps_numba, got something else, remove it by hand")
        with path.open("rb") as file:
            start = file.read(len(_FIRST_LINE))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as problem:
        raise HpsError(f"{path}: cannot be read: {problem.strerror}") from problem
    if start != _FIRST_LINE.encode():
        raise HpsError(f"{path}: expected a file of hps_numba, got another, remove it by hand")
    return True


def origins() -> dict[str, str | None]:
    """Where a new process of this environment finds each of HugeCTR's packages, or None; not counting our ``PYTHONPATH``.

    Raises:
        HpsError: the interpreter does not start.
    """
    path = without_packages(os.environ.get("PYTHONPATH", ""))
    command = [sys.executable, "-P", "-c", _PROBE, *NAMES]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    if done.returncode:
        raise HpsError(f"{sys.executable}: expected it to start, got exit code {done.returncode}: {done.stderr.strip()[-200:]}")
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def _line(folder: Path) -> str:
    """The folder of the packages, relative to that of the file if it is inside: then an environment can be moved."""
    line = str(PACKAGES.relative_to(folder)) if PACKAGES.is_relative_to(folder) else str(PACKAGES)
    if line != line.strip() or "\n" in line or not PACKAGES.is_dir():
        raise HpsError(f"{PACKAGES}: expected hps_numba in a folder that a .pth file can name, unpacked")
    return line


def _not_writable(folder: Path, problem: OSError) -> HpsError:
    hint = "use --user" if site.ENABLE_USER_SITE else "use an environment of your own (python -m venv)"
    return HpsError(f"{folder}: expected a folder that can be written, got {problem.strerror}; {hint}, or ask its owner")
