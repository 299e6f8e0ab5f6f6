"""The folder with HugeCTR's packages, and ``PYTHONPATH`` with it."""

from __future__ import annotations

import os
from pathlib import Path

from hps_numba.errors import HpsError

__all__ = ["NAMES", "PACKAGES", "with_packages", "without_packages"]

PACKAGES = Path(__file__).with_name("packages")
#: the packages in it
NAMES = ("hierarchical_parameter_server", "hps_torch", "hugectr")


def with_packages(path: str) -> str:
    """A ``PYTHONPATH`` with the folder in front of what it held.

    Raises:
        HpsError: the name of the folder holds the character that separates folders.
    """
    if os.pathsep in str(PACKAGES):
        raise HpsError(f"PYTHONPATH: expected hps_numba in a folder without {os.pathsep!r} in its name, got {str(PACKAGES)!r}")
    others = without_packages(path)
    return f"{PACKAGES}{os.pathsep}{others}" if others else str(PACKAGES)


def without_packages(path: str) -> str:
    """A ``PYTHONPATH`` without the folder."""
    return os.pathsep.join(entry for entry in path.split(os.pathsep) if entry != str(PACKAGES))
