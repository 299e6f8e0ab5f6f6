"""A whole model from a file, whose lookup layers are ours: what the front ends that load one and those that serve one share.

The graph of such a file holds queries (``_queries.py``), which name a config, perhaps of the machine on which the model was
trained. Where it is served, all of them have to ask the server that serves: when it is loaded, each query is pointed to that
server, and its tables are checked.

Turned down: a server of the process that answers whatever query names one of its models; layers that train in the same process
would be led away from their own rows.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hps_numba.config.messages import show
from hps_numba.errors import ConfigError
from hps_numba.frontends._queries import Query, TableQuery
from hps_numba.server.hps import HPS
from hps_numba.server.registry import SERVERS, Servers

__all__ = ["Program", "ProgramError", "ProgramTensor", "ServedQueries"]


class ProgramError(Exception):
    """The code of a program failed; the cause says how."""


@dataclass(frozen=True)
class ProgramTensor:
    """An input or output of a program.

    Attributes:
        name: of the tensor.   dtype: NumPy's.
        shape: its sizes. A text stands for a size that may vary: equal texts for equal sizes, an empty one for any.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]


class ServedQueries:
    """The queries of one program, pointed to the server that serves it.

    Args:
        server: has to have all tables.   program: what messages call it.

    Attributes:
        tables: that the program looks up.
    """

    def __init__(self, server: HPS, program: str, servers: Servers = SERVERS) -> None:
        self.tables: list[TableQuery] = []
        self._server, self._program = server, program
        self._config = servers.lend(server)

    def point(self, text: str | bytes) -> str:
        """The query in a text, of the same tables of the server.

        Raises:
            ConfigError: the text is no query, or the server has no such table, or of another width.
        """
        query = Query.from_json(text)
        for table in query.tables:
            self._check(table)
        self.tables += query.tables
        return replace(query, config=self._config, global_batch_size=1, replicas=1).to_json()

    def point_start(self, text: str | bytes) -> str:
        """What an ``Init`` in a graph asks for (JSON with ``config``), of the server that is there already.

        Raises:
            ConfigError: the text is something else.
        """
        try:
            return json.dumps({**json.loads(text), "config": self._config})
        except (ValueError, TypeError, RecursionError) as problem:
            raise ConfigError(f"program {self._program}: expected what Init wrote, got {problem!r:.200}") from problem

    def _check(self, table: TableQuery) -> None:
        place = f"program {self._program}"
        if table.model not in self._server.models:
            there = ", ".join(self._server.models)
            raise ConfigError(f"{place}: expected tables of the models {there} of the server, got one of {show(table.model)}")
        names = {key for spec in self._server.direct.tables(table.model) for key in (spec.table_id, spec.name)}
        if table.table not in names:
            known = ", ".join(spec.name for spec in self._server.direct.tables(table.model))
            raise ConfigError(f"{place}: expected tables of model {table.model!r} ({known:.500}), got {show(table.table)}")
        spec = self._server.direct.table_spec(table.model, table.table)
        if spec.dim != table.dim:
            raise ConfigError(f"{place}: expected rows of {spec.dim} elements, as {spec.tag} has, got {table.dim}")


class Program(ABC):
    """A model from a file, ready to be called.

    Attributes:
        platform: what it is made of.   inputs, outputs: its tensors.
        bounds: the least and largest of the sizes that ``shape`` names, as far as they are known.
        batch: the first axis of every input and output is that of samples.
        models: names of the models of the server whose rows it looks up.

    Thread safety: every method.
    """

    platform: str
    inputs: tuple[ProgramTensor, ...]
    outputs: tuple[ProgramTensor, ...]
    bounds: Mapping[str, tuple[int, int]]
    batch: bool
    models: tuple[str, ...]

    @abstractmethod
    def run(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Outputs for inputs, which have the dtypes and shapes that were promised.

        Raises:
            HpsError: as lookups.   ProgramError: the code of the program failed.
        """
