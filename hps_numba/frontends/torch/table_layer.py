"""What a layer on tables of a server keeps in a ``state_dict``: which tables, of which config; rows by choice."""

from __future__ import annotations

from typing import Any

import torch

from hps_numba.errors import ConfigError
from hps_numba.frontends._queries import Query, tables_of
from hps_numba.training.checkpoints import set_rows

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
            ConfigError: the state is that of other tables, or of a later version.   Otherwise as ``HPS.insert``.
        """
        text = self._request_for_all()
        if state.get("version") != _VERSION:
            raise ConfigError(f"state_dict: expected version {_VERSION}, got {state.get('version')!r}")
        names = _names(Query.from_json(text))
        if state["tables"] != names:
            raise ConfigError(f"state_dict: expected tables {names}, got {state['tables']}")
        for (server, table), (keys, rows) in zip(
            tables_of(text) if "rows" in state else [], state.get("rows", []), strict=True
        ):
            set_rows(server, table.model, table.table, keys.numpy(), [(keys.numpy(), rows.numpy())])

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
