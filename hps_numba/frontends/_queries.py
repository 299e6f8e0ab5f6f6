"""What a layer asks for, as a line of JSON that a graph can keep, and the answer to it.

A graph that is saved and run in another process cannot hold a server. It holds a query: the config, the tables, what is to be
done with the rows; keys come when it runs. The text is read once a process; from then on its server and tables are known by it.

The form of the text is a file format: SavedModels and exported programs hold it. ``from_json`` reads every form that a version
of this package wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from hps_numba.arrays.buffer_pool import aligned_empty
from hps_numba.config.arguments import as_index
from hps_numba.config.messages import show
from hps_numba.errors import ConfigError
from hps_numba.runtime.threads import SPLIT_BYTES, run_ranges
from hps_numba.server.hps import HPS
from hps_numba.server.registry import SERVERS, Config, Servers
from hps_numba.storage.host.pooling import offsets_of

__all__ = ["Query", "TableQuery", "answer", "tables_given", "tables_of"]

_EXPECTED = {"dim": "an integer from 1 on", "table": "the number or name of a table", "default_id": "an integer or None"}
_INT32_MAX, _INT64_MAX = (1 << 31) - 1, (1 << 63) - 1
_KEYS = (-(1 << 63), (1 << 64) - 1)
_PUBLIC = {"dim": "emb_vec_size", "table": "table_id"}  # what users call it


@dataclass(frozen=True)
class TableQuery:
    """Rows of one table.

    Attributes:
        model, table, dim: of the table; ``dim`` is checked.
        combiner: None for a row a key; else one pooled row for each row of a sparse matrix of keys: ``sum``, ``mean``,
            ``sqrtn`` or ``max``.
        weighted: pooled, and each key has a weight.   paired: weights come with indices, which must be those of the keys.
        clipped: pooled, and rows are clipped to a norm first.
        default_id: pooled, and the key that a row without keys is taken to have, or None: such rows are 0.
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
        if not isinstance(self.model, str):
            raise ConfigError(f"model_name: expected a text, got {show(self.model)}")
        for field, low, high in (("dim", 1, _INT32_MAX), ("table", -_INT64_MAX, _INT64_MAX), ("default_id", *_KEYS)):
            value = getattr(self, field)
            if (field == "default_id" and value is None) or (field == "table" and isinstance(value, str)):
                continue
            number = as_index(value)
            if number is None or not low <= number <= high:
                got = repr(value) if value is None or isinstance(value, (str, int, float)) else show(value)
                raise ConfigError(f"{_PUBLIC.get(field, field)}: expected {_EXPECTED[field]}, got {got:.200}")
            object.__setattr__(self, field, number)  # NumPy's integers have no form in JSON

    @property
    def inputs(self) -> int:
        """How many arrays ``answer`` takes for it: keys; pooled also indices, number of rows, weights, their indices, norm."""
        return 1 if self.combiner is None else 3 + self.weighted + self.paired + self.clipped


def tables_given(tables: Any) -> dict[str, tuple[int | str, int]]:
    """The ``tables`` of a collection, ``{feature: (table_id, emb_vec_size)}``.

    Raises:
        ConfigError: they have another form.
    """
    expected = "tables: expected {feature: (table_id, emb_vec_size)}"
    if not isinstance(tables, Mapping) or not tables:
        raise ConfigError(
            f"{expected}, got {show(tables) if tables is not None and not isinstance(tables, Mapping) else 'none'}"
        )
    for feature, pair in tables.items():
        if not isinstance(feature, str) or not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ConfigError(f"{expected}, got {show(feature)}: {show(pair)}")
    return {feature: (table, dim) for feature, (table, dim) in tables.items()}


