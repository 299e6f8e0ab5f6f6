"""HugeCTR's log: its two environment variables, its levels and its form of a line, over Python's ``logging``.

Problem: who moves from HugeCTR has ``HUGECTR_LOG_LEVEL`` and ``HUGECTR_LOG_TO_FILE`` in start scripts, and tools that read its
lines; but a library must not configure logging. Choice: a handler of the logger ``hps_numba``, added only if one of them is
set, and nothing else changed; the handlers of the application stay. A value that is not valid is a WARNING, and the default
counts: HugeCTR ignored such values, and a server must not stay down for its log. Turned down: a ConfigError; stdout, where
HugeCTR wrote, as it holds the output of commands.

What counts is read at the first config or command of a process, not at the import: a script may set the variables first.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

__all__ = ["LEVELS", "TRACE", "HugectrHandler", "install", "remove"]

TRACE = 5
"""Level of Python's ``logging``, below DEBUG: single calls of tiers, loads by piece."""

LEVELS = {"ERROR": -1, "SILENCE": 0, "INFO": 1, "WARNING": 2, "DEBUG": 3, "TRACE": 9}
"""HugeCTR's numbers. A message is shown if its number is at most ``HUGECTR_LOG_LEVEL``: at 1, INFO is and WARNING is not."""

_LEVEL, _TO_FILE = "HUGECTR_LOG_LEVEL", "HUGECTR_LOG_TO_FILE"
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")  # as Open MPI and MPICH set them
_LOGGER = logging.getLogger("hps_numba")
_OF_PYTHON = ((logging.ERROR, "ERROR"), (logging.WARNING, "WARNING"), (logging.INFO, "INFO"), (logging.DEBUG, "DEBUG"))
_OPEN_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
_ALWAYS = "hugectr_log_always"  # attribute of records that are shown whatever the level
_installed: dict[str, HugectrHandler] = {}


class HugectrHandler(logging.Handler):
    """Writes ``[HCTR][time][LEVEL][RKrank][thread]: text`` to stderr, to ``hctr_<pid>_<rank>_<level>.log``, or to both.

    A forked child writes to files of its own. Each record is one write, so that lines of threads and processes stay whole. If a
    file cannot be written, one line says so, and stderr gets what follows.

    Args:
        level: HugeCTR's number; see ``LEVELS``.   console: write to stderr.
        folder: of the files, or None for no files.

    Attributes:
        level_before: of the logger, when the handler was added to it.

    Thread safety: every method, as of any ``logging.Handler``.
    """

    level_before = logging.NOTSET

    def __init__(self, level: int, *, console: bool, folder: Path | None) -> None:
        super().__init__(TRACE)
        self._max_number = level
        self._console, self._folder = console, folder
        self._files: dict[str, int] = {}
        self._pid = os.getpid()
        self._rank = _rank()
        self.setFormatter(_Formatter(self._rank))

    @property
    def _needed_level(self) -> int:
        shown = [level for level, name in _OF_PYTHON if LEVELS[name] <= self._max_number]
        return TRACE if self._max_number >= LEVELS["TRACE"] else min(shown, default=logging.ERROR)

    def show_at_least(self, level: int) -> None:
        """Show messages up to this number of HugeCTR, and what is shown already; the logger has to let them through."""
        self._max_number = max(self._max_number, level)
        if _LOGGER.getEffectiveLevel() > self._needed_level:
            _LOGGER.setLevel(self._needed_level)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, if its level is to be shown."""
        name = _level_name(record.levelno)
        if LEVELS[name] > self._max_number and not hasattr(record, _ALWAYS):
            return
        try:
            self._write(name, self.format(record))
        except Exception:  # as every handler of ``logging``: who logs must not fail for it
            self.handleError(record)

    def _write(self, name: str, line: str) -> None:
        if self._folder is not None:
            try:
                _write_all(self._file(name), f"{line}\n".encode(errors="backslashreplace"))
            except OSError as problem:
                place = self._folder / self._file_name(name)
                self._close_files()
                self._folder, self._console = None, True
                self._write_to_console(f"{place}: {problem.strerror or problem}: the log goes to stderr")
        if self._console:
            self._write_to_console(line)

    @staticmethod
    def _write_to_console(line: str) -> None:
        if sys.stderr is not None:  # as in a program without a console
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def _file_name(self, name: str) -> str:
        return f"hctr_{os.getpid()}_{self._rank}_{name.lower()}.log"

    def _file(self, name: str) -> int:
        if self._pid != os.getpid():  # forked: these files are the parent's
            self._close_files()
            self._pid = os.getpid()
        if name not in self._files:
            assert self._folder is not None
            self._files[name] = os.open(self._folder / self._file_name(name), _OPEN_FLAGS, 0o644)
        return self._files[name]

    def _close_files(self) -> None:
        files, self._files = self._files, {}
        for file in files.values():
            os.close(file)

    def close(self) -> None:
        """Close the files; a later record opens them again."""
        self.acquire()
        try:
            self._close_files()
        finally:
            self.release()
        super().close()


class _Formatter(logging.Formatter):
    """HugeCTR's prefix, local time in milliseconds, and the text; a traceback follows on lines of its own."""

    def __init__(self, rank: int) -> None:
        super().__init__("%(message)s")
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        thread = "main" if record.threadName == "MainThread" else record.threadName
        name = _level_name(record.levelno)
        text = super().format(record)
        return f"[HCTR][{clock}.{int(record.msecs):03d}][{name}][RK{self._rank}][{thread}]: {text}"


