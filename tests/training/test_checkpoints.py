"""Checkpoints of trained rows: complete or absent, whenever their writer is killed; and loaded in a new process."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.framework_rig import DIM, ROWS, rig_of, run_program, start_program
from support.oracles import rows_of
from support.waiting import HANG_SECONDS, join_all, wait_until

from hps_numba import ConfigError, ModelFileError
from hps_numba.server.registry import SERVERS
from hps_numba.training.checkpoint_files import open_checkpoint
from hps_numba.training.checkpoints import load_trained, save_trained
from hps_numba.training.trainer import Adagrad, Adam, RowTrainer, Sgd


def trained(workshop: Workshop, rule: Any, rows: int = 300, steps: int = 3) -> RowTrainer:
    """A table of which half the rows were trained, some of them new, and the rest not."""
    server = workshop.open(workshop.model((range(rows), 4)))
    trainer = RowTrainer(server, "m", 0, rule)
    generator = np.random.default_rng(0)
    for _ in range(steps):
        keys = np.unique(generator.integers(-rows // 2, rows // 2, rows))
        trainer.step(keys, generator.normal(size=(len(keys), 4)).astype(np.float32))
    server.erase(range(250, 260), "m", 0)
    return trainer


@pytest.mark.parametrize("rule", [Sgd(0.1), Adagrad(0.1), Adam(0.1)], ids=lambda rule: rule.name)
def test_load_restores_rows_states_and_steps(workshop: Workshop, tmp_path: Path, rule: Any) -> None:
    trainer, path = trained(workshop, rule), tmp_path / "c.npz"
    keys = np.arange(-200, 400)
    server = trainer.server
    rows, there, states = server.lookup(keys, "m", 0), server.contains(keys, "m", 0), trainer.read_states(keys)
    assert save_trained(path, [trainer], lambda: {"note": b"mine"}) == there.sum()
    with np.load(path) as arrays:
        assert np.array_equal(arrays["0.key"], keys[there]) and np.array_equal(arrays["0.emb_vector"], rows[there])
    server.insert(np.arange(1000, 1010), np.ones((10, 4)), "m", 0)
    server.erase(range(5), "m", 0)
    trainer.step(np.arange(100), np.ones((100, 4), np.float32))
    fresh = RowTrainer(server, "m", 0, rule)
    for one in (trainer, fresh):
        assert load_trained(path, [one], lambda file: file.extra("note")) == b"mine"
        assert np.array_equal(server.lookup(keys, "m", 0), rows) and np.array_equal(server.contains(keys, "m", 0), there)
        assert not server.contains(np.arange(1000, 1010), "m", 0).any()
        assert one.steps == 3 and np.array_equal(one.read_states(keys), states)


def test_a_checkpoint_is_consistent_across_tables_while_training(workshop: Workshop, tmp_path: Path) -> None:
    """Every row of both tables takes the same steps, so each checkpoint must be of one step."""
    server = workshop.open(workshop.model((range(40_000), 4), (range(40_000), 4)))
    keys, gradients = np.arange(40_000), np.ones((40_000, 4), np.float32)
    for table in (0, 1):
        server.insert(keys, np.zeros((40_000, 4)), "m", table)
    trainers = [RowTrainer(server, "m", table, Adagrad(1.0)) for table in (1, 0)]
    stop, paths = threading.Event(), [tmp_path / f"{number}.npz" for number in range(4)]

    def train() -> None:
        while not stop.is_set():
            for trainer in trainers:
                trainer.step(keys, gradients)

    thread = threading.Thread(target=train)
    thread.start()
    for path in paths:
        save_trained(path, trainers)
        steps = trainers[0].steps
        wait_until(lambda steps=steps: trainers[0].steps > steps)
    stop.set()
    join_all(thread)
    seen = []
    for path in paths:
        with open_checkpoint(path) as file, np.load(path) as arrays:
            steps = [about["steps"] for about in file.tables]
            for number, count in enumerate(steps):
                assert (arrays[f"{number}.state"] == count).all() and len(arrays[f"{number}.key"]) == 40_000
                expected = -sum(1 / np.sqrt(np.float32(step)) for step in range(1, count + 1))
                assert np.allclose(arrays[f"{number}.emb_vector"], expected, atol=1e-3)
            assert steps[0] - steps[1] in (0, 1)
            seen += steps
    assert max(seen) > min(seen)


_WRITE = """
import os, signal, sys, numpy as np
import hps_numba
from hps_numba.training.checkpoints import save_trained
from hps_numba.training.trainer import Adagrad, RowTrainer

class Deadly(dict):
    def items(self):  # after the tables were written, before the file is complete
        os.kill(os.getpid(), signal.SIGKILL)

server = hps_numba.HPS(sys.argv[1])
trainer = RowTrainer(server, "m", 0, Adagrad(1.0))
keys = np.arange(60_000)
for number in range(1, 10_000):
    server.insert(keys, np.full((60_000, 8), number), "m", 0)
    trainer.steps = number
    save_trained(sys.argv[2], [trainer], lambda: {"number": b"%d" % number} if sys.argv[3] == "on" or number < 3 else Deadly())
    print(number, flush=True)
