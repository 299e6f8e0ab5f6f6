"""Plugins: a storage tier, a file format, a cache policy or an update source is found by name.

A built-in plugin is a file of a folder: every file without a leading underscore defines ``PLUGIN``, the class or object that
the file is about, and goes by the name of the file; a new one is one new file. An installed package adds its own through an
entry point (groups ``hps_numba.policies``, ``hps_numba.tiers``, ``hps_numba.sources``, ``hps_numba.formats``). A user's own is
named ``package.module:NAME`` or ``path/to/file.py:NAME``: such a reference runs code that a config may have brought along, so
it is loaded only where the caller allows it. A config that arrives inside a model file imports nothing at all
(:func:`why_not_importable`).

Whatever a plugin raises while it is imported becomes a typed error, ``SystemExit`` included: only the user's own Ctrl-C goes
through.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hps_numba.errors import ConfigError, HpsError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "entry_points",
    "is_built_in",
    "is_reference",
    "load",
    "load_reference",
    "names",
    "typed_errors",
    "why_not_importable",
]

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


def why_not_importable(package: str, name: str) -> str:
    """Why a config that came with a model may not name this plugin; empty if it may: it is built in, or imported already."""
    if is_reference(name):
        return f"{name!r} names code, and a config inside a model never imports anything"
    point = None if name in _built_in(package) else entry_points(package).get(name)
    if point is None or point.module in sys.modules:
        return ""
    return f"{name!r} is an installed plugin that is not imported yet, and a config inside a model never imports anything"


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
    if not isinstance(name, str):
        raise error(f"{package.rpartition('.')[2]}: expected a name, got a value of type {type(name).__name__}")
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
    with typed_errors(f"{point.name!r}: cannot load the entry point {point.value!r}", error):
        return point.load()


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
        module = _module_of_file(_file_of(where, folder, error), error)
    else:
        _check_not_shadowed(where.partition(".")[0], reference, error)
        with typed_errors(f"{reference!r}: cannot import {where!r}", error):
            module = importlib.import_module(where)
    try:
        with typed_errors(f"{reference!r}: cannot read {attribute!r}", error, AttributeError):
            return getattr(module, attribute)
    except AttributeError:
        raise error(f"{reference!r}: {where!r} has no {attribute!r}") from None


def _check_not_shadowed(name: str, reference: str, error: type[HpsError]) -> None:
    """Refuse a package that only the working directory (a relative entry of ``sys.path``) puts before an installed one."""
    relative = [entry for entry in sys.path if not Path(entry).is_absolute()]
    if name in sys.modules or not relative or not name.isidentifier():
        return
    here = _places(PathFinder.find_spec(name, relative))
    installed = _places(PathFinder.find_spec(name, [entry for entry in sys.path if Path(entry).is_absolute()]))
    if installed and here & _places(PathFinder.find_spec(name)) - installed:
        found = ", ".join(sorted(here - installed))
        raise error(f"{reference!r}: expected the installed {name!r}, got {found}, which hides it: rename it")


def _places(spec: ModuleSpec | None) -> set[str]:
    """Where a module's code is: its file, or the folders of a package without one."""
    if spec is None:
        return set()
    files = [spec.origin] if spec.has_location and spec.origin else list(spec.submodule_search_locations or ())
    return {os.path.realpath(file) for file in files}


@contextmanager
def typed_errors(place: str, error: type[HpsError], *passed: type[BaseException]) -> Iterator[None]:
    """Turn whatever the block raises into ``error``, but for ``passed`` and for an interrupt by the user.

    A Ctrl-C and a module that raises KeyboardInterrupt itself differ in that only the first runs the handler of SIGINT, which
    Python calls in the main thread.
    """
    interrupted = False
    before = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None

    def handler(number: int, frame: Any) -> Any:
        nonlocal interrupted
        interrupted = True
        return before(number, frame) if callable(before) else None

    if callable(before):
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    except passed:
        raise
    except BaseException as problem:
        if interrupted and isinstance(problem, KeyboardInterrupt):
            raise
        raise error(f"{place}: {_described(problem)}") from problem
    finally:
        if callable(before) and signal.getsignal(signal.SIGINT) is handler:  # the module may have set one of its own
            signal.signal(signal.SIGINT, before)


def _described(problem: BaseException) -> str:
    """Type and message of an error, on one line; its ``__str__`` may be the plugin's and fail."""
    try:
        text = " ".join(str(problem).split())[:500]
    except Exception:
        text = "an error without a message"
    if text and isinstance(problem, ImportError):
        return text
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__


def _file_of(where: str, folder: Path | None, error: type[HpsError]) -> Path:
    try:
        file = Path(where).expanduser()
        file = (folder / file if folder is not None and not file.is_file() else file).resolve()
        found = file.is_file()
    except (OSError, ValueError, RuntimeError) as problem:  # a zero byte, a loop of links, ~ of an unknown user
        raise error(f"{where!r}: expected a Python file, got {_described(problem)}") from problem
    if not found:
        raise error(f"{file}: no such file")
    return file


def _module_of_file(path: Path, error: type[HpsError]) -> ModuleType:
    name = f"hps_numba_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise error(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with typed_errors(str(path), error):
            # not by the loader: the bytecode that it caches beside the file does not notice an edit within the same second
            exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module
