"""A process that serves a config and reads its updates: ``python -m support.update_consumer ps.json [OFFSET]``.

It says ``ready`` and goes on until it is killed; or, with an offset, until it has applied that one, and says a checksum of the
first table of model ``m``.
"""

from __future__ import annotations

import hashlib
import signal
import sys

from support.waiting import wait_until

import hps_numba


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def checksum(server: hps_numba.HPS) -> str:
    """Of the keys and rows of the first table."""
    with server.locked_table("m", 0) as (keys, rows_at):
        return hashlib.sha256(keys.tobytes() + rows_at(keys).tobytes()).hexdigest()


def main(config: str, offset: str = "") -> None:
    with hps_numba.HPS(config) as server:
        say("ready")
        if not offset:
            signal.pause()
        wait_until(lambda: max(server.update_stats()[0].positions.values(), default=-1) >= int(offset))
        say(checksum(server))


if __name__ == "__main__":
    main(*sys.argv[1:])