@dataclass(frozen=True)
class Query:
    """Rows of some tables of the server of one config; ``global_batch_size`` and ``replicas`` count if it must be built."""

    config: Config
    tables: tuple[TableQuery, ...]
    global_batch_size: int = 1
    replicas: int = 1

    def to_json(self) -> str:
        """The query as one line of JSON; the tables are called ``wanted`` there, as in the first graphs that were saved.

        Raises:
            ConfigError: the config is a dict with a value that JSON has no form for.
        """
        values = asdict(self)
        values["wanted"] = values.pop("tables")
        try:
            return json.dumps(values, sort_keys=True)
        except (TypeError, ValueError, RecursionError) as problem:
            raise ConfigError(f"ps_config_file: expected plain numbers, texts, lists and dicts, got {problem}") from problem

    @cached_property
    def encoded(self) -> bytes:
        """``to_json`` in UTF-8, made once."""
        return self.to_json().encode()

    def pieces(self) -> tuple[str, list[str], str]:
        """``(head, a text for each table, tail)``: head, some of the texts with commas between, and tail are a query."""
        text = replace(self, tables=()).to_json()
        return text[:-2], [json.dumps(asdict(table)) for table in self.tables], text[-2:]

    @classmethod
    def from_json(cls, text: str | bytes) -> Query:
        """The query of which ``to_json`` made this text.

        Raises:
            ConfigError: the text is of something else: a graph was changed, or a later version wrote it.
        """
        try:
            values = json.loads(text)
            tables = tuple(TableQuery(**table) for table in values.pop("wanted"))
            return cls(tables=tables, **values)
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as problem:
            if isinstance(problem, ConfigError):
                raise
            raise ConfigError(f"request of a layer: expected what this package wrote, got {problem!r:.200}") from problem


Lookup = Callable[[Sequence[np.ndarray]], np.ndarray]


class _Ready:
    """A query with its server and a function for each table."""

    def __init__(self, text: str | bytes, servers: Servers) -> None:
        query = Query.from_json(text)
        self.servers: list[HPS] = []
        self._lookups: list[Lookup] = []
        self._inputs: list[slice] = []
        self._row_bytes: list[int] = []
        at = 0
        for table in query.tables:
            server = servers.of_model(
                query.config, table.model, global_batch_size=query.global_batch_size, replicas=query.replicas
            )
            spec = server.direct.table_spec(table.model, table.table)
            if spec.dim != table.dim:
                raise ConfigError(f"emb_vec_size: expected {spec.dim}, as rows of {spec.tag} have, got {table.dim}")
            self.servers.append(server)
            self._lookups.append(_lookup_of(server, table))
            self._inputs.append(slice(at, at + table.inputs))
            self._row_bytes.append(4 * table.dim)
            at += table.inputs
        self.tables = list(zip(self.servers, query.tables, strict=True))
        self._different = list(dict.fromkeys(self.servers))

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
        return True in [server.closed for server in self._different]  # a small lookup would notice any()


_ready: dict[str | bytes, _Ready] = {}


def answer(text: str | bytes, arrays: Sequence[np.ndarray], servers: Servers = SERVERS) -> list[np.ndarray]:
    """The rows that a query asks for.

    Args:
        text: of a ``Query``.
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
    """The server of each table of a query, and what is asked of it: for keys on a GPU, which ``answer`` cannot take.

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


def _lookup_of(server: HPS, query: TableQuery) -> Lookup:
    model, table, dim, lookup_into = query.model, query.table, query.dim, server.direct.lookup_into

    def rows(arrays: Sequence[np.ndarray]) -> np.ndarray:
        (keys,) = arrays
        out = aligned_empty((*keys.shape, dim))
        lookup_into(keys, model, table, out)
        return out

    def pooled(arrays: Sequence[np.ndarray]) -> np.ndarray:
        keys, indices, bags, *others = arrays
        offsets = offsets_of(indices[:, 0], int(bags))
        options: dict[str, Any] = {"combiner": query.combiner, "max_norm": float(others.pop()) if query.clipped else None}
        if query.paired and not np.array_equal(indices, others.pop()):
            raise ConfigError("sp_weights: expected the indices of sp_ids, got others")
        weights = others.pop() if query.weighted else None
        if weights is not None and len(weights) != len(keys):
            raise ConfigError(f"sp_weights: expected {len(keys)} values, as many as ids, got {len(weights)}")
        out = aligned_empty((len(offsets) - 1, dim))
        server.lookup_pooled(keys, offsets, model, table, None, weights=weights, out=out, **options)
        empty = offsets[1:] == offsets[:-1]
        if query.default_id is not None and empty.any():
            out[empty] = server.lookup_pooled(
                np.array([query.default_id]), [0, 1], model, table, None, max_norm=options["max_norm"]
            )
        return out

    return rows if query.combiner is None else pooled
