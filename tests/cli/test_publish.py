"""``hps-numba publish`` and ``hps-numba updates``: what is published is what a server then serves, and what it shows."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.oracles import assert_same_bits, rows_of
from support.redis_servers import one_server
from support.updates import wait_for
from support.waiting import join_all, wait_until
from typer.testing import CliRunner, Result

import hps_numba
from hps_numba.cli import _publish_difference, build
from hps_numba.cli.updates import _lines, _notes
from hps_numba.server.update_stats import SourceStats, TableUpdates
from hps_numba.updates import open_producer
from hps_numba.updates._files.manifest import read_manifest
from hps_numba.updates._redis_streams.entries import offset_of

DIM, TAG = 3, "hps_et.m.a"


def run(*words: object) -> Result:
    return CliRunner().invoke(build(), list(map(str, words)))


def parsed(*words: object) -> Any:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*words: object, code: int = 2) -> str:
    result = run(*words)
    assert result.exit_code == code and result.stdout == "", result.output
    return result.stderr.splitlines()[-1]


def model(path: Path, keys: Sequence[int], stamps: Sequence[int] | int = 0) -> Path:
    """A sparse model; the rows of a key differ by its stamp."""
    stamps = [stamps] * len(keys) if isinstance(stamps, int) else stamps
    rows = np.concatenate([rows_of([key], DIM, stamp) for key, stamp in zip(keys, stamps)])
    hps_numba.write_model(path, DIM, [(np.array(keys, np.int64), rows)])
    return path


@pytest.fixture
def served(workshop: Workshop) -> Path:
    """A config with a table that reads a folder."""
    folder = workshop.folder
    entry = {
        "model": "m",
        "sparse_files": [str(model(folder / "old.model", [1, 2, 3, 4]))],
        "embedding_table_names": ["a"],
        "embedding_vecsize_per_table": [DIM],
        "maxnum_catfeature_query_per_table_per_sample": [1],
        "default_value_for_each_table": [-7.5],
        "deployed_device_list": [],
    }
    source = {"type": "files", "folder": str(folder / "bus"), "poll_interval_ms": 1, "poll_timeout_ms": 20}
    config = {"supportlonglong": True, "models": [entry], "update_source": source}
    (folder / "ps.json").write_text(json.dumps(config))
    return folder / "ps.json"


def content_after(config: Path, count: int) -> dict[int, bytes]:
    """Rows of the table once a server has applied everything in the folder."""
    manifest = read_manifest(config.parent / "bus")
    assert manifest is not None and manifest.next_offset >= count
    with hps_numba.HPS(config) as server:
        wait_for(server, manifest.next_offset - 1, partition=manifest.stream)
        with server.locked_table("m", 0) as (keys, rows_at):
            return {int(key): row.tobytes() for key, row in zip(keys, rows_at(keys))}


def test_a_whole_model_to_the_bus_of_a_config(served: Path, workshop: Workshop) -> None:
    new = model(workshop.folder / "new.model", [3, 50, 3], [1, 1, 2])
    report = parsed("publish", new, "--to", served, "--table", "m/a", "--version", 7)
    assert (report["table"], report["rows"], report["erased"]) == (TAG, 3, 0)
    expected = {1: 0, 2: 0, 3: 2, 4: 0, 50: 1}
    assert content_after(served, 1) == {key: rows_of([key], DIM, stamp).tobytes() for key, stamp in expected.items()}


@pytest.mark.parametrize("at_once", [1 << 30, 100])
def test_what_changed_since_an_older_model(
    served: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(_publish_difference.differences, "__kwdefaults__", {"bytes_at_once": at_once})
    old = model(workshop.folder / "a.model", [1, 2, 3, -9, 2, *range(100, 140)], [0, 9, 0, 0, 0, *[0] * 40])
    new = model(workshop.folder / "b.model", [2, 5, 3, 5, 1, 1, *range(100, 139)], [0, 8, 1, 5, 3, 0, *[0] * 39])
    report = parsed("publish", new, "--to", served, "--table", TAG, "--since", old)
    assert (report["rows"], report["erased"], report["unchanged"]) == (2, 2, 41), "3 and 5 are sent; -9 and 139 are gone"
    expected = {1: 0, 2: 0, 3: 1, 4: 0, 5: 5}
    assert content_after(served, 2) == {key: rows_of([key], DIM, stamp).tobytes() for key, stamp in expected.items()}
    result = run("publish", new, "--to", served, "--table", TAG, "--since", new)
    assert "0 rows and 0 deletions published, 45 rows unchanged" not in result.stdout, "5 and 1 are there twice"
    assert "0 rows and 0 deletions published, 43 rows unchanged" in result.stdout


def test_the_table_is_that_whose_file_the_model_is(served: Path, workshop: Workshop) -> None:
    report = parsed("publish", workshop.folder / "old.model", "--to", served)
    assert (report["table"], report["rows"]) == (TAG, 4)
    other = model(workshop.folder / "other.model", [1])
    assert "other.model is the sparse file of 0 tables" in refused("publish", other, "--to", served)


def test_urls_name_a_bus(workshop: Workshop) -> None:
    some = model(workshop.folder / "some.model", [1, 2])
    folder = workshop.folder / "own"
    url = f"files://{folder}?max_files=3&sync=false"
    assert parsed("publish", some, "--to", url, "--table", TAG)["to"] == f"files://{folder}"
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.next_offset == 2
    with one_server(workshop.folder / "redis") as redis:
        redis.client.execute_command("ACL", "SETUSER", "me", "on", ">pass@word", "allkeys", "allcommands")
        url = f"redis://me:pass%40word@{redis.address}/bus"
        report = parsed("publish", some, "--to", url, "--table", TAG, "--set", "max_messages=5")
        assert report["to"] == f"redis://{redis.address}/bus"
        server = workshop.open(
            workshop.model((range(9), DIM), embedding_table_names=["a"]),
            update_source={"type": "redis_streams", "address": redis.address, "stream": "bus", "poll_timeout_ms": 20},
        )
        newest = redis.client.xinfo_stream("bus")["last-generated-id"]
        wait_for(server, offset_of(newest), partition="bus")
        assert_same_bits(server.lookup([1, 2], "m", "a"), rows_of([1, 2], DIM))
        server.close()
    error = refused("publish", some, "--to", url, "--table", TAG, code=1)
    assert "redis_streams: address: expected a node that answers" in error and "pass" not in error


def test_what_is_not_right_is_one_line(served: Path, workshop: Workshop) -> None:
    some = model(workshop.folder / "some.model", [1])
    wide = workshop.folder / "wide.model"
    hps_numba.write_model(wide, DIM + 1, [(np.array([1]), np.zeros((1, DIM + 1), np.float32))])
    to = ("--to", served, "--table", TAG)
    for words, text, code in (
        (("--to", "http://x/y", "--table", TAG), "expected a config, files://FOLDER, redis://HOST", 2),
        (("--to", "files://", "--table", TAG), "expected a config, files://FOLDER", 2),
        (("--to", f"files://{workshop.folder}/x"), "expected hps_et.MODEL.TABLE with a URL, got None", 2),
        (("--to", f"files://{workshop.folder}/x", "--table", TAG, "--source", "files"), "is an option for a config only", 2),
        (("--to", f"files://{workshop.folder}/x?maxfiles=1", "--table", TAG), "maxfiles: unknown key", 1),
        ((*to, "--source", "kafka"), "expected one of update_source (files), got 'kafka'", 2),
        ((*to, "--set", "max_files"), "expected KEY=VALUE, got 'max_files'", 2),
        ((*to, "--set", "max_files=-1"), "max_files: expected at least 0, got -1", 1),
        ((*to, "--since", wide), "expected 4 * 3 * 1 = 12 bytes for 1 keys of width 3, got 16", 1),
        ((*to, "--dim", 4), "expected 3, the width of hps_et.m.a in the config, got 4", 2),
    ):
        assert text in refused("publish", some, *words, code=code)
    config = json.loads(served.read_text())
    served.write_text(json.dumps({**config, "update_source": {}}))
    assert "expected a config with an update_source, got none" in refused("publish", some, "--to", served, code=1)
    assert "expected a config with an update_source, got none" in refused("updates", served, code=1)
    served.write_text(json.dumps({**config, "update_source": {"type": "support.updates:ListSource", "name": "x"}}))
    error = refused("publish", some, *to, "--allow-code", code=1)
    assert "type: expected a bus with a producer, got 'support.updates:ListSource'" in error


def test_updates_shows_each_source_and_table(served: Path, workshop: Workshop) -> None:
    some = model(workshop.folder / "some.model", [1, 60])
    assert run("publish", some, "--to", served, "--table", TAG).exit_code == 0
    assert run("publish", some, "--to", served, "--table", "hps_et.m.other").exit_code == 0
    intervals = (0.2 * 2**number for number in itertools.count())  # a busy machine reads the bus later than the first look

    def has_read_all() -> bool:
        (stats,) = parsed("updates", served, "--once", "--interval", next(intervals))
        assert stats["lost"] == 0
        return stats["skipped"] == {"unknown_table": 2} and stats["tables"][TAG]["rows"] == 2

    def shows_all() -> bool:
        result = run("updates", served, "--once", "--interval", next(intervals))
        lines = result.stdout.splitlines()
        assert result.exit_code == 0 and lines[0].split()[:3] == ["source", "table", "offset"]
        read = any(line.split()[:2] == ["files", TAG] for line in lines)
        return read and any("skipped last: unknown_table: hps_et.m.other" in line for line in lines)

    wait_until(has_read_all)
    wait_until(shows_all)


def test_updates_looks_at_each_interval_and_at_the_end(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("hps_numba.cli._live.time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    looks = run("updates", served, "--json", "--seconds", 0.625, "--interval", 0.25).stdout.splitlines()
    assert len(looks) == 3 and all(json.loads(line)[0]["name"] == "files" for line in looks) and now == [0.625]
    shown = run("updates", served, "--seconds", 0.375, "--interval", 0.25)
    assert shown.exit_code == 0 and shown.stdout.count("freshness") == 2


def test_lines_of_a_table_of_updates() -> None:
    empty: dict[str, Any] = {"running": True, "resumes": True, "committed": {}, "backlog_messages": 0, "backlog_bytes": 0}
    fine: dict[str, Any] = {
        "failed_reads": 0,
        "failed_commits": 0,
        "retries": 0,
        "last_problem": "",
        "last_skipped": "",
        "reloads": 0,
        "held_rows": 0,
    }
    start = SourceStats(name="s", type="files", positions={}, lag_messages=None, lost=0, skipped={}, tables={}, **empty, **fine)
    assert _lines(start) == [("s", "-", "-", "?", "-", "-", "-", "0", "0")] and _notes(start) == []
    table = TableUpdates(
        source="s", positions={0: 5, 1: 1200}, rows_per_second=25_400.0, lag_messages=1234, lag_seconds=1.5,
        freshness_seconds=0.02, age_seconds=2.0, skipped={"width": 2, "magic": 1}, retries=3,
    )  # fmt: skip
    bad = {**fine, "failed_reads": 2, "failed_commits": 1, "last_problem": "cannot be read: no", "last_skipped": "width: x"}
    bad["held_rows"] = 1200
    busy = SourceStats(
        name="s", type="files", positions={0: 5}, lag_messages=4, lost=7, skipped={"width": 2, "magic": 1, "topic": 4},
        tables={TAG: table}, **{**empty, "running": False}, **bad,
    )  # fmt: skip
    cells = ("1200 (of 2)", "1,234 (1.5 s)", "25.4 k", "20 ms", "2 s", "1 magic, 2 width", "3")
    assert _lines(busy) == [("s", TAG, *cells)]
    assert _notes(busy) == [
        "s: ended",
        "s: at least 7 messages were gone from the bus before they were read: load the last snapshot",
        "s: 1,200 rows are held until a slower tier can take them",
        "s: 4 messages of other tables were skipped",
        "s: skipped last: width: x",
        "s: 3 failures of the bus; last problem: cannot be read: no",
    ]
    streams = replace(busy, type="redis_streams", tables={TAG: replace(table, positions={"s": offset_of(b"1764590400000-17")})})
    assert _lines(streams)[0][2] == "1764590400000-17"
    assert _notes(replace(busy, reloads=2))[1].endswith("before they were read: files were loaded again 2 times")


def test_a_command_that_is_interrupted_ends(served: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hps_numba.cli._live.time.sleep", interrupt)
    assert run("updates", served).exit_code == 0


def test_published_while_a_server_runs(served: Path, workshop: Workshop) -> None:
    """The command and a server of the same config, side by side."""
    new = model(workshop.folder / "new.model", [1, 70], 4)
    with hps_numba.HPS(served) as server:
        results: list[Result] = []
        thread = threading.Thread(target=lambda: results.append(run("publish", new, "--to", served, "--table", "m/a")))
        thread.start()
        join_all(thread)
        assert results[0].exit_code == 0, results[0].output
        wait_until(lambda: (server.lookup([70], "m", "a") == rows_of([70], DIM, 4)).all())
    with open_producer({"type": "files", "folder": str(workshop.folder / "bus")}) as producer:
        producer.erase("m", "a", [70])
