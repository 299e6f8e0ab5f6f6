"""Files of inference requests in the JSON form of Triton's Perf Analyzer (checklist O04).

``{"data": [{"INPUT": {"content": [...], "shape": [...]}, ...}, ...]}``: one object a request, the content of a tensor as one
flat list in row-major order. Shapes leave out the batch dimension, which Perf Analyzer adds for models that batch.

Three forms, by the inputs of the model that is to be measured:

* ``hugectr``: a whole model of HugeCTR, with dense features and, for all tables in one tensor each, keys and row offsets;
* ``flat``: ``KEYS`` and ``NUMKEYS``, as HugeCTR's HPS backend and :mod:`hps_numba.frontends` take them;
* ``named``: an input for each table, with the name of the table and all of its keys in one dimension, as metadata says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hps_numba.cli._profile_keys import DrawnKeys
from hps_numba.errors import ModelFileError
from hps_numba.runtime.replacing import file_judge, replacing

__all__ = ["FORMS", "DenseInput", "InputNames", "RequestTable", "requests_of", "write_requests"]

FORMS = ("hugectr", "flat", "named")
Request = Mapping[str, np.ndarray]
_BEGIN, _END = b'{"data": [', b"]}\n"


@dataclass(frozen=True)
class RequestTable:
    """One table of a request.

    Attributes:
        keys_of_sample: keys that each sample has in this table.
        keys: where they come from.
    """

    name: str
    keys_of_sample: int
    keys: DrawnKeys


@dataclass(frozen=True)
class DenseInput:
    """Dense features of a sample: ``width`` numbers, uniform in [0, 1)."""

    width: int
    seed: int


@dataclass(frozen=True)
class InputNames:
    """Names of the inputs of form ``hugectr``."""

    dense: str
    keys: str
    offsets: str


def requests_of(
    form: str, tables: Sequence[RequestTable], *, samples: int, count: int, dense: DenseInput | None, names: InputNames
) -> Iterator[Request]:
    """``count`` requests of ``samples`` samples each: input name -> array; equal arguments give equal requests.

    Args:
        form: one of ``FORMS``; ``dense`` and ``names`` are for ``hugectr`` only.
    """
    streams = [table.keys.stream(number, len(tables)) for number, table in enumerate(tables)]
    rng = np.random.default_rng([dense.seed, len(tables)]) if dense else None
    for _ in range(count):
        drawn = [stream.draw(samples * table.keys_of_sample) for table, stream in zip(tables, streams, strict=True)]
        if form == "named":
            yield {table.name: keys for table, keys in zip(tables, drawn, strict=True)}
            continue
        keys = np.concatenate(drawn)
        if form == "flat":
            yield {"KEYS": keys, "NUMKEYS": np.array([len(some) for some in drawn], np.int32)}
            continue
        request = {names.keys: keys, names.offsets: np.concatenate([np.arange(len(some) + 1) for some in drawn])}
        if dense and rng:
            request = {names.dense: rng.random(samples * dense.width, np.float32), **request}
        yield request


def write_requests(path: Path, requests: Iterable[Request], *, overwrite: bool) -> int:
    """Write a file of requests, which appears only when it is complete; return its number of bytes.

    Raises:
        ModelFileError: there is something else at ``path``, or it cannot be written.
    """
    if path.is_dir():
        raise ModelFileError(f"{path}: expected the name of a JSON file, got a directory")
    judge = file_judge("a file of requests", lambda head: head.startswith(_BEGIN))
    with replacing(path, overwrite=overwrite, judge=judge) as new:
        with new.open("wb") as file:
            file.write(_BEGIN)
            for number, request in enumerate(requests):
                file.write((",\n" if number else "\n").encode())
                file.write(json.dumps({name: _tensor(array) for name, array in request.items()}).encode())
            file.write(b"\n" + _END)
        return new.stat().st_size


def _tensor(array: np.ndarray) -> dict[str, Any]:
    flat = array.reshape(-1)
    if array.dtype == np.float32:  # the shortest digits that give the same float32, not those of its float64
        content: list[Any] = [float(str(value)) for value in flat]
    else:
        content = flat.tolist()
    return {"content": content, "shape": list(array.shape)}
