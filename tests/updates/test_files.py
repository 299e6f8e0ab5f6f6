"""A folder as a bus: it passes the contract suite; files are read whole or not at all; what is gone is said."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.children import in_child
from support.factories import Workshop
from support.oracles import assert_same_bits, rows_of
from support.processes import environment
from support.updates import wait_for
from support.waiting import HANG_SECONDS, wait_until

from hps_numba.errors import ConfigError, TierError, TierUnavailable
from hps_numba.testing import SourceContract
from hps_numba.updates import Lost, Message, Outgoing, Update, files
from hps_numba.updates._files.delta import delta_path
from hps_numba.updates._files.manifest import read_manifest
from hps_numba.updates._wire.messages import encode_erasures, encode_rows, headers_of
from hps_numba.updates.files import FilesProducer, FilesSource


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "bus"


@pytest.fixture
def opened(folder: Path) -> Iterator[Callable[..., FilesSource]]:
    made: list[FilesSource] = []

    def source(**keys: Any) -> FilesSource:
        made.append(FilesSource.from_options(**{"folder": str(folder), "poll_interval_ms": 1, **keys}))
        return made[-1]

    yield source
    for one in made:
        one.close()


@pytest.fixture
def producer(folder: Path) -> Iterator[FilesProducer]:
    made = FilesProducer.from_options(folder=str(folder), linger_ms=0, sync=False)
    yield made
    made.close()


class TestFilesSource(SourceContract):
    patience = HANG_SECONDS

    @pytest.fixture
    def open_source(self, opened: Callable[..., FilesSource]) -> Callable[..., FilesSource]:
        return opened

    @pytest.fixture
    def publish(self, producer: FilesProducer) -> Callable[[Sequence[Update]], None]:
        def publish(updates: Sequence[Update]) -> None:
            for one in updates:
                if one.rows is None:
                    value, headers = encode_erasures(one.keys, 3)
                else:
                    value, headers = encode_rows(one.keys, one.rows), {}
                more = headers_of(event_time_ms=one.event_time_ms, version=one.version)
                assert producer._send([Outgoing(one.table, 0, value, {**headers, **more})]) == 1

        return publish


def put(producer: FilesProducer, *keys: int) -> None:
    """A file of one message for each key."""
    for key in keys:
        producer.update("m", "a", [key], rows_of([key], 3), version=key)  # another version is another message
    producer.flush()


def put_together(producer: FilesProducer, *versions: int) -> None:
    """One file of several messages."""
    headers = [{"hps-version": b"%d" % version} for version in versions]
    assert producer._send([Outgoing("hps_et.m.a", 0, b"x", one) for one in headers]) == len(versions)


def versions_of(items: Sequence[Message | Lost]) -> list[int]:
    assert all(isinstance(item, Message) for item in items), items
    return sorted(int(item.headers["hps-version"]) for item in items if isinstance(item, Message))


def test_a_folder_that_is_not_there_yet_gives_nothing(opened: Callable[..., FilesSource], folder: Path) -> None:
    source = opened(resume=False)
    assert list(source.poll(0.005)) == []
    with FilesProducer.from_options(folder=str(folder)) as producer:
        put(producer, 1)
        assert versions_of(source.poll(0)) == [1]
    assert source.lag() == 0


@pytest.mark.parametrize("sync", [True, False])
def test_a_producer_goes_on_where_the_last_one_ended(opened: Callable[..., FilesSource], folder: Path, sync: bool) -> None:
    for key in range(3):
        with FilesProducer.from_options(folder=str(folder), sync=sync) as producer:
            put(producer, key)
    source = opened()
    assert [versions_of(source.poll(0)) for _ in range(2)] == [[0, 1, 2], []]
    assert not source.has_more


def test_files_are_read_together_up_to_a_size(
    opened: Callable[..., FilesSource], producer: FilesProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in range(7):
        put(producer, key)
    size = opened(resume=False).poll(0)[0].size  # type: ignore[union-attr]  # it is a Message
    monkeypatch.setattr(files, "_HANDED_OUT_BYTES", 3 * size)
    for resume in (False, True):
        source = opened(resume=resume)
        got = [(versions_of(source.poll(0)), source.has_more) for _ in range(4)]
        assert got == [([0, 1, 2], True), ([3, 4, 5], True), ([6], False), ([], False)]


def test_what_comes_before_a_file_that_is_not_whole_is_not_kept_waiting(
    opened: Callable[..., FilesSource], producer: FilesProducer, folder: Path
) -> None:
    for key in range(4):
        put(producer, key)
    path = delta_path(folder, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    source = opened(resume=False)
    assert versions_of(source.poll(0)) == [0, 1] and source.has_more
    for _ in range(2):
        with pytest.raises(TierError, match=r"delta-.*3\.hps: expected "):
            source.poll(0)
    path.write_bytes(whole)
    assert versions_of(source.poll(0)) == [2, 3] and not source.has_more


def test_a_folder_has_one_producer_at_a_time(producer: FilesProducer, folder: Path) -> None:
    with pytest.raises(
        TierUnavailable, match=rf"producer\.lock: expected one producer at a time, got one of process {os.getpid()} on"
    ):
        FilesProducer.from_options(folder=str(folder))

    def work() -> bool:
        producer.update("m", "a", [1], rows_of([1], 3))
        with pytest.raises(TierUnavailable, match="got a child forked from it"):
            producer.flush()
        return True

    assert in_child(work) == 0
    producer.close()
    FilesProducer.from_options(folder=str(folder)).close()


def test_two_consumers_have_a_position_each(opened: Callable[..., FilesSource], producer: FilesProducer) -> None:
    put(producer, 1)
    put(producer, 2)
    one, two = opened(consumer="one"), opened(consumer="two")
    with pytest.raises(
        TierUnavailable, match=r"expected a position of one consumer \('consumer' names it\), got one of process"
    ):
        opened(consumer="one")
    opened(consumer="one", resume=False)  # it has no position
    first = one.poll(0)[0]
    assert isinstance(first, Message)
    one.commit([first.position])
    one.close()
    assert versions_of(opened(consumer="one").poll(0)) == [2]
    assert versions_of(two.poll(0)) == [1, 2]


def test_a_position_in_the_middle_of_a_file(opened: Callable[..., FilesSource], producer: FilesProducer) -> None:
    put_together(producer, *range(8))
    put_together(producer, 8, 9)
    source = opened()
    items = source.poll(0)
    third, last = items[2], items[7]
    assert isinstance(third, Message) and isinstance(last, Message)
    source.commit([third.position])
    source.close()
    again = opened()
    assert [item.position.offset for item in again.poll(0) if isinstance(item, Message)] == list(range(3, 10))
    again.commit([last.position])
    again.close()
    assert versions_of(opened().poll(0)) == [8, 9]


def test_every_cut_and_every_changed_byte_of_a_file_is_noticed_and_the_file_is_waited_for(
    opened: Callable[..., FilesSource], producer: FilesProducer, folder: Path
) -> None:
    put(producer, 1)
    path = delta_path(folder, 1)
    whole = path.read_bytes()
    source = opened(resume=False)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(TierError, match=r"delta-.*: "):
            source.poll(0)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(TierError, match=r"delta-.*: "):
            source.poll(0)
    path.unlink()
    with pytest.raises(TierError, match="no such file"):
        source.poll(0)
    path.write_bytes(whole)
    assert versions_of(source.poll(0)) == [1]


def test_a_damaged_manifest_is_an_error_and_the_next_one_is_read(
    opened: Callable[..., FilesSource], producer: FilesProducer, folder: Path
) -> None:
    put(producer, 1)
    path = folder / "manifest.json"
    whole = path.read_bytes()
    source = opened(resume=False)
    for number, bad in enumerate((b"", b"{}", whole[:-9], whole.replace(b'"next": 2', b'"next": 3'), b"[]", b"\xff")):
        path.write_bytes(bad)
        with pytest.raises(TierError, match=r"manifest\.json: expected the manifest of a folder of updates"):
            source.poll(0)
        with pytest.raises(TierError, match=r"manifest\.json"):
            FilesProducer.from_options(folder=str(shutil.copytree(folder, folder.parent / f"copy{number}")))
    path.write_bytes(whole)
    assert versions_of(source.poll(0)) == [1]


def test_a_manifest_that_was_replaced_within_a_tick_of_the_clock_is_noticed(
    opened: Callable[..., FilesSource], producer: FilesProducer, folder: Path
) -> None:
    put_together(producer, 1)
    source = opened(resume=False)
    assert versions_of(source.poll(0)) == [1]
    path = folder / "manifest.json"
    old, again = path.stat(), folder / "again"
    os.link(path, again)
    put_together(producer, 2)
    again.write_bytes(path.read_bytes())  # the inode of before, as a file system may give it out once more
    again.replace(path)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    new = path.stat()
    assert (new.st_ino, new.st_mtime_ns, new.st_size) == (old.st_ino, old.st_mtime_ns, old.st_size)
    assert versions_of(source.poll(0)) == [2]


def test_what_a_killed_producer_left_is_not_read_and_is_written_over(
    opened: Callable[..., FilesSource], producer: FilesProducer, folder: Path
) -> None:
    put(producer, 1)
    old = (folder / "manifest.json").read_bytes()
    put(producer, 2)
    producer.close()
    (folder / "manifest.json").write_bytes(old)  # as if it had been killed between the two renames
    delta_path(folder, 3).with_name(f"{delta_path(folder, 3).name}.partial").write_bytes(b"half")
    source = opened()
    assert versions_of(source.poll(0)) == [1]
    with FilesProducer.from_options(folder=str(folder)) as again:
        assert sorted(path.name for path in folder.glob("delta-*")) == [delta_path(folder, 1).name]
        put(again, 3)
    assert versions_of(source.poll(0)) == [3]


def test_files_of_others_stay(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    names = ["delta-2026.parquet", "delta-7", "delta-1.hps", "delta-x.hps.partial", f"{delta_path(folder, 5).name}.bak"]
    for name in names:
        (folder / name).write_text("mine")
    delta_path(folder, 9).mkdir()
    (delta_path(folder, 9) / "mine").write_text("mine")
    with pytest.raises(TierUnavailable, match=r"expected a manifest.json beside delta-0+9.hps, got none"):
        FilesProducer.from_options(folder=str(folder))
    delta_path(folder, 9).rename(folder / "delta-folder")
    for _ in range(2):
        with FilesProducer.from_options(folder=str(folder)) as producer:
            put(producer, 1)
    assert [(folder / name).read_text() for name in (*names, "delta-folder/mine")] == ["mine"] * 6


def test_what_a_lost_manifest_had_is_not_written_over(producer: FilesProducer, folder: Path) -> None:
    put(producer, 1)
    producer.close()
    content = delta_path(folder, 1).read_bytes()
    (folder / "manifest.json").rename(folder / "elsewhere")
    with pytest.raises(TierUnavailable, match=r"expected a manifest.json beside delta-0+1.hps, got none: bring it back"):
        FilesProducer.from_options(folder=str(folder))
    assert delta_path(folder, 1).read_bytes() == content


def test_old_files_are_dropped_and_a_consumer_that_needs_them_is_told(opened: Callable[..., FilesSource], folder: Path) -> None:
    with FilesProducer.from_options(folder=str(folder), max_files=2) as producer:
        put_together(producer, 0, 1)
        slow = opened(consumer="slow")
        first = slow.poll(0)[0]
        assert isinstance(first, Message)
        slow.commit([first.position])
        slow.close()
        for version in range(2, 6):
            put_together(producer, version)
    assert len(list(folder.glob("delta-*"))) == 2
    late = opened(consumer="slow")
    (lost,) = late.poll(0)
    assert isinstance(lost, Lost)
    assert (lost.messages, lost.position.offset) == (3, 4), "one of the first file, and two more files"
    assert versions_of(late.poll(0)) == [4, 5]
    assert versions_of(opened(consumer="new").poll(0)) == [4, 5], "who begins there has lost nothing"


def test_a_consumer_that_runs_is_told_too_and_one_that_keeps_up_loses_nothing(
    opened: Callable[..., FilesSource], folder: Path
) -> None:
    with FilesProducer.from_options(folder=str(folder), max_files=1) as producer:
        keeps_up, lags = opened(resume=False), opened(resume=False)
        put(producer, 0)
        assert versions_of(lags.poll(0)) == versions_of(keeps_up.poll(0)) == [0]
        for key in range(1, 4):
            put(producer, key)
            assert versions_of(keeps_up.poll(0)) == [key]
        (lost,) = lags.poll(0)
        assert isinstance(lost, Lost) and lost.messages == 2
        assert versions_of(lags.poll(0)) == [3]


@pytest.mark.parametrize("older", ["another folder", "an older copy"])
def test_a_folder_that_is_not_what_it_was_is_read_from_its_start(
    opened: Callable[..., FilesSource], producer: FilesProducer, folder: Path, older: str
) -> None:
    put(producer, 1)
    copy = shutil.copytree(folder, folder.parent / "copy")
    put(producer, 2)
    source = opened()
    items = [*source.poll(0), *source.poll(0)]
    last = items[-1]
    assert isinstance(last, Message)
    source.commit([last.position])
    producer.close()
    if older == "another folder":
        shutil.rmtree(folder)
        with FilesProducer.from_options(folder=str(folder)) as other:
            put(other, 7)
        expected = [7]
    else:
        for name in ("manifest.json", delta_path(folder, 1).name):
            shutil.copy(copy / name, folder / name)
        expected = [1]
    (lost,) = source.poll(0)
    assert isinstance(lost, Lost) and lost.messages is None
    assert versions_of(source.poll(0)) == expected


def test_large_messages_are_handed_out_in_parts_and_written_in_several_files(
    opened: Callable[..., FilesSource], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_DELTA_BYTES", 3000)
    monkeypatch.setattr(files, "_HANDED_OUT_BYTES", 1000)
    keys = np.arange(500)
    with FilesProducer.from_options(folder=str(folder), send_buffer_size=500) as producer:
        producer.update("m", "a", keys, rows_of(keys, 3))
    found = read_manifest(folder)
    assert found is not None and found.next > 3
    source = opened()
    items: list[Any] = []
    while some := source.poll(0):
        assert sum(len(item.value) for item in some) < 1000 + 500
        items += some
    assert len(items) == found.next_offset
    assert sum((len(item.value) - 8) // 20 for item in items) == 500


def test_options_are_checked(opened: Callable[..., FilesSource], folder: Path) -> None:
    with pytest.raises(ConfigError, match="poll_interval_ms: expected more than 0, got 0"):
        opened(poll_interval_ms=0)
    with pytest.raises(ConfigError, match="folder: missing"):
        FilesSource.from_options()
    with pytest.raises(ConfigError, match="max_files: expected at least 0, got -1"):
        FilesProducer.from_options(folder=str(folder), max_files=-1)
    folder.write_text("a file")
    with pytest.raises(TierUnavailable, match=r"cannot be locked: (File exists|Not a directory)"):
        FilesProducer.from_options(folder=str(folder))


def test_u06_three_processes_of_one_host_get_all_updates_each(
    workshop: Workshop, producer: FilesProducer, folder: Path
) -> None:
    source = {"type": "files", "folder": str(folder), "poll_interval_ms": 1}
    path = workshop.folder / "ps.json"
    path.write_text(json.dumps({"models": [workshop.model((range(9), 3))], "update_source": source}))
    command = [sys.executable, "-m", "support.update_consumer", str(path), "199"]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) for _ in range(3)]
    table = {key: rows_of([key], 3)[0] for key in range(9)}
    for number in range(200):
        keys = [number % 7, 100 + number]
        value = encode_rows(np.array(keys), rows_of(keys, 3, number % 9))
        assert producer._send([Outgoing("hps_et.m.sparse_embedding0", 0, value)]) == 1
        table.update(zip(keys, rows_of(keys, 3, number % 9)))
    order = sorted(table)
    expected = np.array(order).tobytes() + np.stack([table[key] for key in order]).tobytes()
    for child in children:
        printed, _ = child.communicate(timeout=HANG_SECONDS)
        assert printed.split() == ["ready", hashlib.sha256(expected).hexdigest()]


def test_from_a_producer_to_the_lookups_of_a_server(workshop: Workshop, producer: FilesProducer, folder: Path) -> None:
    source = {"type": "files", "folder": str(folder), "poll_interval_ms": 1, "failure_backoff_ms": 1}
    server = workshop.open(workshop.model((range(9), 3)), update_source=source)
    producer.update("m", "sparse_embedding0", [1, 50], rows_of([1, 50], 3, 1))
    producer.erase("m", "sparse_embedding0", [2])
    producer.flush()
    stream = producer._manifest.stream
    wait_for(server, producer._manifest.next_offset - 1, partition=stream)
    expected = np.concatenate([rows_of([1], 3, 1), np.full((1, 3), -7.5, np.float32), rows_of([50], 3, 1)])
    assert_same_bits(server.lookup([1, 2, 50], "m", 0), expected)
    wait_until(lambda: server.update_stats()[0].lag_messages == 0)
    (updates,) = server.stats()["m"]["sparse_embedding0"].updates
    assert (updates.rows, updates.erased, updates.lag_messages) == (2, 1, 0)
    assert updates.freshness_seconds is not None