def install() -> HugectrHandler | None:
    """Log as HugeCTR's variables say, if one of them is set and not empty; later calls change nothing.

    Returns:
        The handler of the logger ``hps_numba``; None: neither is set.
    """
    handler = _installed.get("handler")
    if handler is not None or not (os.environ.get(_LEVEL) or os.environ.get(_TO_FILE)):
        return handler
    problems: list[str] = []
    level = _integer(_LEVEL, LEVELS["WARNING"], LEVELS["ERROR"], LEVELS["TRACE"], _EXPECTED_LEVEL, problems)
    to_file = _integer(_TO_FILE, 0, 0, 2, _EXPECTED_TO_FILE, problems)
    folder = _working_directory(problems) if to_file else None
    new = HugectrHandler(level, console=to_file < 2 or folder is None, folder=folder)
    handler = _installed.setdefault("handler", new)
    if handler is new:  # else another thread was faster
        if logging.getLevelName(TRACE) == f"Level {TRACE}":
            logging.addLevelName(TRACE, "TRACE")
        _LOGGER.addHandler(handler)
        handler.level_before = _LOGGER.level
        handler.show_at_least(level)
        for problem in problems:
            _LOGGER.warning("%s", problem, extra={_ALWAYS: True})
    return handler


def remove() -> None:
    """Undo ``install``; the next call reads the variables again."""
    handler = _installed.pop("handler", None)
    if handler is not None:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(handler.level_before)
        handler.close()


_EXPECTED_LEVEL = "an integer from -1 to 9 (-1 ERROR, 0 SILENCE, 1 INFO, 2 WARNING, 3 DEBUG, 9 TRACE)"
_EXPECTED_TO_FILE = "0 (stderr), 1 (files too) or 2 (files only)"


def _integer(variable: str, default: int, minimum: int, maximum: int, expected: str, problems: list[str]) -> int:
    text = os.environ.get(variable, "")
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        value = minimum - 1
    if minimum <= value <= maximum:
        return value
    shown = repr(text if len(text) <= 60 else f"{text[:60]}...")
    problems.append(f"environment variable {variable}: expected {expected}, got {shown}: {default} is used")
    return default


def _working_directory(problems: list[str]) -> Path | None:
    try:
        return Path.cwd()
    except OSError as problem:
        problems.append(f"environment variable {_TO_FILE}: no working directory: {problem.strerror}: the log goes to stderr")
        return None


def _level_name(level: int) -> str:
    return next((name for least, name in _OF_PYTHON if level >= least), "TRACE")


def _rank() -> int:
    for variable in _RANKS:
        text = os.environ.get(variable, "")
        if text.isascii() and text.isdecimal():
            return int(text)
    return 0


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
