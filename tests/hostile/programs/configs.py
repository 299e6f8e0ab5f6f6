"""Configs with random changes: each makes a server or is refused with a typed error that names a place."""

from __future__ import annotations

import copy
import json
import logging
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from hostile.programs.world import DIM, MODEL, Clock, versions_of, write_version

import hps_numba
from hps_numba import HpsError

ODD: list[Any] = [None, True, False, 0, 1, -1, 2**31, 2**63, 2**70, -(2**70), 0.5, -0.5, 1e300, float("nan"), float("inf")]
ODD += ["", "0", "1", "true", "x", "../x", "/", "a\0b", "\ud800", "redis_cluster", "a:b", "os:system"]
ODD += [[], [[]], {}, [None], ["x"], [1, "x"], {"a": 1}]
NOISE = ["", "\0", "'", "#", ",", "}", "\ufeff", "//", "NaN"]


def change(value: Any, chance: random.Random) -> Any:
    """A copy with one thing changed, removed or added, anywhere in it."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        out, key = dict(value), chance.choice(list(value))
        what = chance.random()
        if what < 0.1:
            del out[key]
        elif what < 0.2:
            out[chance.choice([key.upper(), key + "s", key[:-1], "x", "type", ""])] = chance.choice(ODD)
        else:
            out[key] = change(out[key], chance)
        return out
    if isinstance(value, list) and value and chance.random() < 0.7:
        out, at = list(value), chance.randrange(len(value))
        what = chance.random()
        if what < 0.2:
            del out[at]
        elif what < 0.4:
            out.insert(at, copy.deepcopy(out[at]))
        else:
            out[at] = change(out[at], chance)
        return out
    return chance.choice(ODD)


def main(folder: str, seconds: str, seed: str, form: str) -> None:
    """Prints how many configs were tried."""
    logging.disable(logging.WARNING)
    chance, path = random.Random(f"{seed} {form}"), Path(folder)
    whole = {
        "supportlonglong": True,
        "fuse_embedding_table": False,
        "models": [
            {
                "model": MODEL,
                "sparse_files": write_version(path, 0, n=50),
                "num_of_worker_buffer_in_pool": 3,
                "num_of_refresher_buffer_in_pool": 1,
                "embedding_table_names": ["a", "b"],
                "embedding_vecsize_per_table": [DIM, DIM],
                "maxnum_catfeature_query_per_table_per_sample": [8, 8],
                "default_value_for_each_table": [-1.0, -1.0],
                "deployed_device_list": [0],
                "max_batch_size": 16,
                "cache_refresh_percentage_per_iteration": 0.2,
                "hit_rate_threshold": 0.9,
                "gpucacheper": 0.5,
                "gpucache": True,
                "cache_policy": "lru",
                "refresh_interval": 0,
            }
        ],
        "volatile_db": {"type": "hash_map", "num_partitions": 4, "overflow_margin": 1000, "overflow_policy": "evict_oldest"},
    }
    tried = opened = 0
    for _ in Clock(float(seconds), enough=lambda: opened):
        config = whole
        for _ in range(chance.choice([1, 1, 2, 5])):
            config = change(config, chance)
        given: Any = config
        if form == "file":
            given = path / "ps.json"
            text = json.dumps(config)
            if chance.random() < 0.3:
                at = chance.randrange(len(text))
                text = (
                    text[:at]
                    + chance.choice(["", "\0", "'", "#", ",", "}", "\ufeff", "//", "NaN"])
                    + text[at + chance.randint(0, 3) :]
                )
            given.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            server = hps_numba.HPS(given, strict=chance.random() < 0.3)
        except HpsError as problem:
            assert str(problem), "an error without a message"
        else:
            keys = np.arange(60)
            devices = {model.model: model.deployed_device_list[:1] or [0] for model in server.config.models}
            for model, tables in server.stats().items():
                for name in tables:
                    rows = server.lookup(keys, model, name, devices[model][0])
                    if rows.shape[1] == DIM and np.isfinite(rows).all():
                        here = (rows[:, 0] == 0) & (rows[:, 1:] != rows[:, :1]).any(1)  # not a default, which was changed
                        versions_of(keys[here], rows[here], "a changed config")
            server.close()
            opened += 1
        tried += 1
    print(tried)


if __name__ == "__main__":
    main(*sys.argv[1:])
