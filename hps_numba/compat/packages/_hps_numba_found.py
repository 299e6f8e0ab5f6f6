"""Makes ``hps_numba`` importable for the packages beside this file.

Usually it is. It is not in a process whose interpreter is another than that of the environment, or when a checkout that is not
installed was used by its folder: the process then got their folder from ``PYTHONPATH`` and nothing else.
"""

import importlib.util
import sys
from pathlib import Path

_HOME = Path(__file__).parents[3]


def _find() -> None:
    if importlib.util.find_spec("hps_numba") is not None:
        return
    installed = _HOME.name in ("site-packages", "dist-packages")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if installed and version not in _HOME.parts:
        raise ImportError(
            f"hugectr, hps_torch and hierarchical_parameter_server are those of hps_numba in {_HOME}, "
            f"and {sys.executable} cannot import it: expected {version} there"
        )
    sys.path.append(str(_HOME))


_find()
