"""Tables that several processes and devices have written, a part each: all parts of one dump, in order, or an error."""

from __future__ import annotations

from collections.abc import Mapping

from hps_numba.errors import ModelFileError
from hps_numba.storage.urls import Place

__all__ = ["check_complete"]

Position = tuple[int, int, int, int]
"""Rank, number of ranks, device and number of devices of a part."""


def check_complete(path: Place, table: str, parts: Mapping[Position, str]) -> list[str]:
    """The parts in the order of rank and device.

    Raises:
        ModelFileError: one is missing, or there are parts of two dumps.
    """
    kinds = sorted({(ranks, devices) for _, ranks, _, devices in parts})
    if len(kinds) > 1:
        shown = " and ".join(f"{ranks} x {devices}" for ranks, devices in kinds[:2])
        raise ModelFileError(f"{path}: table {table!r}: expected the parts of one dump, got those of {shown} ranks x devices")
    ranks, devices = kinds[0]
    if len(parts) != ranks * devices or any(not (0 <= rank < ranks and 0 <= device < devices) for rank, _, device, _ in parts):
        got = ", ".join(parts[place] for place in sorted(parts))[:300]
        raise ModelFileError(f"{path}: table {table!r}: expected {ranks} x {devices} parts, ranks x devices, got {got}")
    return [parts[place] for place in sorted(parts)]
