"""How a parameter server changes rows: NumPy arrays or those of any framework in, every tier and every cache written.

Arrays are opened by the caller's thread. The change itself is shielded (``runtime.shielded``): an interrupt leaves no tier and
no cache behind the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hps_numba.arrays.host import as_keys, as_rows
from hps_numba.errors import ModelFileError
from hps_numba.runtime.shielded import Ask, refuse_inside_work, shielded
from hps_numba.server.catalog import Catalog
from hps_numba.server.evictions import OnEvict
from hps_numba.server.table import ServedTable
from hps_numba.server.table_writes import Change, RowsChange
from hps_numba.storage.tiers._tier import Tier

__all__ = ["Writes"]


class Writes:
    """Writes to the tables of a server; ``server.hps.HPS`` says what each takes, returns and raises.

    Args:
        catalog: where tables are found.
        fastest: the fastest tier with the rows of a table, to dump them from.
        dump_rows: rows that ``load_dump`` inserts at a time.

    Thread safety: every method from any thread; writes to one table take turns.
    """

    def __init__(self, catalog: Catalog, fastest: Callable[[ServedTable], Tier], dump_rows: int) -> None:
        self._catalog = catalog
        self._fastest = fastest
        self._dump_rows = dump_rows

    def insert(self, keys: Any, rows: Any, model_name: str, table_id: int | str) -> int:
        """As ``HPS.insert``."""
        table = self._table(model_name, table_id)
        given = self._keys_and_rows(keys, rows, table)
        return self._shielded(table, lambda ask: table.writes.insert(*given))

    def update(self, keys: Any, rows: Any, model_name: str, table_id: int | str) -> int:
        """As ``HPS.update``."""
        table = self._table(model_name, table_id)
        given = self._keys_and_rows(keys, rows, table)
        return self._shielded(table, lambda ask: table.writes.update(*given))

    def _table(self, model_name: str, table_id: int | str) -> ServedTable:
        """A table to be written; a replacement of its model may have to end before."""
        model = self._catalog.model(model_name)
        model.replays.refuse_here(f"model {model.name}")
        return model.table(table_id)

    def _shielded(self, table: ServedTable, change: Callable[[Ask], int]) -> int:
        """Do a change of a table whole, whatever interrupts this thread, unless this thread has locked the table itself."""
        if table.writes.held_here:
            return change(lambda question: question())
        return shielded(change, owner=table.writes, place=table.spec.tag)

    def _keys_and_rows(self, keys: Any, rows: Any, table: ServedTable) -> tuple[np.ndarray, np.ndarray]:
        batch = as_keys(keys, key_bits=self._catalog.key_bits)
        return batch.flat.copy(), as_rows(rows, (*batch.shape, table.spec.dim)).reshape(-1, table.spec.dim)

    def _keys(self, keys: Any) -> np.ndarray:
        """A copy: tiers and caches read the keys one after the other, while another thread may change the array."""
        return as_keys(keys, key_bits=self._catalog.key_bits).flat.copy()

    def read_modify_write(self, keys: Any, change: Change, model_name: str, table_id: int | str) -> int:
        """As ``HPS.read_modify_write``."""
        table = self._table(model_name, table_id)
        flat = self._keys(keys)
        shape = (len(flat), table.spec.dim)

        def new_rows(ask: Ask, rows: np.ndarray, found: np.ndarray) -> np.ndarray:
            made: np.ndarray = ask(lambda: as_rows(change(rows, found), shape))
            return made

        return self._shielded(table, lambda ask: table.writes.read_modify_write(flat, partial(new_rows, ask)))

    def rewrite(self, keys: np.ndarray, change: RowsChange, model_name: str, table_id: int | str) -> int:
        """As ``DirectAccess.rewrite``."""
        table = self._catalog.table(model_name, table_id)

        def new_rows(ask: Ask, *places: np.ndarray) -> np.ndarray | None:
            made: np.ndarray | None = ask(lambda: change(*places))
            return made

        return self._shielded(table, lambda ask: table.writes.rewrite(keys, partial(new_rows, ask)))

    @contextmanager
    def locked_table(
        self, model_name: str, table_id: int | str
    ) -> Iterator[tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]]:
        """As ``HPS.locked_table``."""
        table = self._table(model_name, table_id)
        with table.writes.paused():
            yield table.writes.keys(), lambda some: table.writes.read(some)[0]

    def erase(self, keys: Any, model_name: str, table_id: int | str) -> int:
        """As ``HPS.erase``."""
        table = self._table(model_name, table_id)
        flat = self._keys(keys)
        return self._shielded(table, lambda ask: table.writes.erase(flat))

    def on_evict(self, callback: OnEvict, model_name: str, table_id: int | str) -> Callable[[], None]:
        """As ``HPS.on_evict``."""
        return self._catalog.table(model_name, table_id).writes.evictions.add(callback)

    def refresh(self, model_name: str, table_id: int | str | None, *, drop: bool) -> None:
        """As ``HPS.refresh``."""
        model = self._catalog.model(model_name)
        place, every = f"model {model_name}", [table.writes for table in model.tables]
        model.replays.refuse_here(place)
        if any(writes.held_here for writes in every):
            model.refresh(table_id, drop=drop)
            return
        refuse_inside_work(place, every)
        shielded(lambda ask: model.refresh(table_id, drop=drop), owner=model, place=place)

    def contains(self, keys: Any, model_name: str, table_id: int | str) -> np.ndarray:
        """As ``HPS.contains``."""
        table = self._catalog.table(model_name, table_id)
        batch = as_keys(keys, key_bits=self._catalog.key_bits)
        return table.writes.contains(batch.flat).reshape(batch.shape)

    def dump(self, path: str | Path, model_name: str, table_id: int | str) -> int:
        """As ``HPS.dump``."""
        table = self._catalog.table(model_name, table_id)
        return self._fastest(table).dump(table.spec.tag, path)

    def load_dump(self, path: str | Path, model_name: str, table_id: int | str) -> int:
        """As ``HPS.load_dump``."""
        table = self._table(model_name, table_id)
        dump = self._fastest(table).open_dump(path)
        if dump.pairs and dump.dim != table.spec.dim:
            raise ModelFileError(f"{path}: expected rows of width {table.spec.dim} for table {table.spec.tag}, got {dump.dim}")
        for keys, rows in dump.chunks(self._dump_rows):
            self._shielded(table, partial(_insert, table, keys, rows))
        return dump.pairs


def _insert(table: ServedTable, keys: np.ndarray, rows: np.ndarray, ask: Ask) -> int:
    return table.writes.insert(keys, rows)
