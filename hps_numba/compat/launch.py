"""``python -m hps_numba.compat``: become ``python script.py``, in an environment where HugeCTR's packages are found.

Running the script inside this process (``runpy``) was tried before: ``sys.path``, ``__main__``, ``-m`` and ``-c``, tracebacks,
signals, ``multiprocessing`` and threads that outlive the script each need imitating. A process that replaces itself by the real
thing needs none of that, and costs one more start of the interpreter, 20 to 40 milliseconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from hps_numba.compat.folder import PACKAGES, with_packages
from hps_numba.errors import HpsError

__all__ = ["interpreter_options", "main"]

_USAGE = """usage: python -m hps_numba.compat script.py [arguments]
       python -m hps_numba.compat -m module [arguments]
       python -m hps_numba.compat -c code [arguments]

Runs what `python` would run, with HugeCTR's hierarchical_parameter_server, hps_torch and hugectr.inference served by
hps_numba, in its child processes too. Everything after hps_numba.compat is what follows `python`: options, a script, a folder,
- for stdin."""

_VALUE_FOLLOWS = "WX"  # options of the interpreter that take a value
_WORD_FOLLOWS = "--check-hash-based-pycs"
_PROGRAM_FOLLOWS = "cm"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Replace this process by ``python arguments`` (by default those of this process), with HugeCTR's packages.

    It does not return: a process that is to go on calls ``install`` instead. Options given to this interpreter, such as
    ``-X dev``, are given to the next one too.

    Raises:
        SystemExit: no arguments, or ``-h``; or the interpreter was told to ignore the environment (``-E``, ``-I``).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        raise SystemExit(_USAGE)
    if given[0] in ("-h", "--help"):
        sys.stdout.write(f"{_USAGE}\n")
        raise SystemExit(0)
    try:
        environment = _environment()
    except HpsError as problem:
        raise SystemExit(f"error: {problem}") from None
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *interpreter_options(sys.orig_argv), *given], environment)


def _environment() -> dict[str, str]:
    """
    Raises:
        HpsError: the next interpreter would not find the packages.
    """
    if sys.flags.ignore_environment and str(PACKAGES) not in sys.path:
        raise HpsError("python -E and -I ignore PYTHONPATH, which this sets: leave them out, or run hps-numba compat enable")
    if not sys.executable:
        raise HpsError("sys.executable: expected the path of the interpreter, got none")
    return {**os.environ, "PYTHONPATH": with_packages(os.environ.get("PYTHONPATH", ""))}


def interpreter_options(command: Sequence[str]) -> list[str]:
    """The options of the interpreter in a command line such as ``sys.orig_argv``: what comes before ``-m``, ``-c`` or a script.

    >>> interpreter_options(["python", "-X", "dev", "-um", "hps_numba.compat", "-v"])
    ['-X', 'dev', '-u']
    """
    options: list[str] = []
    words = iter(command[1:])
    for word in words:
        if not word.startswith("-") or word in ("-", "--"):
            break
        if word == _WORD_FOLLOWS:
            options += [word, next(words, "")]
        elif word.startswith("--"):
            options.append(word)
        else:
            kept, has_value, is_last = _read_letters(word)
            options += [*([kept] if kept != "-" else []), *([next(words, "")] if has_value else [])]
            if is_last:
                break
    return options


def _read_letters(word: str) -> tuple[str, bool, bool]:
    """``(the options in a word, whether the next word is the value of the last, whether a program follows)``."""
    for at, letter in enumerate(word[1:], 1):
        if letter in _PROGRAM_FOLLOWS:
            return word[:at], False, True
        if letter in _VALUE_FOLLOWS:
            return word, at == len(word) - 1, False
    return word, False, False
