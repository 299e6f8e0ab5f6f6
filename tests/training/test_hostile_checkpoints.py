"""Checkpoints that are damaged, or that somebody else wrote: one typed error, in bounded memory, and nothing changed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop

from hps_numba import ConfigError, ModelFileError
from hps_numba.training.checkpoint_files import open_checkpoint
from hps_numba.training.checkpoints import load_trained, save_trained
from hps_numba.training.trainer import Adam, RowTrainer

FUZZ_ROUNDS = int(os.environ.get("HPS_NUMBA_FUZZ_ROUNDS", "150"))
KEYS = np.arange(-10, 60)


class Bench:
    """A trainer, its checkpoint, and whether anything of it changed."""

    def __init__(self, workshop: Workshop, folder: Path) -> None:
        self.server = workshop.open(workshop.model((range(50), 4)))
        self.trainer = RowTrainer(self.server, "m", 0, Adam(0.1))
        self.trainer.step(np.arange(-5, 20), np.ones((25, 4), np.float32))
        self.path = folder / "c.npz"
        save_trained(self.path, [self.trainer], lambda: {"note": b"mine"})
        self.members = self._members()
        self.server.insert(KEYS[::2], np.full((35, 4), 7.0), "m", 0)
        self.trainer.step(np.arange(10), np.ones((10, 4), np.float32))
        self.before = self.state()

    def _members(self) -> dict[str, bytes]:
        with zipfile.ZipFile(self.path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    def state(self) -> tuple[Any, ...]:
        rows, there = self.server.lookup(KEYS, "m", 0), self.server.contains(KEYS, "m", 0)
        return rows.tobytes(), there.tobytes(), self.trainer.steps, self.trainer.read_states(KEYS).tobytes()

    def write(self, members: dict[str, bytes | None], method: int = zipfile.ZIP_STORED) -> None:
        """The checkpoint again, with other members; None leaves one out."""
        with zipfile.ZipFile(self.path, "w", method) as archive:
            for name, content in {**self.members, **members}.items():
                if content is not None:
                    archive.writestr(name, content)

    def refused(self, match: str = r"c\.npz: ", error: type[Exception] = ModelFileError) -> None:
        with pytest.raises(error, match=match) as caught:
            load_trained(self.path, [self.trainer])
        assert str(self.path) in str(caught.value) and "\n" not in str(caught.value)
        assert self.state() == self.before


@pytest.fixture
def bench(workshop: Workshop, tmp_path: Path) -> Bench:
    return Bench(workshop, tmp_path)


def array(content: np.ndarray, **options: Any) -> bytes:
    memory = io.BytesIO()
    np.lib.format.write_array(memory, content, **options)
    return memory.getvalue()


def about(**changes: Any) -> bytes:
    table = {"model": "m", "table": "sparse_embedding0", "optimizer": "adam", "steps": 1}
    return json.dumps({"version": 1, "tables": [{**table, **changes}]}).encode()


ROWS, STATE_ROWS = 55, 25
ARRAYS: dict[str, tuple[str, bytes | None]] = {
    "rows of float64": ("0.emb_vector.npy", array(np.ones((ROWS, 4)))),
    "rows of float16": ("0.emb_vector.npy", array(np.ones((ROWS, 4), np.float16))),
    "rows of integers": ("0.emb_vector.npy", array(np.ones((ROWS, 4), np.int32))),
    "rows of big-endian floats": ("0.emb_vector.npy", array(np.ones((ROWS, 4), ">f4"))),
    "rows by columns": ("0.emb_vector.npy", array(np.asfortranarray(np.ones((ROWS, 4), np.float32)))),
    "rows of one dimension": ("0.emb_vector.npy", array(np.ones(4 * ROWS, np.float32))),
    "rows of three dimensions": ("0.emb_vector.npy", array(np.ones((ROWS, 2, 2), np.float32))),
    "fewer rows than keys": ("0.emb_vector.npy", array(np.ones((ROWS - 1, 4), np.float32))),
    "no rows": ("0.emb_vector.npy", array(np.ones((0, 4), np.float32))),
    "rows that are missing": ("0.emb_vector.npy", None),
    "rows of objects": ("0.emb_vector.npy", array(np.array([{}] * ROWS, object), allow_pickle=True)),
    "rows of records": ("0.emb_vector.npy", array(np.zeros(ROWS, [("a", "<f4", (4,))]))),
    "no array": ("0.emb_vector.npy", b"nothing"),
    "an empty member": ("0.emb_vector.npy", b""),
    "rows cut short": ("0.emb_vector.npy", array(np.ones((ROWS, 4), np.float32))[:-1]),
    "rows that go on": ("0.emb_vector.npy", array(np.ones((ROWS, 4), np.float32)) + b"x"),
    "keys of big-endian integers": ("0.key.npy", array(np.arange(ROWS, dtype=">i8"))),
    "keys of int32": ("0.key.npy", array(np.arange(ROWS, dtype=np.int32))),
    "keys of uint64": ("0.key.npy", array(np.arange(ROWS, dtype=np.uint64))),
    "keys of floats": ("0.key.npy", array(np.arange(ROWS, dtype=np.float64))),
    "keys of dates": ("0.key.npy", array(np.arange(ROWS).astype("M8[s]"))),
    "fewer keys than rows": ("0.key.npy", array(np.arange(ROWS - 5))),
    "more keys than rows": ("0.key.npy", array(np.arange(ROWS + 5))),
    "keys of two dimensions": ("0.key.npy", array(np.arange(ROWS).reshape(-1, 1))),
    "a key without a dimension": ("0.key.npy", array(np.array(5))),
    "states of float64": ("0.state.npy", array(np.ones((STATE_ROWS, 8)))),
    "fewer states than their keys": ("0.state.npy", array(np.ones((STATE_ROWS - 1, 8), np.float32))),
    "keys of states of int32": ("0.state_key.npy", array(np.arange(STATE_ROWS, dtype=np.int32))),
    "fewer keys of states": ("0.state_key.npy", array(np.arange(STATE_ROWS - 1))),
    "states that are missing": ("0.state.npy", None),
}
HEADERS = {
    "negative": "{'descr': '<i8', 'fortran_order': False, 'shape': (-1,), }",
    "huge": f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({2**62},), }}",
    "beyond": f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({2**80},), }}",
    "text": "{'descr': '<i8', 'fortran_order': False, 'shape': ('5',), }",
    "code": "__import__('os').abort()",
    "nested": "(" * 5000,
    "long": "{'descr': '<i8', 'fortran_order': False, 'shape': (55,), }" + " " * 60_000,
    "dtype": "{'descr': 'V0', 'fortran_order': False, 'shape': (55,), }",
}


@pytest.mark.parametrize(("name", "content"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_of_another_form(name: str, content: bytes | None, bench: Bench) -> None:
    bench.write({name: content})
    bench.refused(name.rpartition(".")[0])


@pytest.mark.parametrize("text", HEADERS.values(), ids=HEADERS)
def test_headers_that_ask_for_the_impossible(text: str, bench: Bench) -> None:
    header = text.ljust(max(118, len(text) + 1), " ").encode()
    for name in ("0.key.npy", "0.state_key.npy"):
        bench.write({name: b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(8 * ROWS)})
        bench.refused()


def test_states_of_another_optimizer(bench: Bench) -> None:
    bench.write({"0.state.npy": array(np.ones((STATE_ROWS, 1), np.float32))})
    bench.refused("expected state of shape", ConfigError)


ABOUT: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "text": b'"checkpoint"',
    "list": b"[]",
    "null": b"null",
    "not text": b"\xff\xfe\xff",
    "nested": b"[" * 100_000,
    "version as text": b'{"version": "1", "tables": []}',
    "version true": b'{"version": true, "tables": []}',
    "no tables": b'{"version": 1}',
    "tables of text": b'{"version": 1, "tables": "mm"}',
    "tables of numbers": b'{"version": 1, "tables": [1]}',
    "steps missing": b'{"version": 1, "tables": [{"model": "m", "table": "sparse_embedding0", "optimizer": "adam"}]}',
    "steps text": about(steps="three"),
    "steps float": about(steps=1.5),
    "steps null": about(steps=None),
    "steps true": about(steps=True),
    "steps negative": about(steps=-1),
    "steps huge": about(steps=10**30),
    "steps digits": b'{"version": 1, "tables": [{"steps": ' + b"9" * 5000 + b"}]}",
}


@pytest.mark.parametrize("content", ABOUT.values(), ids=ABOUT)
def test_descriptions_of_another_form(content: bytes | None, bench: Bench) -> None:
    bench.write({"checkpoint.json": content})
    bench.refused()


@pytest.mark.parametrize("changes", [{"model": 5}, {"table": None}, {"optimizer": ["adam"]}, {"model": {"a": 1}}])
def test_names_of_another_type(changes: dict[str, Any], bench: Bench) -> None:
    bench.write({"checkpoint.json": about(**changes)})
    bench.refused("expected tables", ConfigError)


def test_an_archive_of_more_members_than_it_should_have(bench: Bench) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(bench.path, "a") as archive:
        archive.writestr("0.key.npy", array(np.arange(ROWS)))
    bench.refused("two members have the same name")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_small_files_that_unpack_to_large_ones(method: int, bench: Bench) -> None:
    bench.write({"0.key.npy": array(np.zeros(1 << 20, np.int64))}, method)
    bench.refused("expected a stored member, got a compressed one")


def test_members_that_share_their_bytes(bench: Bench) -> None:
    """Every entry of the directory points to the same large member: a file of 1 MiB that asks for a hundred."""
    with zipfile.ZipFile(bench.path, "w") as archive:
        archive.writestr("checkpoint.json", about())
        archive.writestr("note", bytes(1 << 20))
        info = archive.getinfo("note")
        for number in range(100):
            twin = zipfile.ZipInfo(f"note{number}")
            for field in ("CRC", "compress_size", "file_size", "header_offset"):
                setattr(twin, field, getattr(info, field))
            archive.filelist.append(twin)
        archive._didModify = True
    bench.refused("bytes of members, got a file of")


SPECIAL: dict[str, Callable[[Path], object]] = {
    "directory": Path.mkdir,
    "FIFO": os.mkfifo,
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "null": lambda path: path.symlink_to("/dev/null"),
    "empty": Path.touch,
    "loop": lambda path: path.symlink_to(path.name),
    "nowhere": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_regular_file_is_not_opened(make: Callable[[Path], object], bench: Bench) -> None:
    bench.path.unlink()
    make(bench.path)
    bench.refused("cannot be read as a checkpoint")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_file_that_becomes_a_fifo_while_it_is_opened(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    look = os.stat

    def exchange(where: Any, **options: Any) -> os.stat_result:
        status = look(where, **options)
        if str(where) == str(bench.path):
            bench.path.unlink()
            os.mkfifo(bench.path)
        return status

    with monkeypatch.context() as other:
        other.setattr("hps_numba.storage.formats._raw.os.stat", exchange)
        bench.refused("cannot be read as a checkpoint")


def test_a_file_that_is_cut_short_while_it_is_loaded_is_a_typed_error(bench: Bench) -> None:
    with open_checkpoint(bench.path) as file:
        os.truncate(bench.path, 100)
        for read in (file.keys, file.rows, file.states, lambda _: file.shape(0, "key"), lambda _: file.extra("note")):
            with contextlib.suppress(ModelFileError):  # what was read ahead may still be there
                deque(read(0), maxlen=0)
    bench.refused()


def test_a_key_that_the_server_cannot_hold_is_found_before_anything_changes(workshop: Workshop, tmp_path: Path) -> None:
    server = workshop.open(workshop.model((range(50), 4)), supportlonglong=False)
    trainer = RowTrainer(server, "m", 0, Adam(0.1))
    path = tmp_path / "c.npz"
    save_trained(path, [trainer])
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    keys = np.arange(50)
    for bad in (-1, 1 << 32):
        keys[49] = bad
        members["0.key.npy"] = array(keys)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        server.insert(np.arange(60), np.full((60, 4), 7.0), "m", 0)
        with pytest.raises(ConfigError, match=rf"expected keys of .* in 0\.\.4294967295, .*, got {bad}"):
            load_trained(path, [trainer])
        assert (server.lookup(np.arange(60), "m", 0) == 7).all()


def damaged(members: dict[str, bytes], chance: random.Random) -> Iterator[dict[str, bytes]]:
    """Members with some bytes of one changed, under checksums that fit."""
    for _ in range(FUZZ_ROUNDS):
        name = chance.choice(sorted(members))
        content = bytearray(members[name])
        for _ in range(chance.choice((1, 1, 2, 8))):
            content[chance.randrange(min(len(content), 128))] = chance.choice((*b"\0\1 09\x7f\xff", chance.randrange(256)))
        if chance.random() < 0.2:
            del content[chance.randrange(len(content)) :]
        yield {**members, name: bytes(content)}


def test_damage_under_checksums_that_fit(bench: Bench) -> None:
    """Whatever happens is a typed error, or the file is a valid checkpoint of other numbers."""
    refused = 0
    for number, members in enumerate(damaged(bench.members, random.Random(1))):
        bench.write(members)
        try:
            load_trained(bench.path, [bench.trainer])
        except (ModelFileError, ConfigError):
            refused += 1
            assert bench.state() == bench.before, number
        else:
            bench.before = bench.state()
    assert refused > FUZZ_ROUNDS // 2


# -- settings and the dense part of Torch -------------------------------------------


def test_torch_parts_that_are_damaged_change_nothing(workshop: Workshop, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from hps_numba.frontends import torch as hps

    layer = hps.LookupLayer({"supportlonglong": True, "models": [workshop.model((range(50), 4))]}, "m", 0, 4, trainable=True)
    optimizer = hps.Adam(layer, lr=0.5)
    layer(torch.arange(20)).sum().backward()
    optimizer.step()
    path = tmp_path / "c.npz"
    hps.save_checkpoint(path, optimizer, dense={"epoch": 3})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    layer(torch.arange(20)).sum().backward()
    optimizer.step()
    before = layer(torch.arange(60)).detach().clone()
    optimizer.param_groups[0]["lr"] = 0.25

    def packed(thing: Any) -> bytes:
        memory = io.BytesIO()
        torch.save(thing, memory)
        return memory.getvalue()

    (group,) = torch.load(io.BytesIO(members["param_groups.pt"]), weights_only=True)
    bad: list[tuple[str, bytes]] = [("dense.pt", b""), ("dense.pt", b"nothing"), ("dense.pt", members["dense.pt"][:-40])]
    bad += [("dense.pt", packed(Path)), ("param_groups.pt", b"nothing")]
    changes: list[dict[str, Any]] = [{"lr": "fast"}, {"lr": -1.0}, {"lr": float("nan")}, {"betas": 0.5}, {"params": []}]
    wrong: list[Any] = [5, "group", {}, [], [5], [group, group], [{}], *([{**group, **change}] for change in changes)]
    bad += [("param_groups.pt", packed(thing)) for thing in wrong]
    for name, content in bad:
        with zipfile.ZipFile(path, "w") as archive:
            for member, kept in {**members, name: content}.items():
                archive.writestr(member, kept)
        with pytest.raises((ModelFileError, ConfigError), match=str(path)):
            hps.load_checkpoint(path, optimizer)
        assert torch.equal(layer(torch.arange(60)), before) and optimizer.param_groups[0]["lr"] == 0.25
    with zipfile.ZipFile(path, "w") as archive:
        for member, kept in members.items():
            archive.writestr(member, kept)
    assert hps.load_checkpoint(path, optimizer) == {"epoch": 3} and optimizer.param_groups[0]["lr"] == 0.5
