"""HugeCTR's log variables: which messages they show, in which form and where (checklist O07)."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.configs import MINIMAL
from support.processes import environment
from support.waiting import HANG_SECONDS

from hps_numba import read_config
from hps_numba.runtime import hugectr_log
from hps_numba.runtime.hugectr_log import LEVELS, TRACE

VARIABLES = ("HUGECTR_LOG_LEVEL", "HUGECTR_LOG_TO_FILE", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
LOGGER = logging.getLogger("hps_numba")
LINE = re.compile(r"\[HCTR\]\[(\d\d:\d\d:\d\d\.\d{3})\]\[([A-Z]+)\]\[RK(\d+)\]\[([^]]+)\]: (.*)")
OF_PYTHON = {
    "ERROR": logging.ERROR,
    "INFO": logging.INFO,
    "WARNING": logging.WARNING,
    "DEBUG": logging.DEBUG,
    "TRACE": TRACE,
}


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A working directory of its own; nothing is installed before and after."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    assert hugectr_log.install() is None
    level = LOGGER.level
    yield tmp_path
    hugectr_log.remove()
    assert LOGGER.level == level and not LOGGER.handlers


def say_all() -> None:
    logger = logging.getLogger("hps_numba.server.model")
    for name, level in OF_PYTHON.items():
        logger.log(level, "of level %s", name)


def levels_in(text: str) -> list[str]:
    found = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(found), text
    return [one[2] for one in found if one]


@pytest.mark.parametrize("number", [None, *sorted({*LEVELS.values(), 5})])
def test_o07_what_is_shown_is_decided_by_hugectrs_numbers(
    number: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if number is None:
        monkeypatch.setenv("HUGECTR_LOG_TO_FILE", "0")  # a variable that is set; the level is HugeCTR's default, WARNING
    else:
        monkeypatch.setenv("HUGECTR_LOG_LEVEL", str(number))
    assert hugectr_log.install() is not None
    say_all()
    most = LEVELS["WARNING"] if number is None else number
    out, err = capsys.readouterr()
    assert levels_in(err) == [name for name in OF_PYTHON if LEVELS[name] <= most]
    assert out == ""


def test_o07_the_form_of_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HUGECTR_LOG_LEVEL", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    hugectr_log.install()
    LOGGER.info("%s: %d rows", "hps_et.m.t", 7)
    try:
        raise ValueError("a reason")
    except ValueError:
        LOGGER.exception("failed")
    first, second, *traceback = capsys.readouterr().err.splitlines()
    found = LINE.fullmatch(first)
    assert found and found.groups()[1:] == ("INFO", "3", "main", "hps_et.m.t: 7 rows")
    assert second.endswith("[ERROR][RK3][main]: failed")
    assert traceback[0].startswith("Traceback") and traceback[-1] == "ValueError: a reason"


def test_o07_threads_have_their_names(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import threading

    monkeypatch.setenv("HUGECTR_LOG_LEVEL", "2")
    hugectr_log.install()
    thread = threading.Thread(target=LOGGER.warning, args=("here",), name="hps_numba_refresh")
    thread.start()
    thread.join(HANG_SECONDS)
    assert capsys.readouterr().err.endswith("[WARNING][RK0][hps_numba_refresh]: here\n")


@pytest.mark.parametrize(("value", "on_console"), [("1", True), ("2", False)])
def test_o07_files_bear_process_rank_and_level(
    value: str, on_console: bool, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HUGECTR_LOG_TO_FILE", value)
    monkeypatch.setenv("HUGECTR_LOG_LEVEL", "3")
    monkeypatch.setenv("PMI_RANK", "12")
    hugectr_log.install()
    os.chdir("/")  # a server may, later; the files stay where it was started
    say_all()
    expected = {f"hctr_{os.getpid()}_12_{name}.log" for name in ("error", "info", "warning", "debug")}
    assert {path.name for path in place.iterdir()} == expected
    for path in place.iterdir():
        assert [f"_{level.lower()}.log" for level in levels_in(path.read_text())] == [f"_{path.stem.rsplit('_', 1)[1]}.log"]
    assert levels_in(capsys.readouterr().err) == (["ERROR", "INFO", "WARNING", "DEBUG"] if on_console else [])


def test_o07_a_forked_child_has_files_of_its_own(place: Path) -> None:
    program = """
