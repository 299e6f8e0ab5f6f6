"""How far a consumer has come: a small file of its own, locked as long as the consumer runs.

Two consumers with one file would each skip what only the other one has applied, so the second is refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hps_numba.errors import TierError
from hps_numba.updates._files.locks import HeldFile
from hps_numba.updates._files.writing import put_file, sync_folder

__all__ = ["Place", "PositionFile"]


@dataclass(frozen=True)
class Place:
    """Where to go on.

    Attributes:
        stream: of the folder.   number: of the file with the next message, or of one before it.   offset: of that message.
    """

    stream: str
    number: int
    offset: int


class PositionFile:
    """The file at ``path``; it is made with the first commit.

    Raises:
        TierUnavailable: another consumer has it, or its folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = HeldFile(path.with_name(path.name + ".lock"), "a position of one consumer ('consumer' names it)")

    def read(self) -> Place | None:
        """Where to go on; None at the first start.

        Raises:
            TierError: it cannot be read or is damaged.
        """
        try:
            given = json.loads(self.path.read_bytes())
            return Place(str(given["stream"]), int(given["number"]), int(given["offset"]))
        except FileNotFoundError:
            return None
        except OSError as problem:
            raise TierError(f"{self.path}: cannot be read: {problem.strerror}") from problem
        except (ValueError, KeyError, TypeError) as problem:
            raise TierError(f"{self.path}: expected a position, got a damaged or foreign file: {problem}") from None

    def write(self, place: Place) -> None:
        """Go on there after the next start; it is on the disk when this returns.

        Raises:
            TierError: it cannot be written.
        """
        try:
            put_file(self.path, json.dumps(asdict(place)).encode())
            sync_folder(self.path.parent)
        except OSError as problem:
            raise TierError(f"{self.path}: cannot be written: {problem.strerror}") from problem

    def close(self) -> None:
        """Let another consumer have it; again does nothing."""
        self._lock.release()
