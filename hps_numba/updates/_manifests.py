"""Messages that name a version of a model: a header beside the updates of each of its tables; they have no value.

HugeCTR's readers skip messages without a value.
"""

from __future__ import annotations

from hps_numba.errors import ConfigError
from hps_numba.server.manifest import Manifest
from hps_numba.updates._update import Lost, Message, Update
from hps_numba.updates._wire.messages import Skip

__all__ = ["MANIFEST", "is_manifest", "manifest_headers", "read_manifest"]

#: name of the header: JSON
MANIFEST = "hps-manifest"


def manifest_headers(manifest: Manifest) -> dict[str, bytes]:
    """Headers of its messages."""
    return {MANIFEST: manifest.to_json()}


def is_manifest(item: Update | Message | Lost) -> bool:
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
