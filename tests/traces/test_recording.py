"""``HPS.record_trace`` records the keys of lookups as a trace, or a sample of bounded size."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from support.factories import Workshop

from hps_numba import HPS, simulate
from hps_numba.errors import ClosedError, ConfigError, TraceError, UnknownModelError
from hps_numba.traces.recording import _BUFFER, metadata_path


@pytest.fixture
def server(workshop: Workshop) -> HPS:
    return workshop.open(workshop.model((range(50), 3), (range(9), 2)))


def recorded(path: Path) -> list[int]:
    return np.load(path).tolist()


def test_all_kinds_of_lookups_are_recorded(server: HPS, tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    with server.record_trace(path, "m", 0) as recording:
        server.lookup([1, 5, 5, -9], "m", 0)
        server.lookup(np.array([[7], [8]], np.uint8), "m", "sparse_embedding0")
        server.lookup([3], "m", 1)  # another table
        server.lookup_many({0: [2], 1: [4]}, "m")
        server.lookup_pooled([6, 6], [0, 2], "m", 0)
        server.direct.lookup_into(np.array([9]), "m", 0, np.empty((1, 3), np.float32))
        server.lookup([], "m", 0)
        assert "recording" in repr(recording) and not recording.done
    server.lookup([4], "m", 0)
    assert recorded(path) == [1, 5, 5, -9, 7, 8, 2, 6, 6, 9]
    assert recording.done and (recording.keys, recording.requests, recording.calls) == (10, 10, 6)
    metadata = json.loads(metadata_path(path).read_text())
    assert metadata == {"table": "m/sparse_embedding0", "rate": 1.0, "requests": 10, "keys": 10, "calls": 6, "every": 1}
    assert server._recordings.active == ()
    recording.close()


def test_rate_every_and_limit_select_what_is_recorded(server: HPS, tmp_path: Path) -> None:
    requested = np.random.default_rng(0).integers(0, 1000, 4000)
    shared, some, few = (tmp_path / f"{name}.npy" for name in ("shared", "some", "few"))
    with (
        server.record_trace(shared, "m", 0, rate=0.25),
        server.record_trace(some, "m", 0, every=3),
        server.record_trace(few, "m", 0, limit=25) as limited,
    ):
        for start in range(0, 4000, 10):
            server.lookup(requested[start : start + 10], "m", 0)
        assert limited.done and len(server._recordings.active) == 2
    kept = set(recorded(shared))
    assert 150 < len(kept) < 350 and recorded(shared) == [key for key in requested.tolist() if key in kept]
    assert recorded(some) == np.concatenate([requested[at : at + 10] for at in range(0, 4000, 30)]).tolist()
    assert recorded(few) == requested[:25].tolist()


def test_simulator_scales_a_recorded_sample(server: HPS, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    requested = rng.zipf(1.2, 60_000) % 9000
    with server.record_trace(tmp_path / "all.npy", "m", 0), server.record_trace(tmp_path / "some.npy", "m", 0, rate=0.4):
        for start in range(0, 60_000, 5000):
            server.lookup(requested[start : start + 5000], "m", 0)
    true = simulate.run(tmp_path / "all.npy", "lru", 1000, geometry="associative", progress=False).runs
    found = simulate.run(tmp_path / "some.npy", "lru", 1000, geometry="associative", progress=False)
    assert found.requests == 60_000 and found.rate == pytest.approx(0.4, abs=1e-6) and found.simulated < 50_000
    for one, estimate in zip(true[:2], found.runs):
        assert abs(one.hit_rate - estimate.hit_rate) <= max(estimate.error, 0.02) and estimate.error > 0
    part = simulate.open_trace(tmp_path / "some.npy", limit=found.simulated // 2)
    assert part.whole == pytest.approx(30_000, rel=0.001)
    metadata_path(tmp_path / "some.npy").write_text("{}")
    with pytest.raises(TraceError, match=r"some\.npy\.json: expected the metadata of a recorded trace"):
        simulate.open_trace(tmp_path / "some.npy")
    metadata_path(tmp_path / "some.npy").write_text('{"rate": 0.5, "requests": 10, "keys": 3}')
    with pytest.raises(TraceError, match=r"3 keys of 10 requests at rate 0\.5, but some\.npy has"):
        simulate.open_trace(tmp_path / "some.npy")


def test_file_is_readable_while_it_grows(server: HPS, tmp_path: Path) -> None:
    path, requested = tmp_path / "t.npy", np.arange(_BUFFER + 10) % 70
    with server.record_trace(path, "m", 0):
        assert recorded(path) == []
        server.lookup(requested, "m", 0)
        assert recorded(path) == requested[:_BUFFER].tolist()
        assert simulate.open_trace(path).requests == _BUFFER
        server.lookup(np.tile(requested, 2), "m", 0)
    assert recorded(path) == np.tile(requested, 3).tolist()


def test_calls_of_threads_are_not_interleaved(server: HPS, tmp_path: Path) -> None:
    def work(number: int) -> None:
        for _ in range(200):
            server.lookup(np.full(7, number), "m", 0)

    with server.record_trace(tmp_path / "t.npy", "m", 0):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    calls = np.load(tmp_path / "t.npy").reshape(-1, 7)
    assert len(calls) == 800 and (calls == calls[:, :1]).all()
    assert np.bincount(calls[:, 0]).tolist() == [200] * 4


def test_closing_the_server_ends_the_recording(workshop: Workshop, tmp_path: Path) -> None:
    server = workshop.open(workshop.model((range(50), 3)))
    recording = server.record_trace(tmp_path / "t.npy", "m", 0)
    server.lookup([1, 2], "m", 0)
    server.close()
    assert recording.done and recorded(tmp_path / "t.npy") == [1, 2]
    with pytest.raises(ClosedError):
        server.record_trace(tmp_path / "u.npy", "m", 0)
    assert not (tmp_path / "u.npy").exists()


def test_misuse_of_record_trace_raises(server: HPS, tmp_path: Path) -> None:
    for options, message in (
        ({"rate": 0}, "rate: expected .*, got 0"),
        ({"rate": 1.1}, "rate: expected .*, got 1.1"),
        ({"every": 0}, "every: expected 1 or more, got 0"),
        ({"limit": 0}, "limit: expected 1 or more, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            server.record_trace(tmp_path / "t.npy", "m", 0, **options)
    with pytest.raises(ConfigError, match=r"ends in \.npy"):
        server.record_trace(tmp_path / "t.bin", "m", 0)
    with pytest.raises(TraceError, match="No such file"):
        server.record_trace(tmp_path / "none" / "t.npy", "m", 0)
    with pytest.raises(UnknownModelError):
        server.record_trace(tmp_path / "t.npy", "other", 0)
    assert server._recordings.active == ()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_does_not_write_the_file(server: HPS, tmp_path: Path) -> None:
    with server.record_trace(tmp_path / "t.npy", "m", 0):
        server.lookup([1], "m", 0)
        child = os.fork()
        if child == 0:
            server.lookup([2], "m", 0)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        server.lookup([3], "m", 0)
    assert recorded(tmp_path / "t.npy") == [1, 3]


def test_full_disk_ends_the_recording_but_not_the_lookup(
    server: HPS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    requested = np.arange(_BUFFER)
    recording = server.record_trace(tmp_path / "t.npy", "m", 0)
    server.lookup(requested, "m", 0)

    def refuse(self: object, *args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hps_numba.traces.recording.TraceRecording._write", refuse)
    assert server.lookup(requested, "m", 0).shape == (_BUFFER, 3)
    assert recording.done and server._recordings.active == ()
    assert "recording of m/sparse_embedding0 ends" in caplog.text and "No space left on device" in caplog.text
    assert recorded(tmp_path / "t.npy") == requested.tolist()
    recording.close()


def test_new_recording_leaves_readers_of_the_old_one_alone(server: HPS, tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    with server.record_trace(path, "m", 0):
        server.lookup(np.arange(50), "m", 0)
    mapped = np.load(path, mmap_mode="r")
    with server.record_trace(path, "m", 0):
        server.lookup([7], "m", 0)
        assert mapped.tolist() == list(range(50))  # SIGBUS if the file had been truncated
    assert mapped.tolist() == list(range(50)) and recorded(path) == [7]
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith(("t", "."))) == ["t.npy", "t.npy.json"]


def test_recording_replaces_nothing_but_files(server: HPS, tmp_path: Path) -> None:
    folder, fifo, link = (tmp_path / f"{name}.npy" for name in ("folder", "fifo", "full"))
    folder.mkdir()
    (folder / "mine").write_text("kept")
    os.mkfifo(fifo)
    link.symlink_to("/dev/full")
    for path, kind in ((folder, "a directory"), (fifo, "a FIFO"), (link, "a device")):
        with pytest.raises(TraceError, match=f"expected a new file or an older trace, got {kind}"):
            server.record_trace(path, "m", 0)
    assert (folder / "mine").read_text() == "kept" and fifo.is_fifo() and link.is_symlink()
    assert Path("/dev/full").is_char_device() and server._recordings.active == ()


@pytest.mark.parametrize("kind", ["config", "folder", "fifo"])
def test_recording_replaces_no_metadata_but_its_own(server: HPS, tmp_path: Path, kind: str) -> None:
    path, beside = tmp_path / "t.npy", tmp_path / "t.npy.json"
    if kind == "config":
        beside.write_text('{"models": []}')
    else:
        beside.mkdir() if kind == "folder" else os.mkfifo(beside)
    before = beside.lstat()
    with pytest.raises(TraceError, match=r"t\.npy\.json: .*; it is not replaced$"):
        server.record_trace(path, "m", 0)
    after = beside.lstat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns) and not path.exists()
    assert server._recordings.active == ()


def test_recording_through_a_link_writes_the_file_it_points_to(server: HPS, tmp_path: Path) -> None:
    target, link = tmp_path / "elsewhere.npy", tmp_path / "link.npy"
    np.save(target, np.arange(3))
    link.symlink_to(target)
    with server.record_trace(link, "m", 0):
        server.lookup([5], "m", 0)
    assert link.is_symlink() and recorded(target) == [5] and simulate.open_trace(link).requests == 1


def test_files_of_others_are_not_replaced(server: HPS, tmp_path: Path) -> None:
    weights, text = tmp_path / "weights.npy", tmp_path / "text.npy"
    np.save(weights, np.ones((3, 4), np.float32))
    text.write_text("dear diary")
    before = weights.read_bytes()
    for path in (weights, text):
        with pytest.raises(TraceError, match="is a file, but not a trace; it is not replaced"):
            server.record_trace(path, "m", 0)
    assert weights.read_bytes() == before and text.read_text() == "dear diary"
    for bad in (None, 5, b"a.npy", "", "a\0.npy"):
        with pytest.raises(TraceError, match=r"record_trace: path: expected "):
            server.record_trace(bad, "m", 0)
