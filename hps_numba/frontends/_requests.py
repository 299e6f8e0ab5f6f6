"""What a layer asks for, as a line of text that a graph can keep, and the answer to it.

A graph that is saved and run in another process cannot hold a server. It holds the text: the config, the tables, what is to be
done with the rows. The text is read once a process; from then on its server and tables are known by it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from hps_numba.arrays.buffer_pool import aligned_empty
from hps_numba.errors import ConfigError
from hps_numba.runtime.threads import SPLIT_BYTES, run_ranges
from hps_numba.server.hps import HPS
from hps_numba.server.registry import SERVERS, Config, Servers
from hps_numba.storage.host.pooling import offsets_of

__all__ = ["Request", "TableQuery", "answer", "tables_of"]


_WANTED = {"dim": "an integer from 1 on", "table": "the number or name of a table", "default_id": "an integer or None"}


@dataclass(frozen=True)
class TableQuery:
    """Rows of one table.

    Attributes:
        model, table, dim: of the table; ``dim`` is checked.
        combiner: None for a row a key; else one pooled row for each row of a sparse matrix of keys: ``sum``, ``mean``,
            ``sqrtn`` or ``max``.
        weighted: pooled, and each key has a weight.   paired: weights come with indices, which must be those of the keys.
        clipped: pooled, and rows are clipped to a norm first.
        default_id: pooled, and the key that stands in a row without keys, or None: such rows are 0.
    """

    model: str
    table: int | str
    dim: int
    combiner: str | None = None
    weighted: bool = False
    paired: bool = False
    clipped: bool = False
    default_id: int | None = None

    def __post_init__(self) -> None:
        for field, least in (("dim", 1), ("table", None), ("default_id", None)):
            value = getattr(self, field)
            if (field == "default_id" and value is None) or (field == "table" and isinstance(value, str)):
                continue
            if isinstance(value, bool) or not hasattr(value, "__index__") or (least is not None and value < least):
                name = {"dim": "emb_vec_size", "table": "table_id"}.get(field, field)
                raise ConfigError(f"{name}: {value!r} came, {_WANTED[field]} is wanted")
            object.__setattr__(self, field, value.__index__())  # NumPy's integers have no form in JSON

    @property
    def inputs(self) -> int:
        """How many arrays ``answer`` wants for it: keys; pooled also indices, number of rows, weights, their indices, norm."""
        return 1 if self.combiner is None else 3 + self.weighted + self.paired + self.clipped


@dataclass(frozen=True)
class Request:
    """Rows of some tables of the server of one config; ``global_batch_size`` and ``replicas`` count if it must be built."""

    config: Config
    wanted: tuple[TableQuery, ...]
    global_batch_size: int = 1
    replicas: int = 1

    @cached_property
    def text(self) -> bytes:
        """The request as JSON, in UTF-8.

        Raises:
            ConfigError: the config is a dict with something in it that JSON has no form for.
        """
        try:
            return json.dumps(asdict(self), sort_keys=True).encode()
        except TypeError as problem:
            raise ConfigError(f"ps_config_file: {problem}; plain numbers, texts, lists and dicts are wanted") from problem

    def pieces(self) -> tuple[str, list[str], str]:
        """``(head, a text for each of the wanted, tail)``; head, some of the texts with commas, and tail are a request."""
        text = replace(self, wanted=()).text.decode()
        return text[:-2], [json.dumps(asdict(one)) for one in self.wanted], text[-2:]

    @classmethod
    def of_text(cls, text: str | bytes) -> Request:
        """The request that ``text`` made this of."""
        values = json.loads(text)
        return cls(**{**values, "wanted": tuple(TableQuery(**one) for one in values["wanted"])})


Lookup = Callable[[Sequence[np.ndarray]], np.ndarray]


class _Ready:
    """A request with its server and a function for each table."""

    def __init__(self, text: str | bytes, servers: Servers) -> None:
        request = Request.of_text(text)
        self.wanted = request.wanted
        self.servers: list[HPS] = []
        self._lookups: list[Lookup] = []
        self._inputs: list[slice] = []
        self._row_bytes: list[int] = []
        at = 0
        for wanted in request.wanted:
            server = servers.of_model(
                request.config,
                wanted.model,
                global_batch_size=request.global_batch_size,
                replicas=request.replicas,
            )
            spec = server.table_spec(wanted.model, wanted.table)
            if spec.dim != wanted.dim:
                raise ConfigError(f"emb_vec_size: {wanted.dim} came, rows of {spec.tag} have {spec.dim} elements")
            self.servers.append(server)
            self._lookups.append(_lookup_of(server, wanted))
            self._inputs.append(slice(at, at + wanted.inputs))
            self._row_bytes.append(4 * wanted.dim)
            at += wanted.inputs
        self.tables = list(zip(self.servers, self.wanted, strict=True))

    def answer(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The rows, table by table; if there are many, by all threads."""
        parts = [arrays[inputs] for inputs in self._inputs]
        if len(parts) == 1 or sum(part[0].size * size for part, size in zip(parts, self._row_bytes)) < SPLIT_BYTES:
            return [lookup(part) for lookup, part in zip(self._lookups, parts)]
        answers: list[Any] = [None] * len(parts)

        def some(start: int, stop: int) -> int:
            for number in range(start, stop):
                answers[number] = self._lookups[number](parts[number])
            return stop - start

        run_ranges(some, [(number, number + 1) for number in range(len(parts))])
        return answers

    @property
    def stale(self) -> bool:
        return True in [server.closed for server in self.servers]  # a small lookup would notice any()


