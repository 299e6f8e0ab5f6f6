"""Scripts written for HugeCTR HPS run unchanged: its package names are those of packages that this one brings along.

::

    import hierarchical_parameter_server as hps            the TensorFlow front end
    import hps_torch                                        the Torch front end
    from hugectr.inference import HPS, InferenceParams      the Python API

They are ordinary packages in the folder ``packages``. What differs is only how a process finds that folder:

* ``python -m hps_numba.compat script.py`` puts it in front of ``PYTHONPATH`` and then *becomes* ``python script.py``. So
  nothing about ``sys.path``, ``__main__``, exit codes or signals has to be imitated, and child processes inherit it.
* ``hps-numba compat enable`` names it in a ``.pth`` file of the environment, for every process from then on.
* ``install()`` does it for a process that is running, such as a notebook.

A hook that runs code when an interpreter starts (``sitecustomize``, an ``import`` line in the ``.pth``) was turned down: it
costs every process time, has to get along with those of others, and breaks start-up when the package is gone.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from typing import Any

from hps_numba.compat.folder import NAMES, PACKAGES, with_packages
from hps_numba.compat.launch import main

__all__ = ["MODULES", "install", "main"]

#: module of HugeCTR: the module of this package that takes its place
MODULES = {
    "hierarchical_parameter_server": "hps_numba.frontends.tensorflow",
    "hps_torch": "hps_numba.frontends.torch",
    "hugectr": "",  # the enums of configs, and the next
    "hugectr.inference": "hps_numba",
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds HugeCTR's packages in the folder of ours, before anything else of these names."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in (*NAMES, "_hps_numba_found"):
            return None  # what is in a package is found by the path of the package
        return importlib.machinery.PathFinder.find_spec(name, [str(PACKAGES)])


_finder = _Finder()


def install(*, children: bool = True) -> None:
    """Make HugeCTR's packages importable in this process; calling it again changes nothing.

    A module of that name that was imported before stays as it is.

    Args:
        children: processes started from now on have them too: ``PYTHONPATH`` in ``os.environ`` gets their folder.

    Raises:
        HpsError: with ``children``, the folder has a name that ``PYTHONPATH`` cannot hold.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if children:
        os.environ["PYTHONPATH"] = with_packages(os.environ.get("PYTHONPATH", ""))
