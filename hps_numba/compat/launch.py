"""``python -m hps_numba.compat``: become ``python script.py``, in an environment where HugeCTR's packages are found.

Running the script inside this process (``runpy``) was tried before: ``sys.path``, ``__main__``, ``-m`` and ``-c``, tracebacks,
signals, ``multiprocessing`` and threads that outlive the script each need imitating. A process that replaces itself by the real
thing needs none of that, and costs one more start of the interpreter, 20 to 40 milliseconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from hps_numba.compat.folder import PACKAGES, with_packages
from hps_numba.errors import HpsError

__all__ = ["main", "read_command"]

_USAGE = """usage: python -m hps_numba.compat script.py [arguments]
       python -m hps_numba.compat -m module [arguments]
       python -m hps_numba.compat -c code [arguments]

Runs what `python` would run, with HugeCTR's hierarchical_parameter_server, hps_torch and hugectr.inference served by
hps_numba, in its child processes too. Everything after hps_numba.compat is what follows `python`: options, a script, a folder,
- for stdin."""

_MODULES = ("hps_numba.compat", "hps_numba.compat.__main__")
_VALUE_FOLLOWS = "WX"  # options of the interpreter that take a value
_WORD_FOLLOWS = "--check-hash-based-pycs"
_PROGRAM_FOLLOWS = "cm"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python arguments`` (by default those of this process) with HugeCTR's packages.

    A process that was started as ``python -m hps_numba.compat`` is replaced. In any other, such as a notebook, it runs as a
    child process that is waited for. Options given to this interpreter, such as ``-X dev``, are given to the other one too.

    Raises:
        SystemExit: no arguments, or ``-h``; the interpreter was told to ignore the environment (``-E``, ``-I``); the child
            process failed: with its exit code, or 128 and the number of the signal that ended it.
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
    options, module = read_command(sys.orig_argv)
    command = [sys.executable, *options, *given]
    sys.stdout.flush()
    sys.stderr.flush()
    if module in _MODULES:
        os.execve(sys.executable, command, environment)
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


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


def read_command(command: Sequence[str]) -> tuple[list[str], str]:
    """``(options of the interpreter, name of the module that it runs)`` in a command line such as ``sys.orig_argv``.

    The name is empty if the command runs no module by ``-m``.

    >>> read_command(["python", "-X", "dev", "-um", "hps_numba.compat", "-v"])
    (['-X', 'dev', '-u'], 'hps_numba.compat')
    """
    options: list[str] = []
    words = iter(command[1:])
    for word in words:
        if not word.startswith("-") or word in ("-", "--"):
            break
        if word.startswith("--"):
            options += [word, *([next(words, "")] if word == _WORD_FOLLOWS else [])]
            continue
        at = _place_of_value(word)
        letter, value = word[at : at + 1], word[at + 1 :]
        if letter in _PROGRAM_FOLLOWS and letter:
            options += [word[:at]] if at > 1 else []
            return options, (value or next(words, "")) if letter == "m" else ""
        options += [word, *([next(words, "")] if letter and not value else [])]
    return options, ""


def _place_of_value(word: str) -> int:
    """Where in a word of one-letter options the one stands that takes the rest, or the next word, as its value."""
    return next((at for at, letter in enumerate(word[1:], 1) if letter in _VALUE_FOLLOWS + _PROGRAM_FOLLOWS), len(word))