import logging, os
from hps_numba import read_config
from hps_numba.runtime import hugectr_log
handler = hugectr_log.install()
log = logging.getLogger("hps_numba.x")
log.warning("before")
child = os.fork()
if not child:
    log.warning("in the child")
    assert hugectr_log.install() is handler and len(logging.getLogger("hps_numba").handlers) == 1
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
log.warning("after")
print(os.getpid(), child)
"""
    variables = environment(HUGECTR_LOG_TO_FILE="2")
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=place,
        env=variables,
        timeout=HANG_SECONDS,
        check=True,
    )
    parent, child = done.stdout.split()
    assert done.stderr == ""
    texts = {path.name: [line.partition("]: ")[2] for line in path.read_text().splitlines()] for path in place.iterdir()}
    assert texts == {f"hctr_{parent}_0_warning.log": ["before", "after"], f"hctr_{child}_0_warning.log": ["in the child"]}


def test_o07_a_server_configures_logging_once_and_only_if_a_variable_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    read_config(MINIMAL)
    assert not LOGGER.handlers and LOGGER.level == logging.NOTSET
    monkeypatch.setenv("HUGECTR_LOG_LEVEL", "")
    read_config(MINIMAL)
    assert not LOGGER.handlers
    monkeypatch.setenv("HUGECTR_LOG_LEVEL", "1")
    read_config(MINIMAL)
    read_config(MINIMAL)
    assert len(LOGGER.handlers) == 1 and LOGGER.propagate


def test_o07_a_level_that_the_application_has_set_is_not_raised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    LOGGER.setLevel(logging.DEBUG)
    try:
        monkeypatch.setenv("HUGECTR_LOG_LEVEL", "-1")
        hugectr_log.install()
        assert LOGGER.level == logging.DEBUG
        say_all()
        assert levels_in(capsys.readouterr().err) == ["ERROR"]
        hugectr_log.remove()
    finally:
        LOGGER.setLevel(logging.NOTSET)


@pytest.mark.parametrize("value", ["loud", "-2", "10", "2.0", "x" * 100])
def test_o07_a_wrong_level_is_one_warning_and_the_default_counts(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HUGECTR_LOG_LEVEL", value)
    read_config(MINIMAL)
    warnings = [record for record in caplog.records if "HUGECTR" in record.getMessage()]
    assert [record.levelno for record in warnings] == [logging.WARNING]
    text = warnings[0].getMessage()
    assert text.startswith("environment variable HUGECTR_LOG_LEVEL: expected an integer from -1 to 9 (-1 ERROR, 0 SILENCE")
    assert text.endswith(f"got {value!r}: 2 is used" if len(value) < 60 else f"got {value[:60] + '...'!r}: 2 is used")
    assert text in capsys.readouterr().err


def test_o07_a_wrong_choice_of_files_is_said_at_any_level(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HUGECTR_LOG_LEVEL", "0")
    monkeypatch.setenv("HUGECTR_LOG_TO_FILE", "yes")
    read_config(MINIMAL)
    LOGGER.warning("not shown")
    (line,) = capsys.readouterr().err.splitlines()
    assert "HUGECTR_LOG_TO_FILE: expected 0 (stderr), 1 (files too) or 2 (files only), got 'yes': 0 is used" in line
    assert not list(place.iterdir())


def test_o07_where_no_file_can_be_written_stderr_gets_the_log(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = place / f"hctr_{os.getpid()}_0_warning.log"
    file.mkdir()
    monkeypatch.setenv("HUGECTR_LOG_TO_FILE", "2")
    read_config(MINIMAL)
    LOGGER.warning("kept")
    LOGGER.error("kept too")
    problem, *lines = capsys.readouterr().err.splitlines()
    assert problem == f"{file}: Is a directory: the log goes to stderr"
    assert [line.partition("]: ")[2] for line in lines if "kept" in line] == ["kept", "kept too"]


def test_o07_a_link_in_the_place_of_a_file_is_not_followed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = place / "precious"
    other.write_text("as it was")
    (place / f"hctr_{os.getpid()}_0_warning.log").symlink_to(other)
    monkeypatch.setenv("HUGECTR_LOG_TO_FILE", "2")
    hugectr_log.install()
    LOGGER.warning("kept")
    assert other.read_text() == "as it was"
    assert "kept" in capsys.readouterr().err


def test_o07_a_full_disk_fails_no_caller(place: Path) -> None:
    program = """
import logging, resource
from hps_numba.runtime import hugectr_log
hugectr_log.install()
log = logging.getLogger("hps_numba.x")
log.warning("in the file")
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
log.warning("kept")
log.warning("kept too")
"""
    variables = environment(HUGECTR_LOG_TO_FILE="2")
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=place,
        env=variables,
        timeout=HANG_SECONDS,
        check=True,
    )
    problem, *lines = done.stderr.splitlines()
    assert problem.endswith("_0_warning.log: File too large: the log goes to stderr")
    assert [line.partition("]: ")[2] for line in lines] == ["kept", "kept too"]


def test_o07_a_command_goes_by_the_variables_and_verbose_adds_info(place: Path) -> None:
    config = place / "ps.json"
    config.write_text(json.dumps({**MINIMAL, "unknown_key": 1}))

    def started(*options: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "hps_numba", *options, "config", "check", str(config)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=place, env=environment(**variables), **pipes)

    def lines(command: subprocess.Popen[str]) -> list[str]:
        _, err = command.communicate(timeout=HANG_SECONDS)
        return levels_in("\n".join(line for line in err.splitlines() if line.startswith("[HCTR]")))

    plain = started()
    of_level, verbose = started(HUGECTR_LOG_LEVEL="2", HUGECTR_LOG_TO_FILE="1"), started("--verbose", HUGECTR_LOG_LEVEL="0")
    assert lines(plain) == []
    assert lines(of_level).count("WARNING") == 1
    assert {"INFO", "WARNING"} <= set(lines(verbose))
    assert f"hctr_{of_level.pid}_0_warning.log" in [path.name for path in place.glob("hctr_*")]
