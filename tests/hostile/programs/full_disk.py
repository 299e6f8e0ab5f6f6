"""Writers on a disk that ends at a random byte: a typed error, the file of before is whole, nothing is left next to it.

``RLIMIT_FSIZE`` stands for the full disk: writes beyond it fail.
"""

from __future__ import annotations

import random
import resource
import signal
import sys
from pathlib import Path

from hostile.programs.world import Clock
from hostile.programs.writer import target_of, version_in, writer_of

from hps_numba import HpsError


def main(folder: str, seconds: str, seed: str, kind: str) -> None:
    """Prints how many writes failed."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    chance, path = random.Random(f"{seed} {kind}"), Path(folder)
    write = writer_of(kind, path)
    write(1)
    size = max(file.stat().st_size for file in [target_of(kind, path), *target_of(kind, path).glob("*")] if file.is_file())
    beside, current, failed = sorted(entry.name for entry in path.iterdir()), 1, 0
    for _ in Clock(float(seconds), enough=lambda: failed):
        version = chance.randint(2, 900)
        resource.setrlimit(resource.RLIMIT_FSIZE, (chance.randrange(1, size + size // 8), resource.RLIM_INFINITY))
        try:
            write(version)
            current = version
        except HpsError:
            failed += 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert version_in(kind, path) == current, "the file of before is gone"
        assert sorted(entry.name for entry in path.iterdir()) == beside, "files were left behind"
    print(failed)


if __name__ == "__main__":
    main(*sys.argv[1:])
