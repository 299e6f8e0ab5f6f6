"""Scripts written for HugeCTR HPS run unchanged: its module names are aliases of this package's.

``install()``, or ``python -m hps_numba.compat script.py [arguments]``, makes these importable::

    import hierarchical_parameter_server as hps            the TensorFlow front end
    import hps_torch                                        the Torch front end
    from hugectr.inference import HPS, InferenceParams      the Python API

A name is loaded when it is imported, so frameworks are needed only by scripts that use them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import runpy
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__all__ = ["MODULES", "install", "main"]

#: module of HugeCTR: the module of this package that takes its place
MODULES = {
    "hierarchical_parameter_server": "hps_numba.frontends.tensorflow",
    "hps_torch": "hps_numba.frontends.torch",
    "hugectr": "",  # a package with nothing in it but the next
    "hugectr.inference": "hps_numba",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of ``MODULES``, before anything else of these names."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=name == "hugectr") if name in MODULES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name, f"{MODULES[spec.name] or 'hps_numba'} under its name in HugeCTR.")
        source = MODULES[spec.name]
        if source:
            real = importlib.import_module(source)
            names = {name: getattr(real, name) for name in (*real.__all__, "__version__")}
            module.__dict__.update(names, __all__=sorted(names))
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: ``create_module`` filled the module."""


_finder = _Finder()


def install() -> None:
    """Make the names of ``MODULES`` importable in this process; calling it again changes nothing.

    A module of that name that was imported before stays as it is.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a script as ``python script.py arguments`` would, with the module names of HugeCTR.

    Raises:
        SystemExit: no script is given.   Otherwise what the script raises.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        raise SystemExit("usage: python -m hps_numba.compat script.py [arguments]")
    install()
    sys.argv = given
    runpy.run_path(given[0], run_name="__main__")


if __name__ == "__main__":
    main()
