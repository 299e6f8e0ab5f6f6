"""Odd values for every option of every command: taken, or one readable line and exit code 1 or 2; no traceback, no hang."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from support.disk_tier import write_table
from support.factories import Workshop
from support.inference_server import inference_server
from support.servers import free_port
from support.waiting import HANG_SECONDS
from typer.testing import CliRunner, Result

import hps_numba
from hps_numba.cli import build
from hps_numba.compat import environment

ODD = (
    "", " ", "x", "-", "--", "-1", "0", "1.5", "1e400", "nan", "inf", "-inf", "99999999999999999999", "9" * 5000, "½", "0x10",
    ",", ":", "a:b", "no_such.py:X", "no_such.module:X", "%", "1%:0%:0", "a\0b", "a\nb", "\udcff", "x" * 300, "~nobody/x",
    ".", "/", "/dev/zero", "/dev/full", "fifo", "text", "missing/file.png", "folder.png", "fifo.png", "folder.json",
)  # fmt: skip


def commands(command: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if hasattr(command, "commands"):
        for name, one in command.commands.items():
            yield from commands(one, (*prefix, name))
    else:
        yield prefix, command


APP = build()
TREE = typer.main.get_command(APP)
COMMANDS = {" ".join(prefix): command for prefix, command in commands(TREE)}
BENCHMARK = ["--rows", "8", "--dim", "2", "--batch-size", "4", "--seconds", "0.01", "--allow-code"]
PORT = free_port()
LOAD = ["--rate", "100", "--duration", "0.02", "--warmup", "0", "--distinct", "2", "--timeout", "0.5", "--connections", "2"]
GOOD: dict[str, list[str]] = {
    "benchmark serve": [f"http://127.0.0.1:{PORT}", *LOAD],
    "benchmark tiers": ["tiers.json", *BENCHMARK],
    "convert": ["good.model", "new.h5", "--overwrite"],
    "demo": ["--rows", "100", "--dim", "2", "--seconds", "0.1", "--threads", "1"],
    "doctor": [],
    "dump": ["tiers.json", "--tier", "1", "--table", "m/t", "--out", "out.bin", "--overwrite", "--allow-code"],
    "inspect": ["good.model"],
    "load": ["good.model", "--into", "tiers.json", "--allow-code"],
    "plan": ["ps.json"],
    "profile": ["--rows", "100", "--dim", "2", "--num_key", "8", "--iterations", "1", "--warmup_iterations", "0"],
    "publish": ["good.model", "--to", "files://bus", "--table", "hps_et.m.t", "--set", "sync=false"],
    "serve": ["ps.json", "--port", "0", "--seconds", "0.01", "--drain-seconds", "0"],
    "simulate": ["trace.npy", "--policy", "lru", "--size", "8"],
    "tiers": ["tiers.json", "--samples", "2", "--keys", "2", "--allow-code"],
    "top": ["updates.json", "--once", "--interval", "0.1", "--allow-code"],
    "triton-repository": ["ps.json", "repository", "--overwrite"],
    "updates": ["updates.json", "--once", "--interval", "0.1", "--allow-code"],
    "verify": ["tiers.json", "--allow-code"],
    "compat disable": [],
    "compat enable": [],
    "compat status": [],
    "config schema": [],
    "config check": ["ps.json"],
    "generate model": ["made.model", "--rows", "5", "--dim", "2", "--overwrite"],
    "generate requests": [
        "--output-path",
        "requests.json",
        "--dense-dim",
        "1",
        "--sparse-dims",
        "2",
        "--num-unique-keys",
        "9",
        "--num-batch",
        "2",
        "--batch-size",
        "2",
        "--overwrite",
    ],
    "generate keys": ["keys.npy", "--count", "5", "--table-size", "9", "--overwrite"],
}
NEEDED = {"--histogram": ["--distribution", "histogram"], "--weights": ["--distribution", "histogram"]}
ALONE = {"--type": BENCHMARK, "--option": ["--type", "hash_map", *BENCHMARK]}  # not together with the argument
ANY_TEXT = {"--folder", "--dense_name", "--sparse_name", "--rowoffset_name"}  # most texts can be the name of something
OPTIONS = [
    (name, parameter.opts[-1])
    for name, command in COMMANDS.items()
    for parameter in command.params
    if parameter.param_type_name == "option" and not parameter.is_flag
]
ARGUMENTS = [
    (name, number)
    for name, command in COMMANDS.items()
    for number, parameter in enumerate(one for one in command.params if one.param_type_name == "argument")
]


def run(*words: str) -> Result:
    return CliRunner().invoke(APP, list(words))


@pytest.fixture(autouse=True)
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server, for the command that measures one."""
    if request.node.callspec.params["name"] != "benchmark serve":
        yield
        return
    monkeypatch.setattr(gc, "collect", lambda: 0)  # before each measurement, which takes long in a process of many tests
    with inference_server(port=PORT):
        yield


