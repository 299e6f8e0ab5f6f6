"""The process behind ``support.shared_memory.Peer``: one JSON line in for each answer out."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from support.shared_memory import open_tier

import hps_numba


class OnTier:
    """Answers from a tier."""

    def __init__(self, **options: Any) -> None:
        self.tier = open_tier(**options)

    def insert(self, table: str, keys: list[int], rows: list[list[float]]) -> int:
        return self.tier.insert(table, np.array(keys, np.int64), np.array(rows, np.float32))

    def erase(self, table: str, keys: list[int] | None = None) -> int:
        return self.tier.erase(table, None if keys is None else np.array(keys, np.int64))

    def rows(self, table: str, keys: list[int]) -> list[list[float]]:
        dim = next(rows.shape[1] for _, rows in self.tier.scan(table))
        out = np.full((len(keys), dim), np.nan, np.float32)
        self.tier.fetch(table, np.array(keys, np.int64), out)
        answer: list[list[float]] = out.tolist()
        return answer

    def size(self, table: str) -> int:
        return self.tier.size(table)

    def tables(self) -> list[str]:
        return self.tier.tables()

    def end(self) -> None:
        self.tier.close()


class OnServer:
    """Answers from a server."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.server = hps_numba.HPS(config)

    def rows(self, table: str, keys: list[int]) -> list[list[float]]:
        answer: list[list[float]] = np.asarray(self.server.lookup(np.array(keys, np.int64), table, 0)).tolist()
        return answer

    def insert(self, table: str, keys: list[int], rows: list[list[float]]) -> int:
        return self.server.insert(np.array(keys, np.int64), np.array(rows, np.float32), table, 0)

    def stats(self, table: str) -> list[int]:
        (stats,) = self.server.stats()[table].values()
        return [stats.rows, stats.bytes]

    def end(self) -> None:
        self.server.close()


def say(status: str, answer: Any) -> None:
    sys.stdout.write(json.dumps([status, answer]) + "\n")
    sys.stdout.flush()


def main() -> None:
    given = json.loads(sys.argv[1])
    served: Any = OnServer(given["config"]) if "config" in given else OnTier(**given)
    say("ok", None)
    for line in sys.stdin:
        what, options = json.loads(line)
        try:
            answer = getattr(served, what)(**options)
        except Exception as problem:  # whatever it is, the test wants to see it
            say("error", f"{type(problem).__name__}: {problem}")
        else:
            say("ok", answer)
    served.end()


if __name__ == "__main__":
    main()