_ready: dict[str | bytes, _Ready] = {}


def answer(text: str | bytes, arrays: Sequence[np.ndarray], servers: Servers = SERVERS) -> list[np.ndarray]:
    """The rows that a request asks for.

    Args:
        text: of a ``Request``.
        arrays: for each table in turn: the keys, integers of any shape ``S``. If its rows are pooled: the keys ``[n]``; int64
            ``[n, 2]`` with their rows and columns in a sparse matrix, by row; the number ``N`` of rows; if weighted, numbers
            ``[n]``; if paired, the indices of the weights; if clipped, the norm.

    Returns:
        float32 ``S + (dim,)``, or ``[N, dim]``, for each table, in memory that TensorFlow takes over without a copy.

    Raises:
        As ``HPS``, ``HPS.lookup`` and ``HPS.lookup_pooled``.
    """
    return _ready_for(text, servers).answer(arrays)


def tables_of(text: str | bytes, servers: Servers = SERVERS) -> list[tuple[HPS, TableQuery]]:
    """The server of each table of a request, and what is wanted of it: for keys on a GPU, which ``answer`` cannot take.

    Raises:
        As ``HPS``.
    """
    return _ready_for(text, servers).tables


def _ready_for(text: str | bytes, servers: Servers) -> _Ready:
    ready = _ready.get(text)
    if ready is None or ready.stale:
        ready = _Ready(text, servers)
        _ready[text] = ready
    return ready


def _lookup_of(server: HPS, wanted: TableQuery) -> Lookup:
    model, table, dim = wanted.model, wanted.table, wanted.dim

    def rows(arrays: Sequence[np.ndarray]) -> np.ndarray:
        (keys,) = arrays
        out = aligned_empty((*keys.shape, dim))
        server.lookup_into(keys, model, table, out)
        return out

    def pooled(arrays: Sequence[np.ndarray]) -> np.ndarray:
        keys, indices, bags, *others = arrays
        offsets = offsets_of(indices[:, 0], int(bags))
        options: dict[str, Any] = {"combiner": wanted.combiner, "max_norm": float(others.pop()) if wanted.clipped else None}
        if wanted.paired and not np.array_equal(indices, others.pop()):
            raise ConfigError("sp_weights: its indices differ from those of sp_ids, the same ones are wanted")
        weights = others.pop() if wanted.weighted else None
        if weights is not None and len(weights) != len(keys):
            raise ConfigError(f"sp_weights: {len(weights)} values came, {len(keys)} are wanted, as many as ids")
        out = aligned_empty((len(offsets) - 1, dim))
        server.lookup_pooled(keys, offsets, model, table, None, weights=weights, out=out, **options)
        empty = offsets[1:] == offsets[:-1]
        if wanted.default_id is not None and empty.any():
            out[empty] = server.lookup_pooled(
                np.array([wanted.default_id]), [0, 1], model, table, None, max_norm=options["max_norm"]
            )
        return out

    return rows if wanted.combiner is None else pooled
