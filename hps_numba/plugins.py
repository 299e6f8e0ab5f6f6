"""The folder is the registry: a storage tier, a file format or a cache policy is found by its file name.

Every file without a leading underscore in such a folder defines ``PLUGIN``: the class (or object) that the file is about.
A new part is one new file; nothing else is edited. A user's own part is named ``package.module:NAME`` or, where the caller
allows code to run, ``path/to/file.py:NAME``.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hps_numba.errors import ConfigError, HpsError

__all__ = ["is_reference", "load", "load_reference", "names"]


def names(package: str) -> list[str]:
    """Names of all parts in ``package``, e.g. ``names("hps_numba.storage.formats")``, sorted."""
    folder = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(folder) if not m.name.startswith("_"))


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
    """The part called ``name``: a file of ``package``, or a reference to one of the user's own.

    Args:
        allow_code: ``name`` may be a file of the user's (``load_reference``).
        folder: where a relative file is looked up after the working directory.

    Raises:
        error: no such part (the message lists the known ones), or it cannot be imported.
    """
    if is_reference(name):
        return load_reference(name, allow_code=allow_code, folder=folder, error=error)
    known = names(package)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise error(f"{package.rpartition('.')[2]}: {name!r} is unknown, known are {', '.join(known)}{hint}")
    return importlib.import_module(f"{package}.{name}").PLUGIN


def load_reference(
    reference: str, *, allow_code: bool = False, folder: Path | None = None, error: type[HpsError] = ConfigError
) -> Any:
    """Load ``package.module:NAME`` or ``file.py:NAME``, the file from the working directory or else from ``folder``.

    A file is run only with ``allow_code``: a config file that came from elsewhere must not run code by itself.

    Raises:
        error: the file or module is missing or fails, it has no such name, or ``allow_code`` is off for a file.
    """
    where, _, attribute = reference.rpartition(":")
    if where.endswith(".py"):
        if not allow_code:
            raise error(f"{reference!r} runs code from a file: pass allow_code=True if you trust it")
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
    name = f"hps_numba_part_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise error(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        # not by the loader: it takes compiled code that is kept beside the file for that of a file edited in the same second
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
    except Exception as problem:
        del sys.modules[name]
        raise error(f"{path}: {type(problem).__name__}: {problem}") from problem
    return module