@pytest.fixture
def folder(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr("typer.testing._get_command", lambda app: TREE)  # building it takes longer than most calls
    place = workshop.folder
    monkeypatch.chdir(place)
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(environment, "site_folder", lambda *, user=False: place)
    hps_numba.write_model("good.model", 2, [(np.arange(3), np.zeros((3, 2), np.float32))])
    np.save("trace.npy", np.arange(100) % 9)
    (place / "ps.json").write_text(
        '{"supportlonglong": true, "models": [{"model": "m", "sparse_files": ["good.model"], "max_batch_size": 4,'
        ' "embedding_vecsize_per_table": [2], "maxnum_catfeature_query_per_table_per_sample": [2],'
        ' "default_value_for_each_table": [0.0], "deployed_device_list": []}]}'
    )
    config = json.loads((place / "ps.json").read_text())
    config["models"][0]["embedding_table_names"] = ["t"]
    tier = {"type": "support.disk_tier:DiskTier", "file": "tier"}
    (place / "tiers.json").write_text(json.dumps({**config, "tiers": [{"type": "hash_map"}, tier]}))
    (place / "updates.json").write_text(json.dumps({**config, "update_source": {"type": "in_process"}}))
    write_table(place / "tier", "hps_et.m.t", range(3), np.zeros((3, 2), np.float32))
    for name in ("fifo", "fifo.png"):
        os.mkfifo(name)
    (place / "text").write_text("text")
    for name in ("folder.png", "folder.json"):
        (place / name).mkdir()
    signal.alarm(int(HANG_SECONDS))  # ends the process: a hang here is in no code that listens
    yield place
    signal.alarm(0)


def check(result: Result, what: str) -> None:
    assert result.exception is None or isinstance(result.exception, SystemExit), what
    assert result.exit_code in (0, 1, 2), what
    assert "(a bug" not in result.stderr and "Traceback" not in result.output, f"{what}: {result.stderr}"
    if result.exit_code:
        line = result.stderr.splitlines()[-1]
        assert line.startswith("error: ") and 15 < len(line) < 1500, f"{what}: {result.stderr[-2000:]}"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_good_options_are_good(folder: Path, name: str) -> None:
    patient = ["--timeout", str(HANG_SECONDS)] if name == "benchmark serve" else []
    result = run(*name.split(), *GOOD[name], *patient)
    assert result.exit_code == (0 if name != "doctor" else result.exit_code), result.output


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=[" ".join(pair) for pair in OPTIONS])
def test_odd_options(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, option: str) -> None:
    good = ALONE.get(option, GOOD[name])
    if option in good:
        at = good.index(option)
        good = [*good[:at], *good[at + 2 :]]
    good = [*good, *NEEDED.get(option, [])]
    if option == "--html":  # names of files are tried here; the page itself has tests of its own
        monkeypatch.setattr("hps_numba.simulate.html_report.to_svg", lambda figure: "<svg/>")
        figures = dict.fromkeys(("curves", "time", "heat"))
        monkeypatch.setattr("hps_numba.simulate.html_report.figures", lambda simulation, rows: figures)
    refused = 0
    for value in ODD:
        result = run(*name.split(), *good, f"{option}={value}")
        check(result, f"{name} {option}={value[:60]!r}")
        refused += result.exit_code != 0
    assert refused > (4 if option in ANY_TEXT else 8)
    unharmed(folder)


@pytest.mark.parametrize(("name", "number"), ARGUMENTS, ids=[f"{name} {number}" for name, number in ARGUMENTS])
def test_odd_arguments(folder: Path, name: str, number: int) -> None:
    for value in ODD:
        words = list(GOOD[name])
        words[number] = value
        check(run(*name.split(), *words), f"{name} {words}")
    unharmed(folder)


def unharmed(folder: Path) -> None:
    assert (folder / "fifo").is_fifo() and (folder / "fifo.png").is_fifo() and (folder / "text").read_text() == "text"
    assert (folder / "folder.png").is_dir() and (folder / "folder.json").is_dir() and not list(folder.glob(".*partial"))
    assert Path("/dev/full").is_char_device() and Path("/dev/zero").is_char_device()
