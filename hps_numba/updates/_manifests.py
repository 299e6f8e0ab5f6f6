"""Messages that name a version of a model: a header beside the updates of each of its tables; they have no value.

HugeCTR's readers skip messages without a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from operator import not_

from hps_numba.errors import ConfigError
from hps_numba.server.manifest import Manifest
from hps_numba.updates._update import Message, Position, Update
from hps_numba.updates._wire.messages import Skip

__all__ = ["MANIFEST", "Switches", "is_manifest", "manifest_headers", "read_manifest"]

_Item = Update | Message
#: name of the header: JSON
MANIFEST = "hps-manifest"


def manifest_headers(manifest: Manifest) -> dict[str, bytes]:
    """Headers of its messages."""
    return {MANIFEST: manifest.to_json()}


def is_manifest(item: Update | Message) -> bool:
    """It names a version, and has no rows."""
    return isinstance(item, Message) and MANIFEST in item.headers


def read_manifest(message: Message) -> Manifest:
    """
    Raises:
        Skip: it is malformed.
    """
    if message.value or message.key is not None:
        raise Skip("manifest", "expected neither a value nor a message key beside a manifest")
    try:
        return Manifest.from_json(message.headers[MANIFEST])
    except ConfigError as problem:
        raise Skip("manifest", str(problem)) from None


class Switches:
    """Where the message was that brought the version in force: updates before it, if they come again, are in its files.

    Those of a snapshot that was announced are told apart by their times instead.

    Thread safety: one thread.
    """

    def __init__(self) -> None:
        self._issued: dict[str, int] = {}  # model -> time of the message
        self._places: dict[str, dict[int | str, int]] = {}  # model -> partition -> offset of the first of its copies

    def add(self, manifest: Manifest, position: Position) -> None:
        """A manifest was followed."""
        model = manifest.model
        if manifest.since_ms is not None and not manifest.tables:  # an announcement
            return
        if manifest.issued_ms > self._issued.get(model, -1):
            self._issued[model], self._places[model] = manifest.issued_ms, {}
        if manifest.issued_ms == self._issued[model] and manifest.since_ms is None:
            self._places[model].setdefault(*position)

    def split(self, tag: str, items: Sequence[_Item]) -> tuple[Sequence[_Item], Sequence[_Item]]:
        """Of the updates of a table, those after that message, and those before it."""
        places = self._places.get(tag.split(".")[1]) if self._places and "." in tag else None
        if not places:
            return items, ()
        before = [item.position.offset < places.get(item.position.partition, -1) for item in items]
        return list(compress(items, map(not_, before))), list(compress(items, before))