"""


def number_in(path: Path) -> int:
    """The one number that every value of a checkpoint has."""
    with open_checkpoint(path) as file, np.load(path) as arrays:
        number = file.tables[0]["steps"]
        assert (arrays["0.emb_vector"] == number).all() and len(arrays["0.key"]) == 60_000
        assert file.extra("number") == b"%d" % number
    return int(number)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal on this system")
def test_a_killed_writer_leaves_the_old_checkpoint_intact(tmp_path: Path) -> None:
    rig, path = rig_of(tmp_path), tmp_path / "c.npz"
    mid = start_program(_WRITE, rig.path, str(path), "until 3")
    out, _ = mid.communicate(timeout=HANG_SECONDS)
    assert mid.returncode == -signal.SIGKILL and out.split() == ["1", "2"]
    assert number_in(path) == 2 and list(tmp_path.glob(".c.npz.*.hps-partial"))
    chance = random.Random(0)
    for _ in range(3):
        process = start_program(_WRITE, rig.path, str(path), "on")
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        time.sleep(chance.uniform(0.0, 0.3))
        process.kill()
        out, _ = process.communicate(timeout=HANG_SECONDS)
        said = int(["1", *out.split()][-1])
        assert number_in(path) in (said, said + 1)
    output = run_program(_WRITE.replace("10_000", "2"), rig.path, str(path), "on")
    assert output.split() == ["1"] and number_in(path) == 1
    assert not list(tmp_path.glob(".c.npz.*.hps-partial"))  # the next writer removes them


def test_damaged_and_foreign_checkpoints_change_nothing(workshop: Workshop, tmp_path: Path) -> None:
    trainer, path = trained(workshop, Adagrad(0.1)), tmp_path / "c.npz"
    save_trained(path, [trainer])
    whole = path.read_bytes()
    server, keys = trainer.server, np.arange(300)
    server.insert(keys, np.ones((300, 4)), "m", 0)

    def refuses(match: str, error: type[Exception], *trainers: RowTrainer) -> None:
        with pytest.raises(error, match=match):
            load_trained(path, trainers or [trainer])
        assert (server.lookup(keys, "m", 0) == 1).all() and trainer.steps == 3

    refuses(r"optimizer.: .adam.*got.*optimizer.: .adagrad", ConfigError, RowTrainer(server, "m", 0, Adam(0.1)))
    refuses("expected tables .*, got", ConfigError, trainer, trainer)
    wide = workshop.open(workshop.model((range(3), 5), name="m"))
    refuses("expected rows of 5 elements for .*, got 4", ConfigError, RowTrainer(wide, "m", 0, Adagrad(0.1)))
    noticed = 0
    for number in range(40):
        damaged = bytearray(whole)
        damaged[len(whole) * number // 40] ^= 0x55
        path.write_bytes(damaged)
        try:
            with open_checkpoint(path) as file:
                assert file.keys(0).size  # an unused byte, such as a date
        except ModelFileError:
            noticed += 1
            refuses("checkpoint|damaged|expected|missing", ModelFileError)
    assert noticed > 30
    for cut in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refuses("cannot be read as a checkpoint", ModelFileError)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("checkpoint.json", '{"version": 99, "tables": []}')
    refuses("expected version 1, got 99", ModelFileError)
    path.unlink()
    refuses("cannot be read as a checkpoint", ModelFileError)
    with pytest.raises(ModelFileError, match="no directory"):
        save_trained(tmp_path / "missing" / "c.npz", [trainer])
    assert not np.array_equal(rows_of(keys, 4), server.lookup(keys, "m", 0))


_RESUME = """
import sys, numpy as np, torch
from hps_numba.frontends import torch as hps
layer = hps.LookupLayer(sys.argv[1], "m", 0, 8, trainable=True, initializer="normal")
head = torch.nn.Linear(8, 1)
model = torch.nn.Sequential(layer, head)
rows, dense = hps.Adam(model, lr=0.5), torch.optim.SGD(model.parameters(), lr=0.1)
def train(steps):
    for number in range(steps):
        rows.zero_grad(); dense.zero_grad()
        model(torch.arange(190, 210) + number).square().sum().backward()
        rows.step(); dense.step()
if sys.argv[2] == "save":
    torch.manual_seed(0)
    head.reset_parameters()
    train(4)
    rows.param_groups[0]["lr"] = 0.125
    kept = {"model": model.state_dict(), "epoch": 4}
    assert hps.save_checkpoint(sys.argv[3], rows, dense=kept) == 213
else:
    kept = hps.load_checkpoint(sys.argv[3], rows)
    assert kept["epoch"] == 4 and rows.param_groups[0]["lr"] == 0.125
    model.load_state_dict(kept["model"])
train(4)
with torch.no_grad():
    np.save(sys.argv[4], np.concatenate([layer(torch.arange(220)).numpy(), head.weight.numpy()]))
"""


def test_a_new_process_resumes_training_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    rig = rig_of(tmp_path)
    path = str(tmp_path / "c.npz")
    monkeypatch.setattr(sys, "argv", ["", rig.path, "save", path, str(tmp_path / "old.npy")])
    exec(_RESUME, {})
    run_program(_RESUME, rig.path, "load", path, str(tmp_path / "new.npy"))
    old, new = np.load(tmp_path / "old.npy"), np.load(tmp_path / "new.npy")
    assert np.array_equal(old, new) and not np.allclose(old[190:ROWS], rig.rows[190:], atol=0.1)
    assert old.shape == (221, DIM) and np.array_equal(old[:190], rig.rows[:190])
    SERVERS.close()
