"""Plugins: a storage tier, a file format, a cache policy or an update source is found by name.

A built-in plugin is a file of a folder: every file without a leading underscore defines ``PLUGIN``, the class or object that
the file is about, and goes by the name of the file; a new one is one new file. An installed package adds its own through an
entry point (groups ``hps_numba.policies``, ``hps_numba.tiers``, ``hps_numba.sources``, ``hps_numba.formats``). A user's own is
named ``package.module:NAME`` or ``path/to/file.py:NAME``: such a reference runs code that a config may have brought along, so
it is loaded only where the caller allows it.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hps_numba.errors import ConfigError, HpsError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["entry_points", "is_built_in", "is_reference", "load", "load_reference", "names"]

_GROUPS = {
    "hps_numba.kernels.policies": "hps_numba.policies",
    "hps_numba.storage.formats": "hps_numba.formats",
    "hps_numba.storage.tiers": "hps_numba.tiers",
    "hps_numba.updates": "hps_numba.sources",
}
"""Folder of built-in plugins -> group of entry points of the same kind."""


def names(package: str) -> list[str]:
    """Names of all plugins of the kind of ``package``, e.g. ``names("hps_numba.storage.formats")``, sorted."""
    return sorted({*_built_in(package), *entry_points(package)})


def _built_in(package: str) -> set[str]:
    folder = importlib.import_module(package).__path__
    return {module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_")}


@cache
def entry_points(package: str) -> Mapping[str, EntryPoint]:
    """Entry points of installed packages for plugins of the kind of ``package``, by name; found once per process."""
    if package not in _GROUPS:
        return {}
    from importlib import metadata  # takes as long to import as the whole package

    return {point.name: point for point in metadata.entry_points(group=_GROUPS[package])}


def is_built_in(package: str, name: str) -> bool:
    """True for a plugin of this package, which its own tests check; False for those of others."""
    return name in _built_in(package)


def is_reference(name: str) -> bool:
    """True for ``module:NAME`` and ``file.py:NAME``, which point outside the package."""
    return ":" in name


def load(
    package: str,
    name: str,
    *,
    allow_code: bool = False,
    folder: Path | None = None,
    error: type[HpsError] = ConfigError,
) -> Any:
    """The plugin called ``name``: built-in, an entry point, or a reference to one of the user's own.

    Args:
        allow_code: ``name`` may be a reference (``load_reference``).
        folder: where a relative file is looked up after the working directory.

    Raises:
        error: no such plugin (the message lists the known ones), or it cannot be imported.
    """
    if is_reference(name):
        return load_reference(name, allow_code=allow_code, folder=folder, error=error)
    if name in _built_in(package):
        return importlib.import_module(f"{package}.{name}").PLUGIN
    if name in entry_points(package):
        return _load_entry_point(entry_points(package)[name], error)
    known = names(package)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise error(f"{package.rpartition('.')[2]}: {name!r} is unknown, known are {', '.join(known)}{hint}")


def _load_entry_point(point: EntryPoint, error: type[HpsError]) -> Any:
    try:
        return point.load()
    except Exception as problem:
        raise error(f"{point.name!r}: cannot load the entry point {point.value!r}: {problem}") from problem


def load_reference(
    reference: str, *, allow_code: bool = False, folder: Path | None = None, error: type[HpsError] = ConfigError
) -> Any:
    """Load ``package.module:NAME`` or ``file.py:NAME``, the file from the working directory or else from ``folder``.

    It is imported only with ``allow_code``: a config that comes from elsewhere must not run code.

    Raises:
        error: the file or module is missing or fails, it has no such name, or ``allow_code`` is off.
    """
    where, _, attribute = reference.rpartition(":")
    is_file = where.endswith(".py")
    if not allow_code:
        raise error(f"{reference!r} runs code from a {'file' if is_file else 'module'}: pass allow_code=True if you trust it")
    if is_file:
        file = Path(where).expanduser()
        module = _module_of_file(folder / file if folder is not None and not file.is_file() else file, error)
    else:
        try:
            module = importlib.import_module(where)
        except Exception as problem:
            raise error(f"{reference!r}: cannot import {where!r}: {problem}") from problem
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise error(f"{reference!r}: {where!r} has no {attribute!r}") from None


def _module_of_file(path: Path, error: type[HpsError]) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise error(f"{path}: no such file")
    name = f"hps_numba_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise error(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        # not by the loader: the bytecode that it caches beside the file does not notice an edit within the same second
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
    except Exception as problem:
        del sys.modules[name]
        raise error(f"{path}: {type(problem).__name__}: {problem}") from problem
    return module
