"""What a layer on tables of a server keeps in a ``state_dict``: which tables, of which config; rows by choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hps_numba.errors import ConfigError
from hps_numba.frontends._queries import Query, tables_of
from hps_numba.frontends._versions import of_version
from hps_numba.training.replacement import TableContent, replace_tables

__all__ = ["TableLayer"]

_VERSION = 1


class TableLayer(torch.nn.Module):
    """A layer whose rows live in a server.

    Attributes:
        rows_in_state_dict: ``state_dict`` takes all rows of the tables along, and ``load_state_dict`` makes them the content
            of the tables. Off by default: the entry then takes some hundred bytes.

    A ``state_dict`` has config and tables. Loading it checks that the tables are those of the layer; the config may differ, as
    on another machine, and the layer keeps its own. A ``state_dict`` without an entry for the layer is fine.
    """

    rows_in_state_dict = False

    def _request_for_all(self) -> str:
        """The request (``frontends/_queries.py``) for all tables of the layer."""
        raise NotImplementedError

    def _of_version(self, version: int, answer: Callable[[], Any]) -> Any:
        """``answer``, all of one version of the model.

        Raises:
            As ``of_version``; ConfigError also if it would become a part of a graph.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            raise ConfigError(f"version: expected None in a call that is compiled or exported, got {version!r:.200}")
        return of_version(self._request_for_all(), version, answer)

    def get_extra_state(self) -> dict[str, Any]:
        """What ``state_dict`` holds for the layer."""
        text = self._request_for_all()
        query = Query.from_json(text)
        state: dict[str, Any] = {"version": _VERSION, "config": query.config, "tables": _names(query)}
        if self.rows_in_state_dict:
            state["rows"] = []
            for server, table in tables_of(text):
                with server.locked_table(table.model, table.table) as (keys, read):
                    state["rows"].append([torch.from_numpy(keys), torch.from_numpy(read(keys))])
        return state

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Check what ``get_extra_state`` returned, and write its rows, if any, to the server.

        Raises:
            ConfigError: the state is that of other tables, or of a later version, or damaged.   Otherwise as ``HPS.insert``.
            All tables have their old rows then.
        """
        text = self._request_for_all()
        if not isinstance(state, Mapping):
            raise ConfigError(f"state_dict: expected what get_extra_state returned, got {state!r:.200}")
        if state.get("version") != _VERSION:
            raise ConfigError(f"state_dict: expected version {_VERSION}, got {state.get('version')!r:.200}")
        names = _names(Query.from_json(text))
        if state.get("tables") != names:
            raise ConfigError(f"state_dict: expected tables {names}, got {state.get('tables')!r:.200}")
        if "rows" in state:
            given = _rows_in(state["rows"], names)
            replace_tables(
                [
                    TableContent(server, table.model, table.table, keys, [(keys, rows)])
                    for (server, table), (keys, rows) in zip(tables_of(text), given, strict=True)
                ]
            )

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing_keys[:] = [key for key in missing_keys if key != f"{prefix}_extra_state"]


def _names(query: Query) -> list[list[Any]]:
    return [[table.model, table.table, table.dim] for table in query.tables]


def _rows_in(given: Any, names: list[list[Any]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and rows of each table.

    Raises:
        ConfigError: they are something else.
    """
    if not isinstance(given, Sequence) or len(given) != len(names):
        raise ConfigError(f"state_dict: rows: expected those of {len(names)} tables, got {given!r:.200}")
    found = []
    for (model, table, dim), pair in zip(names, given, strict=True):
        place = f"state_dict: rows of {model}, table {table}"
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(part, torch.Tensor) for part in pair):
            raise ConfigError(f"{place}: expected two tensors, keys and rows, got {pair!r:.200}")
        keys, rows = pair
        if keys.dtype != torch.int64 or keys.dim() != 1 or rows.dtype != torch.float32 or rows.shape != (len(keys), dim):
            got = f"{keys.dtype} {list(keys.shape)} and {rows.dtype} {list(rows.shape)}"
            raise ConfigError(f"{place}: expected int64 [n] and float32 [n, {dim}], got {got}")
        found.append((keys.detach().cpu().numpy(), rows.detach().cpu().numpy()))
    return found
